"""What a study of state capacity is made of (see configs/capacity/small.yaml) and the cells it consists of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity.recall import samples_for
from rnn_longctx.eval.jobs.parsing import parse_recall
from rnn_longctx.eval.jobs.recall import Counts, Recall
from rnn_longctx.mitigations import parse_remedy
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.tasks.mqar import KINDS
from rnn_longctx.train import TrainConfig
from rnn_longctx.train.config import OptimizerConfig


@dataclass(frozen=True)
class MeasureConfig:
    """What is asked of every model."""

    limit: int = 1024**2  # tokens: of the test of forgetting, and the longest context that recall is searched to
    slices: int = 4  # of the text, in the test of forgetting; more at short lengths
    needles: list[str] = field(default_factory=lambda: ["passkey"])  # tasks of recall: passkey, words, multikey:keys=2
    recall: float = 0.95  # accuracy that T_recall asks for
    width: float = 0.06  # of the interval of an accuracy; says how many prompts a length takes
    mitigations: list[str] = field(default_factory=lambda: ["none"])
    text: str = "stdlib"
    batch: int = 32  # the most streams side by side
    seed: int = 0  # of the prompts

    def __post_init__(self) -> None:
        samples_for(self.width, self.recall)
        if self.limit < 2 or self.slices < 1 or self.batch < 1:
            raise InputError("limit must be at least 2 tokens, slices and batch at least 1")
        if self.seed < 0:
            raise InputError(f"seed: expected 0 or more, got {self.seed}")
        if not self.mitigations:
            raise InputError("mitigations: expected at least one, such as none")
        for name in self.mitigations:
            parse_remedy(name)
        self.tasks  # noqa: B018  (a misspelt name shows now)

    @property
    def tasks(self) -> list[Recall]:
        """The jobs that `needles` names, with as many prompts as `width` asks for."""
        jobs, n = [], samples_for(self.width, self.recall)
        for needle in self.needles:
            try:
                job = parse_recall(needle)
            except InputError as error:
                raise InputError(f"needles: {error}") from None
            if replace(job.counts, max=None) != Counts():
                raise InputError(f"needles: {job}: width says how many prompts; leave out n, least and tokens")
            jobs.append(replace(job, counts=replace(job.counts, n=n, least=n)))
        return jobs


@dataclass(frozen=True)
class MQARConfig:
    """Multi-query associative recall: one model a shape and task, trained on all numbers of pairs together."""

    tasks: list[str] = field(default_factory=lambda: [*KINDS])
    pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    vocab_size: int = 512  # half of it keys, half values
    batch_size: int = 128
    steps: int = 1000
    lr: float = 3e-3
    samples: int = 256  # sequences measured, at every number of pairs
    seeds: int = 1

    def __post_init__(self) -> None:
        if not self.tasks or set(self.tasks) - set(KINDS):
            raise InputError(f"tasks: expected some of {', '.join(KINDS)}, got {self.tasks}")
        if not self.pairs or min(self.pairs) < 1 or max(self.pairs) > self.vocab_size // 2:
            raise InputError(f"pairs: expected numbers of 1 to {self.vocab_size // 2} (half of vocab_size)")
        if min(self.batch_size, self.steps, self.samples, self.seeds) < 1:
            raise InputError("batch_size, steps, samples and seeds must be at least 1")
        OptimizerConfig(lr=self.lr)  # can be trained at


@dataclass(frozen=True)
class PretrainConfig:
    """What all models of a shape and seed go on from: trained on short windows, as language models are."""

    train_length: int = 512  # tokens
    batch_size: int = 32
    steps: int = 1600
    lr: float = 3e-3


@dataclass(frozen=True)
class CapacityConfig:
    """A family of models: `train` at other shapes, training lengths and seeds.

    Every model reads as many tokens as `train` says: batch_size * train_length a step. Its passkey prompts end at the
    same share of the training length. With `pretrain`, all of a shape and seed go on from one model.
    """

    train: TrainConfig
    shapes: list[dict[str, int]]  # fields of train.model that differ
    train_lengths: list[int]  # tokens
    seeds: int = 3  # of the models at which the outcome turns, and of the longest
    pretrain: PretrainConfig | None = None
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    mqar: MQARConfig | None = None
    out: str = "runs/study"

    def __post_init__(self) -> None:
        if not self.shapes or not self.train_lengths or self.seeds < 1:
            raise InputError("a study needs at least one of shapes, train_lengths and seeds")
        if self.train.model is None or self.train.init is not None or len(self.train.stages) > 1:
            raise InputError("train: expected a model of its own and one training length")
        if (longest := max(self.train_lengths)) >= self.measure.limit:  # any model would pass
            raise InputError(
                f"train_lengths: {longest} leaves nothing to read up to measure.limit {self.measure.limit}"
            )
        if "none" not in self.measure.mitigations:
            raise InputError("measure.mitigations: the search for T_forget goes by none, which is missing")
        for shape in self.shapes:
            self.model(shape)
        if len({label(self.model(shape)) for shape in self.shapes}) < len(self.shapes):
            raise InputError("shapes: one is given twice")
        for length in self.train_lengths:
            self.training(StudyCell(self.model(self.shapes[0]), length, 0), "")
        if self.pretrain is not None:
            self.training(self.start_of(StudyCell(self.model(self.shapes[0]), 0, 0)), "")

    def model(self, shape: dict[str, int]) -> Mamba2Config:
        unknown = sorted(set(shape) - set(asdict(Mamba2Config())))
        if unknown:
            raise InputError(f"shapes: a model has no {', '.join(unknown)}")
        if not isinstance(self.train.model, Mamba2Config):
            raise InputError("train.model: a study's shapes are those of Mamba-2, and this model names another mixer")
        return replace(self.train.model, **shape)  # type: ignore[arg-type]

    @cached_property
    def models(self) -> list[Mamba2Config]:
        """The shapes, smallest state first."""
        return sorted(map(self.model, self.shapes), key=lambda m: m.scan_state_elements + m.conv_state_elements)

    def start_of(self, cell: StudyCell) -> StudyCell:
        """What `cell` goes on from; only with `pretrain`."""
        assert self.pretrain is not None
        return replace(cell, train_length=self.pretrain.train_length, task="pretrain")

    def training(self, cell: StudyCell, out: str) -> TrainConfig:
        base, length = self.train, cell.train_length
        rows = None
        if cell.task == "pretrain":
            assert self.pretrain is not None
            optimizer, rows = replace(base.optimizer, lr=self.pretrain.lr), self.pretrain.batch_size
            base = replace(base, steps=self.pretrain.steps, optimizer=optimizer)
        assert isinstance(base.train_length, int)
        rows = rows or (round(base.batch_size * base.train_length / length) if length > 0 else 0)
        if rows < 1:
            raise InputError(f"train_lengths: {length} is none, or more than train's batch_size * train_length tokens")
        data, passkey = base.data, base.data.passkey
        if passkey is not None:
            high = length * passkey.lengths[1] // base.train_length
            if high < 1:
                raise InputError(f"train_lengths: {length} is too short for passkey prompts (train.data.passkey)")
            data = replace(data, passkey=replace(passkey, lengths=(min(passkey.lengths[0], high), high)))
        return replace(base, model=cell.model, train_length=length, batch_size=rows, seed=cell.seed, data=data, out=out)

    def mqar_cells(self) -> list[StudyCell]:
        if self.mqar is None:
            return []
        return [StudyCell(m, 0, s, t) for t in self.mqar.tasks for m in self.models for s in range(self.mqar.seeds)]

    def find(self, name: str) -> StudyCell:
        """The cell of that name. Raises InputError: there is none."""
        lengths, seeds = self.train_lengths, range(self.seeds)
        text = (StudyCell(m, n, s) for m in self.models for n in lengths for s in seeds)
        first = [StudyCell(m, 0, s) for m in self.models for s in seeds if self.pretrain is not None]
        for cell in [*text, *map(self.start_of, first), *self.mqar_cells()]:
            if cell.name == name:
                return cell
        raise InputError(f"this study has no cell {name}")


@dataclass(frozen=True)
class StudyCell:
    """One model to train and measure; train_length 0 where `task` is not text."""

    model: Mamba2Config
    train_length: int
    seed: int
    task: str = "text"

    @property
    def name(self) -> str:
        """Also that of the model in every table."""
        what = f"T{self.train_length}" if self.task == "text" else self.task
        return f"{label(self.model)}-{what}-s{self.seed}"


def label(m: Mamba2Config) -> str:
    """A shape in a word: d128-L4-N16, with what else is not usual."""
    usual: dict[str, Any] = asdict(Mamba2Config())
    short = {"headdim": "P", "expand": "E", "ngroups": "G", "d_conv": "K"}
    more = "".join(f"-{s}{getattr(m, k)}" for k, s in short.items() if getattr(m, k) != usual[k])
    return f"d{m.d_model}-L{m.n_layer}-N{m.d_state}{more}"
