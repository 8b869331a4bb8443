"""`retrofit`: a decoder of transformers whose attention is replaced, in stages of growing length.

The decoder is read, its teacher is a copy of it (or another decoder of the same vocabulary), its attention is replaced
where a plan says so, and it is trained on batches that are a function of the seed and the step. The folder is written
at the end, whole or not at all.
"""

from __future__ import annotations

import copy
import csv
import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rnn_longctx.config import format_length
from rnn_longctx.devices import device_of
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.measure.heads import HeadReach, Lens, reach_of_heads
from rnn_longctx.measure.stream import tail_loss
from rnn_longctx.models.retrofit.files import check_new, load_retrofitted, save_retrofitted
from rnn_longctx.models.retrofit.model import Retrofitted
from rnn_longctx.models.retrofit.parts import settings_of
from rnn_longctx.models.retrofit.plan import Plan, convert, plan_of
from rnn_longctx.plain import guarded
from rnn_longctx.progress import Say, to_stdout
from rnn_longctx.train.config import DataConfig, MixedTask, OptimizerConfig, ScheduleConfig, TrainConfig
from rnn_longctx.train.corpus import Corpus, load_corpus
from rnn_longctx.train.distill import LOSSES, OF_TEACHER, losses_of
from rnn_longctx.train.evaluation import examples_of, recall
from rnn_longctx.train.loop import TrainingDiverged
from rnn_longctx.train.mix import check_mix, measured_task
from rnn_longctx.train.optimizer import learning_rate, make_optimizer

BAD_STEPS = 20  # in a row, whose gradient is not finite
WINDOWS = 16  # of held-out text that losses are measured on; a quarter of them for the reach of heads
ANSWERS = 100  # examples that a task is measured on
SHORTEST = 64  # tokens of an example of a task, where a stage is longer than that


@dataclass(frozen=True)
class RetrofitConfig:
    """What is replaced by what, and how it is taught.

    Attributes:
        model, out: a decoder of transformers, and a new folder.
        mixer: a text such as block-sparse:block=16,top=4 (`rnn_longctx.models.retrofit.parts`).
        layers, heads: such as 0,2-5, or all.
        full_above: heads of which the mixer would miss more than this share of their weight stay full attention.
        distill: whether it is taught by a teacher; else by the text's own loss.
        teacher: another decoder than the model itself.
        text, tasks: what is read; tasks are mixed in, in `task_share` of the rows. Neither: nothing is trained.
        stages: lengths in tokens, each longer than the one before.
        steps: updates of each stage, 0: none; batch: tokens of an update, at least one row.
        losses: of `rnn_longctx.train.distill`; (): gate, hidden and logits with a teacher, lm without one.
        trains: the new weights alone, those of retrofitted layers' attention, or all.
    """

    model: str
    mixer: str
    out: str
    layers: str = "all"
    heads: str = "all"
    full_above: float | None = None
    distill: bool = False
    teacher: str | None = None
    text: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_share: float = 0.5
    stages: tuple[int, ...] = (2048,)
    steps: int = 200
    batch: int = 8192
    lr: float = 1e-3
    losses: tuple[str, ...] = ()
    trains: Literal["new", "attention", "all"] = "attention"
    tokenizer: str | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value in [("--out", self.out), ("--teacher", self.teacher), *(("--text", t) for t in self.text)]:
            if value is not None and not value.strip():
                raise InputError(f"{option}: expected a name, got {value!r}")
        if any(a >= b for a, b in zip(self.stages, self.stages[1:])) or min(self.stages, default=0) < 2:
            lengths = ",".join(map(format_length, self.stages))
            raise InputError(f"--stages: each stage is longer than the one before, as in 2k,8k,32k, got {lengths}")
        if self.distill and not (self.text or self.tasks):
            raise InputError("--distill: what is the teacher to read? Name a text with --text, or a task with --task")
        if self.teacher is not None and not self.distill:
            raise InputError("--teacher: goes with --distill")
        if self.full_above is not None and not (self.text or self.tasks):
            raise InputError("--full-above: the reach of heads is measured on a text: name one with --text")
        if self.full_above is not None and not 0 <= self.full_above <= 1:
            raise InputError(f"--full-above: expected a share from 0 to 1, got {self.full_above:g}")
        if self.steps < 0 or self.batch < 1 or not 0 < self.lr < math.inf:
            raise InputError("--batch and --lr are above 0, and --steps at least 0")
        for name in self.losses:
            if name not in LOSSES:
                raise InputError(f"--losses: unknown loss {name!r}{nearest(name, LOSSES)}")
            if name in OF_TEACHER and not self.distill:
                raise InputError(f"--losses: {name} compares with a teacher: add --distill")

    @property
    def wanted(self) -> tuple[str, ...]:
        return self.losses or (OF_TEACHER if self.distill else ("lm",))


@dataclass(frozen=True)
class Done:
    """What a retrofit gave.

    Attributes:
        before, after: the reach of every head, where a text was read.
        measured: at each stage's length, and the longest first: loss and loss_of_original on held-out text, and, with a
            task, right and right_of_original, shares of its examples; of another teacher than the original, the same.
    """

    model: Retrofitted
    plan: Plan
    before: list[HeadReach]
    after: list[HeadReach]
    measured: dict[int, dict[str, float]]


def retrofit(config: RetrofitConfig, say: Say = to_stdout) -> Done:
    """Replace the attention of a decoder, train what is to be trained, and write it into a new folder.

    Raises:
        InputError: what is asked for does not fit the model, the teacher or the text, nothing would be replaced or
            learned, or the folder exists or cannot be made.
        TrainingDiverged: gradients were not finite over and over.
    """
    check_new(config.out)
    original = load_retrofitted(config.model, device=device_of(config.device), tokenizer=config.tokenizer)
    plan = plan_of(original.model, config.mixer, config.layers, config.heads)
    if original.retrofitted:
        raise InputError(f"{original.name} is retrofitted already: begin with the decoder that it was")
    teacher = _teacher(config, original)
    data, corpus = _corpus(config, original)
    before: list[HeadReach] = []
    lens = Lens.of(settings_of(config.mixer))
    if corpus is not None:
        before = reach_of_heads(original, _windows(corpus, config.stages[-1], WINDOWS // 4), lens)
        if config.full_above is not None:
            plan = _left(spared(plan, before, config.full_above), before, config.full_above)
    student = _converted(original, plan, config)
    measured: dict[int, dict[str, float]] = {}
    log: list[dict[str, Any]] = []
    after: list[HeadReach] = []
    longest = 0
    if corpus is not None and data is not None:
        log, longest = _train(student, teacher, config, data, corpus, say)
        after = reach_of_heads(student, _windows(corpus, config.stages[-1], WINDOWS // 4), lens)
        for length in reversed(config.stages):
            measured[length] = _measured(student, original, teacher, config, data, corpus, length)
            say(_line(length, measured[length]))
    if longest:
        student.train_length = max(longest, original.train_length or 0)
    else:
        say("nothing is trained")
    distilled = longest > 0 and not {*OF_TEACHER}.isdisjoint(config.wanted)
    provenance = {"retrofitted": original.name, "mixer": config.mixer, "distilled": distilled}
    save_retrofitted(student, plan, config.out, provenance, _tables(before, after, log))
    return Done(student, plan, before, after, measured)


def spared(plan: Plan, reach: list[HeadReach], most: float) -> Plan:
    """Return a plan without the heads that miss more than a share of their weight, and without layers that it then
    has no mixer for."""
    stays = {(r.layer, r.head) for r in reach if r.missed > most}
    layers = {}
    for layer, mixers in plan.layers.items():
        left = ((text, tuple(h for h in heads if (layer, h) not in stays)) for text, heads in mixers)
        if kept := tuple((text, heads) for text, heads in left if heads):
            layers[layer] = kept
    return Plan(layers)


def _left(plan: Plan, reach: list[HeadReach], most: float) -> Plan:
    """Return a plan. Raises InputError for one that `spared` left nothing of."""
    if not plan.layers:
        raise InputError(
            f"--full-above {most:g}: nothing is left to replace: the mixer would miss more of every chosen "
            f"head's weight (of all heads {min(r.missed for r in reach):.2g} to {max(r.missed for r in reach):.2g})"
        )
    return plan


def _teacher(config: RetrofitConfig, original: Retrofitted) -> Retrofitted | None:
    """Return the teacher, whose weights are not trained. Raises InputError for one that does not fit."""
    if not config.distill or config.teacher is None:
        return original if config.distill else None
    try:
        teacher = load_retrofitted(config.teacher, device=original.device, tokenizer=config.tokenizer)
    except InputError as error:
        raise InputError(f"--teacher: {error}") from None
    if teacher.vocab_size != original.vocab_size:
        raise InputError(
            f"the teacher {teacher.name} has a vocabulary of {teacher.vocab_size} tokens, and {original.name} one of "
            f"{original.vocab_size}: what they say is compared token by token"
        )
    if teacher.retrofitted:
        raise InputError(f"the teacher {teacher.name} is retrofitted itself: name a decoder with full attention")
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if {"gate", "hidden"} & {*config.wanted} and any(
        getattr(teacher.config, name) != getattr(original.config, name) for name in same
    ):
        raise InputError(
            f"the teacher {teacher.name} is of another shape than {original.name}: gates and hidden states cannot be "
            "compared; --losses logits can"
        )
    return teacher


def _converted(original: Retrofitted, plan: Plan, config: RetrofitConfig) -> Retrofitted:
    student = Retrofitted(convert(copy.deepcopy(original.model), plan, config.seed))
    student.name, student.tokenizer = Path(config.out).name, original.tokenizer
    student.train_length = original.train_length
    return student


def _corpus(config: RetrofitConfig, model: Retrofitted) -> tuple[TrainConfig | None, Corpus | None]:
    """Return what is read, as training reads it; None where nothing is. Raises InputError for texts and tasks that do
    not fit the model and the stages."""
    if not (config.text or config.tasks):
        return None, None
    first, last = config.stages[0], config.stages[-1]
    share = (config.task_share if config.text else 1.0) / max(1, len(config.tasks))
    mixed = [MixedTask(task, share, (min(SHORTEST, first), last), True) for task in config.tasks]
    texts: list[Any] = list(config.text or ["builtin"])  # (between examples of tasks some text must stand)
    data = DataConfig(text=texts, held_out=0.05, mix=[m.within(first) for m in mixed])
    check_mix(data, model.tokenizer, model.vocab_size)
    train = TrainConfig(
        init=config.model, data=replace(data, mix=mixed) if mixed else data, train_length=last, seed=config.seed
    )
    return train, load_corpus(train.data, model.tokenizer, last)


def _train(
    student: Retrofitted,
    teacher: Retrofitted | None,
    config: RetrofitConfig,
    data: TrainConfig,
    corpus: Corpus,
    say: Say,
) -> tuple[list[dict[str, Any]], int]:
    """Train stage by stage, and return a row an update, and at what length weights were last moved (0: nowhere).
    Dropout is off, as it is in the teacher."""
    if not config.steps:
        return [], 0
    trained = _trained(student, config.trains)
    _check_learns(student, teacher, config, corpus.batch(_stage(data, config, 0), 0).ids[:1], trained)
    total, log, bad, began = config.steps * len(config.stages), [], 0, time.monotonic()
    longest = 0
    schedule = ScheduleConfig(warmup=min(20, total // 10))
    optimizer = make_optimizer(student.model, OptimizerConfig(lr=config.lr, weight_decay=0.0))
    for number, length in enumerate(config.stages):
        stage = _stage(data, config, number)
        for step in range(number * config.steps, (number + 1) * config.steps):
            rng = np.random.default_rng([config.seed, step, 7])
            ids = corpus.batch(stage, step).ids.to(student.device)
            losses = losses_of(student, teacher, ids, config.wanted, rng)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate(schedule, step, total)
            optimizer.zero_grad(set_to_none=True)
            if learned := [loss for loss in losses.values() if loss.requires_grad]:  # (none: a stretch without choices)
                torch.stack(learned).sum().backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
                bad = 0 if bool(norm.isfinite()) else bad + 1
                if bad == BAD_STEPS:
                    raise TrainingDiverged(f"gradients of {BAD_STEPS} updates in a row were not finite: lower --lr")
                if not bad:
                    optimizer.step()
                    longest = length
            row = {"step": step + 1, "length": length, **{name: loss.item() for name, loss in losses.items()}}
            log.append(row)
            if (step + 1) % max(1, config.steps // 4) == 0:
                shown = " ".join(f"{name} {row[name]:.4g}" for name in losses) or "no block to choose"
                say(f"step {step + 1}/{total} at {format_length(length)}: {shown}, {time.monotonic() - began:.0f} s")
    for p in student.parameters():
        p.requires_grad_(True)
    return log, longest


def _stage(data: TrainConfig, config: RetrofitConfig, number: int) -> TrainConfig:
    """Return what a stage reads."""
    length = config.stages[number]
    rows = max(1, config.batch // length)
    return replace(data, train_length=length, batch_size=rows, data=data.data.within(length))


def _check_learns(
    student: Retrofitted,
    teacher: Retrofitted | None,
    config: RetrofitConfig,
    ids: Tensor,
    trained: list[torch.nn.Parameter],
) -> None:
    """Raise InputError where no wanted loss reaches a weight that is trained, at the shortest stage. (What a longer one
    has to choose from holds what a shorter one has.)"""
    if not trained:
        raise InputError(
            f"--trains {config.trains}: {config.mixer} has no new weights: --trains attention, or --steps 0"
        )
    losses = losses_of(student, teacher, ids.to(student.device), config.wanted)
    if any(loss.requires_grad for loss in losses.values()):
        return
    wanted, length = ",".join(config.wanted), format_length(config.stages[0])
    raise InputError(
        f"--losses {wanted} moves no weight of --trains {config.trains} with {config.mixer} at {length} tokens: a gate "
        "learns by --distill from the gate loss alone, where a context has blocks to choose from beyond window and "
        "sinks; longnet and recurrences have no gate"
    )


def _trained(student: Retrofitted, which: str) -> list[torch.nn.Parameter]:
    """Return the weights that are to be trained; the others take no gradients."""
    for p in student.parameters():
        p.requires_grad_(which == "all")
    for attention in student.retrofitted if which != "all" else ():
        for p in (attention.parts if which == "new" else attention).parameters():
            p.requires_grad_(True)
    return [p for p in student.parameters() if p.requires_grad]


def _windows(corpus: Corpus, length: int, most: int) -> Iterator[Tensor]:
    """Yield contexts (1, length) of held-out text."""
    for ids in corpus.validation(length, 1, most):
        yield ids[:, :-1]


def _measured(
    student: Retrofitted,
    original: Retrofitted,
    teacher: Retrofitted | None,
    config: RetrofitConfig,
    data: TrainConfig,
    corpus: Corpus,
    length: int,
) -> dict[str, float]:
    """Return what the student, the original, and a teacher that is another one say of held-out text and of a task's
    examples."""
    row: dict[str, float] = {}
    models = [("", student), ("_of_original", original)]
    if teacher is not None and teacher is not original:
        models.append(("_of_teacher", teacher))
    if windows := list(corpus.validation(length, 1, WINDOWS)):
        for end, model in models:
            row[f"loss{end}"] = float(torch.cat([tail_loss(model, ids) for ids in windows]).mean())
    if config.tasks:
        task = measured_task(data.data.mixed)
        examples = examples_of(task, corpus.tokenizer, length, ANSWERS, config.seed)
        for end, model in models:
            row[f"right{end}"] = recall(model, task, examples, corpus.tokenizer, 1, torch.no_grad)
    return row


def _line(length: int, row: dict[str, float]) -> str:
    others = [name for name in ("original", "teacher") if {f"loss_of_{name}", f"right_of_{name}"} & row.keys()]
    text = f"at {format_length(length)}:"
    if "loss" in row:
        text += f" held-out loss {row['loss']:.4f}"
        for name in others:
            loss = row[f"loss_of_{name}"]
            text += f", the {name}'s {loss:.4f} ({row['loss'] / loss - 1:+.1%})"
    if "right" in row:
        text += f"; right {row['right']:.2f}" + "".join(
            f", the {name} {row[f'right_of_{name}']:.2f}" for name in others
        )
    return text


def _tables(before: list[HeadReach], after: list[HeadReach], log: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return reach.csv and log.csv, where there is something to say."""
    reach = [{"when": when, **r.row()} for when, rows in (("before", before), ("after", after)) for r in rows]
    tables = {}
    for name, rows in (("reach.csv", reach), ("log.csv", log)):
        if rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else guarded(v) for k, v in row.items()} for row in rows
            )
            tables[name] = text.getvalue().encode()
    return tables
