"""What a training run is made of: typed fields that a YAML file fills (see configs/train/demo.yaml)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import yaml

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.loggers import KINDS
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


@dataclass(frozen=True)
class PasskeyConfig:
    """Passkeys mixed in, as `mix: [{task: passkey, ...}]` would. With `fill`, what the key's own sentence repeats of it
    counts as an answer, too: copying from next to it is learned first."""

    fraction: float = 0.1  # of the sequences in a batch
    lengths: tuple[int, int] = (128, 256)  # tokens of prompt and answer, drawn uniformly, both ends included
    answer_weight: float = 1.0  # weight of the answer tokens' mean loss, added to the loss of all tokens
    style: Literal["headerless", "paper", "auto"] = "headerless"  # auto: headerless below 1024 tokens
    fill: bool = False

    def __post_init__(self) -> None:
        self.mixed  # noqa: B018 (is checked when made)
        _check_weight(self.answer_weight)

    @property
    def mixed(self) -> MixedTask:
        task = f"passkey:style={self.style}" + (",learn=both" if self.fill else "")
        return MixedTask(task, self.fraction, self.lengths, self.fill)


@dataclass(frozen=True)
class MixedTask:
    """A share of the sequences ends with an example of a task, answers included; text fills what comes before it.

    With `fill` they are examples from the end to the beginning, or as far as one more fits, of lengths drawn
    log-uniformly: in long sequences one each is too few to learn recall from, and none is short. With `in_text` the
    row's own text stands in the place of the task's filler, and goes on through the example.
    """

    task: str  # such as passkey:style=paper
    fraction: float = 0.1  # of the sequences in a batch
    lengths: tuple[int, int] = (128, 256)  # tokens of an example, both ends included
    fill: bool = False
    draw: Literal["uniform", "log-uniform"] | None = None  # of lengths; null: uniform, with fill log-uniform
    in_text: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise InputError(f"fraction: expected a share between 0 and 1, got {self.fraction}")
        if not 0 < self.lengths[0] <= self.lengths[1]:
            raise InputError(f"lengths: expected the shortest and the longest, got {list(self.lengths)}")

    def within(self, length: int) -> MixedTask:
        """Return what of it fits into sequences of `length` tokens."""
        return replace(self, lengths=(self.lengths[0], min(self.lengths[1], length))) if self.fraction else self


@dataclass(frozen=True)
class MixedText:
    """One text of several. Where one has a weight, all must: rows are then drawn by weight, not by size."""

    source: str  # as rnn_longctx.data.load_text reads it
    weight: float | None = None  # of the rows, in relation to the other weights
    tokens: int | None = None  # about how many to read of its beginning; null: all

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise InputError(f"weight: expected 0 or more, got {self.weight}")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens: expected a positive number, got {self.tokens}")


@dataclass(frozen=True)
class DataConfig:
    text: list[str | MixedText] = field(default_factory=lambda: ["site-packages"])
    tokenizer: str = "bytes"
    held_out: float = 0.005  # share of the text, its last documents, never trained on: the validation text
    min_document: int = 0  # tokens: shorter documents are left out
    mask_first: bool = False  # a document's first token, which only the one before it could predict, counts as no loss
    reset: bool = False  # the state is dropped where a document begins
    passkey: PasskeyConfig | None = field(default_factory=PasskeyConfig)  # null: none
    mix: list[MixedTask] | None = None  # examples of any tasks, in the place of `passkey`; []: none
    answer_weight: float | None = None  # with mix: as `passkey.answer_weight`; null: 1

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out: expected a share between 0 and 1, got {self.held_out}")
        if not self.text:
            raise InputError("text: expected at least one text, such as site-packages")
        if self.min_document < 0:
            raise InputError(f"min_document: expected a number of tokens, got {self.min_document}")
        passkeys = self.passkey is not None and self.passkey.fraction > 0 and self.passkey != PasskeyConfig()
        if self.mix is not None and passkeys:
            raise InputError("mix: takes the place of passkey; give one of them, or set passkey to null")
        if sum(mixed.fraction for mixed in self.mixed) > 1 + 1e-9:
            raise InputError("mix: the fractions are more than 1 together")
        if self.answer_weight is not None:
            _check_weight(self.answer_weight)
            if self.mix is None:
                raise InputError("answer_weight: goes with mix; without it, give passkey.answer_weight")
        weights = [text.weight for text in self.parts]
        if None in weights and len({*weights}) > 1:
            raise InputError(f"text: {self.parts[weights.index(None)].source} has no weight, but another text has")
        if None not in weights and not any(weights):
            raise InputError("text: every weight is 0")

    @property
    def parts(self) -> list[MixedText]:
        return [MixedText(text) if isinstance(text, str) else text for text in self.text]

    @property
    def mixed(self) -> list[MixedTask]:
        """The tasks whose examples are mixed in."""
        if self.mix is not None:
            return self.mix
        return [] if self.passkey is None else [self.passkey.mixed]

    @property
    def mixed_names(self) -> list[str]:
        """What messages call each of them."""
        if self.mix is None:
            return ["data.passkey" for _ in self.mixed]
        return [f"data.mix[{i}]" for i in range(len(self.mix))]

    @property
    def weight_of_answers(self) -> float:
        """The weight of the answer tokens' mean loss, which is added to the loss of all tokens."""
        if self.mix is None:
            return 1.0 if self.passkey is None else self.passkey.answer_weight
        return 1.0 if self.answer_weight is None else self.answer_weight

    def within(self, length: int) -> DataConfig:
        """Return the data for sequences of `length` tokens."""
        if self.mix is not None:
            return replace(self, mix=[mixed.within(length) for mixed in self.mix])
        passkey = self.passkey
        if passkey is None or not passkey.fraction:
            return self
        return replace(self, passkey=replace(passkey, lengths=passkey.mixed.within(length).lengths))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. No weight decay on vectors (norms, biases, A_log, D, dt_bias) and `_no_weight_decay`
    parameters."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of the whole gradient

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas: expected two from 0 to below 1, got {list(self.betas)}")
        if not self.clip > 0:  # one of 0 would train nothing, and one below 0 climb
            raise InputError(f"clip: expected a norm above 0 (inf clips nothing), got {self.clip}")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine to the end, or (wsd) a constant with a linear decay over the last
    `decay`."""

    name: Literal["cosine", "wsd"] = "cosine"
    warmup: int = 100  # steps
    decay: float = 0.1  # wsd: share of the steps
    min_lr: float = 0.0  # as a share of lr, reached at the end

    def __post_init__(self) -> None:
        if self.name == "wsd" and not 0 < self.decay <= 1:
            raise InputError(f"decay: expected a share of the steps above 0, up to 1, got {self.decay}")
        if self.warmup < 0:
            raise InputError(f"warmup: expected a number of steps, got {self.warmup}")
        if not 0 <= self.min_lr <= 1:
            raise InputError(f"min_lr: expected a share of lr, from 0 to 1, got {self.min_lr}")


@dataclass(frozen=True)
class PassingConfig:
    """State passing: a stream of train_length tokens is read in segments, each from the state the one before left
    (see `rnn_longctx.train.bptt`)."""

    segment: int = 512  # tokens; a stream of fewer, in a schedule of several lengths, is one segment
    bptt: int | Literal["all"] = 0  # segment boundaries that a loss's gradient may cross, at most
    start: Literal["zero", "previous", "noise", "fitted-noise"] = "previous"  # the state before a stream's first token
    carry: float = 0.9  # previous: chance that a row goes on from its last stream's final state; otherwise from zero

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise InputError(f"segment: expected a positive number of tokens, got {self.segment}")
        if isinstance(self.bptt, int) and self.bptt < 0:
            raise InputError(f"bptt: expected 0, more segment boundaries, or all, got {self.bptt}")
        if not 0 <= self.carry <= 1:
            raise InputError(f"carry: expected a chance between 0 and 1, got {self.carry}")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during training, into eval.csv: at the start, every so many steps, and at the end."""

    lengths: list[int]  # tokens
    every: int = 100  # steps
    passkeys: int = 20  # prompts of each length; 0: loss alone

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2:
            raise InputError(f"lengths: expected some of 2 tokens or more, such as [512, 4k], got {self.lengths}")
        if self.every < 1:
            raise InputError(f"every: expected a positive number of steps, got {self.every}")
        if self.passkeys < 0:
            raise InputError(f"passkeys: expected a number of prompts, got {self.passkeys}")


@dataclass(frozen=True)
class OnlineConfig:
    """Updates on text that arrives (see `rnn_longctx.train.online`), each kept or undone."""

    tokens: int = 2**18  # that have arrived make an update, which is then checked
    held_out: float = 0.1  # share of them, the last, not trained on: an update may not make it harder
    replay: float = 0.25  # share of the rows that read data.text
    loss_tolerance: float = 0.01  # nats above the lowest loss of the models kept, at each evaluated length
    passkey_tolerance: float = 0.05  # share of the passkeys below the most of the models kept, at each length
    poll: float = 5.0  # seconds between two looks at the directory

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out: expected a share above 0 and below 1, got {self.held_out}")
        if not 0 <= self.replay < 1:
            raise InputError(f"replay: expected a share from 0 to below 1, got {self.replay}")
        if self.tokens * self.held_out < 2:
            raise InputError(f"tokens: {self.tokens} are too few to hold out {self.held_out} of")
        for name in ("loss_tolerance", "passkey_tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 < self.poll < math.inf:
            raise InputError(f"poll: expected seconds, got {self.poll}")


class Stage(NamedTuple):
    """A part of a run whose streams are of one length."""

    length: int  # tokens
    steps: int
    rows: int  # of an update, over all ranks


@dataclass(frozen=True)
class TrainConfig:
    """A run. `train_length` may be a schedule of tokens:steps, such as 4k:200,16k:300; the sum is then `steps`. A stage
    may say how many rows it has: 4k:200:16,16k:300:4; without, they are `batch_size`."""

    model: ModelConfig | Mamba2Config | None = None  # with init: what that is
    init: str | None = None  # a checkpoint to start from, as `rnn_longctx.load` takes it: demo, a directory, a hub id
    mitigation: str | None = None  # with init: folded into its weights before the first step (`rnn_longctx.fold`)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    passing: PassingConfig | None = None  # None: a stream is one segment and begins at zero
    evaluate: EvaluateConfig | None = None
    online: OnlineConfig | None = None  # of `train --stream DIR` alone
    train_length: int | str = 256  # tokens
    batch_size: int = 256  # sequences of one update, over all ranks
    accumulate: int = 1  # calls that a rank reads its sequences in, one after the other: memory for time
    sequence_parallel: int = 1  # ranks that hold a sequence together; the others read other sequences
    fsdp: bool = False  # over several ranks: shard weights, gradients and moments (FSDP2); otherwise DDP
    steps: int = 1500
    amp: bool | Literal["auto"] = "auto"  # bf16 autocast; auto: on CUDA
    device: str = "auto"  # auto: CUDA when there is one, and of several ranks the one's own
    seed: int = 0
    log_every: int = 10  # steps
    log_to: list[str] = field(default_factory=list)  # tensorboard, wandb; log.csv is written anyway
    checkpoint_every: int = 250  # steps
    export_every: int | None = None  # steps between models kept under out/steps, to follow something over training
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the models' files
    # of the models' files: whose library loads them
    save_layout: Literal["rnn-longctx", "transformers", "state-spaces", "fla"] = "rnn-longctx"
    out: str = "runs/train/demo"
    licences: str = ""  # recorded with the finished model: what the training text is licensed under

    def __post_init__(self) -> None:
        if self.model is None and self.init is None:
            raise InputError("model: missing; give its shape, or init: a checkpoint to start from")
        if self.mitigation is not None and self.init is None:
            raise InputError("mitigation: is folded into a checkpoint's weights; give init, the checkpoint")
        if self.batch_size < 1:  # (which stages take)
            raise InputError(f"batch_size: expected a positive number, got {self.batch_size}")
        if isinstance(self.train_length, str):
            if ":" in self.train_length:
                object.__setattr__(self, "steps", sum(stage.steps for stage in self.stages))
            else:  # a length, such as 16k
                object.__setattr__(self, "train_length", _stages(f"{self.train_length}:1", 1)[0].length)
        for name in ("accumulate", "sequence_parallel", "steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for kind in self.log_to:
            if kind not in KINDS:
                raise InputError(f"log_to: unknown log {kind!r}{nearest(kind, KINDS)}")
        if self.seed < 0:
            raise InputError(f"seed: expected 0 or more, got {self.seed}")
        shortest = min(stage.length for stage in self.stages)
        if shortest < 1:
            raise InputError(f"train_length: expected a positive number, got {shortest}")
        if self.export_every is not None and self.export_every < 1:
            raise InputError(f"export_every: expected a positive number, got {self.export_every}")
        if "stdlib" in [text.source for text in self.data.parts]:
            raise InputError("data.text: stdlib is the evaluation text and is never trained on; use site-packages")
        if self.passing is not None and self.passing.segment > self.longest:
            raise InputError(f"passing.segment: {self.passing.segment} is longer than train_length {self.longest}")
        for mixed, name in zip(self.data.mixed, self.data.mixed_names, strict=True):
            low, high = mixed.lengths
            if mixed.fraction and (high > self.longest or low > shortest):
                wrong, limit = (high, self.longest) if high > self.longest else (low, shortest)
                examples = "passkey prompts" if self.data.mix is None else "examples"
                raise InputError(
                    f"{name}.lengths: {wrong} is longer than train_length {limit}; {examples} are mixed into the text: "
                    f"give lengths of at most {limit} there, or fraction 0 beside them for the text alone"
                )

    @property
    def stages(self) -> list[Stage]:
        """The stages of the schedule; without one, the only stage."""
        length = self.train_length
        return (
            _stages(length, self.batch_size)
            if isinstance(length, str)
            else [Stage(length, self.steps, self.batch_size)]
        )

    @property
    def longest(self) -> int:
        """The longest stream of the run, in tokens."""
        return max(stage.length for stage in self.stages)

    @property
    def fewest_rows(self) -> int:
        """The fewest rows of a stage: so many of the longest streams fit where the run does."""
        return min(stage.rows for stage in self.stages)

    def at(self, stage: int) -> TrainConfig:
        """Return the config of one stage: its length and rows alone, no segments and no examples longer than that."""
        if len(self.stages) == 1 and isinstance(self.train_length, int):
            return self
        length, steps, rows = self.stages[stage]
        passing = self.passing and replace(self.passing, segment=min(length, self.passing.segment))
        parts: dict[str, Any] = {"data": self.data.within(length), "passing": passing}
        return replace(self, train_length=length, steps=steps, batch_size=rows, **parts)


def spelled_out(settings: Sequence[str]) -> list[str]:
    """Settings of the command line with two short forms written out: `model=demo` is a checkpoint to start from
    (`init`), and its shape the model's; `data=texts/` is what to train on (`data.text`), the rest of `data` stays."""
    written = []
    for item in settings:
        key, equals, value = (piece.strip() for piece in item.partition("="))
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = None  # whoever reads the settings says so
        if key == "model" and isinstance(parsed, str):
            written += ["model=null", f"init{equals}{value}"]
        elif key == "data" and isinstance(parsed, str | list):
            written.append(f"data.text{equals}{value}")
        else:
            written.append(item)
    return written


def _check_weight(weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise InputError(f"answer_weight: expected 0 or more, got {weight}")


def _stages(schedule: str, rows: int) -> list[Stage]:
    """Read "4k:200,16k:300:8": a stage that does not say its rows has `rows`."""
    try:
        parts = [[*stage.split(":"), str(rows)][: max(3, stage.count(":") + 1)] for stage in schedule.split(",")]
        return [Stage(parse_length(length), parse_length(steps), parse_length(some)) for length, steps, some in parts]
    except ValueError:  # of an InputError, or of parts that are neither two nor three
        expected = "expected a length, or tokens:steps (or tokens:steps:rows) of each stage as in 4k:200,16k:300:8"
        raise InputError(f"train_length: {expected}, got {schedule!r}") from None
