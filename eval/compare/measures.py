"""What is measured of a model that a comparison has trained.

A measurement is a dataclass of its settings with two methods, and a field of `MeasureConfig`: `check`, which says what
cannot be measured before anything is trained, and `rows`, which measures. What is swept is none of its business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from rnn_longctx.config import format_length
from rnn_longctx.data import Tokenizer, load_text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.compare.timing import NO_MEMORY, is_out_of_memory, model_rows
from rnn_longctx.eval.jobs.base import Job
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.jobs.parsing import parse_recall
from rnn_longctx.eval.run import evaluate
from rnn_longctx.eval.tables.compare import control
from rnn_longctx.mitigations import REMEDIES, mitigate, parse_remedy
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.probes.probe import Probe, probe

Row = dict[str, Any]  # metric, mitigation, task, text, length, depth, value, n, samples, note

_METRICS = {"nats_per_token": "loss", "nats_per_token_peak": "loss_peak", "accuracy": "accuracy"}


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        longest: tokens; nothing longer is read.
        results: the folder of `rnn_longctx.eval.results`, in which a measurement that was killed goes on.
        batch: the most streams side by side.
    """

    model: LanguageModel
    longest: int
    results: Path
    batch: int

    @property
    def train_length(self) -> int:
        assert self.model.train_length is not None
        return self.model.train_length

    def within(self, lengths: Sequence[int]) -> list[int]:
        return [length for length in lengths if length <= self.longest]

    def evaluated(
        self, lengths: Sequence[int], jobs: Sequence[Job], remedies: Sequence[str], texts: Sequence[str] = ("builtin",)
    ) -> Iterator[Row]:
        """Yield the rows of an evaluation at those of the lengths that are read; texts: of losses."""
        if not (lengths := self.within(lengths)):
            return
        out, batch = str(self.results), self.batch
        frame = evaluate(self.model, lengths, jobs, remedies, text=list(texts), out=out, batch=batch)
        asked = {tuple(setting) for setting in frame.attrs["asked"]["settings"]}
        for row in frame.astype(object).where(frame.notna(), None).to_dict("records"):
            setting = row["mitigation"], row["task"], row["length"]
            if setting in asked and row["metric"] in _METRICS:
                metric = _METRICS[row["metric"]] if row["depth"] is None else "recovery"
                text = row["text"] if row["metric"] != "accuracy" else ""
                of = {"mitigation": row["mitigation"], "task": row["task"], "text": text}
                of |= {"length": row["length"], "depth": row["depth"]}
                yield row_of(metric, row["value"], samples=row["samples"], **of)


def row_of(metric: str, value: float | None, samples: Sequence[float] = (), note: str = "", **of: Any) -> Row:
    """Return a row; a value of None is none. of: mitigation, task, text, length, depth."""
    blank: Row = {"mitigation": "none", "task": "", "text": "", "length": None, "depth": None}
    number = math.nan if value is None else float(value)
    return {"metric": metric, **blank, **of, "value": number, "samples": [float(s) for s in samples], "note": note}


class Measurement(Protocol):
    """See the module."""

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None: ...
    def rows(self, subject: Subject) -> Iterator[Row]: ...


@dataclass(frozen=True)
class LossConfig:
    """Loss of texts over length, without a remedy and under `recompute:last` of the training length.

    Attributes:
        slices: at least so many of a text at every length; tokens: more of them at short ones, as long as slices times
            length stays below.
    """

    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192, 32768, 131072, 1048576])
    texts: list[str] = field(default_factory=lambda: ["stdlib"])
    slices: int = 4
    tokens: int = 256 * 1024

    def __post_init__(self) -> None:
        ascending("lengths", self.lengths)
        if not self.texts:
            raise InputError("texts: expected at least one, such as stdlib")
        self.job  # noqa: B018  (is checked when made)

    @property
    def job(self) -> LossOverLength:
        return LossOverLength(slices=self.slices, tokens=self.tokens)

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        long_enough("loss", self.texts, self.lengths[-1])

    def rows(self, subject: Subject) -> Iterator[Row]:
        remedies = ["none", control(subject.train_length)]
        yield from subject.evaluated(self.lengths, [self.job], remedies, self.texts)

    def forgetting(self, subject: Subject) -> Iterator[Row]:
        """Yield what the test of forgetting takes: the loss of the first text, without a remedy, beyond the training
        length."""
        lengths = [length for length in self.lengths if length >= subject.train_length]
        yield from subject.evaluated(lengths, [self.job], ["none"], self.texts[:1])


@dataclass(frozen=True)
class RecallConfig:
    """The share of answers that are right, of tasks of `rnn_longctx.tasks` with how many examples are asked."""

    tasks: list[str] = field(default_factory=lambda: ["passkey:n=50", "mqar:pairs=8,vocab_size=256,n=50"])
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 8192])

    def __post_init__(self) -> None:
        ascending("lengths", self.lengths)
        if not self.tasks:
            raise InputError("tasks: expected at least one, such as passkey")
        labels = [job.label for job in self.jobs]
        for task, label in zip(self.tasks, labels):
            if labels.count(label) > 1:
                raise InputError(f"tasks: {task} and another have one name, {label}: ask them in two comparisons")

    @property
    def jobs(self) -> list[Job]:
        try:
            return [parse_recall(task) for task in self.tasks]
        except InputError as error:
            raise InputError(f"tasks: {error}") from None

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        for task in self.tasks:
            job = parse_recall(task)
            try:
                job.task.check(self.lengths[0], job.counts.at(self.lengths[0]), 0, tokenizer)
            except InputError as error:
                raise InputError(f"measure.recall: {error}") from None
            if job.task.vocab_size is not None and job.task.vocab_size > vocab_size:
                raise InputError(f"measure.recall: {task} has {job.task.vocab_size} ids, and the models {vocab_size}")

    def rows(self, subject: Subject) -> Iterator[Row]:
        yield from subject.evaluated(self.lengths, self.jobs, ["none"])
        for task in (parse_recall(text).task for text in self.tasks):
            if task.chance is not None:
                yield row_of("chance", task.chance, task=task.label)


@dataclass(frozen=True)
class ProbeConfig:
    """Which heads leave the range of their training, and how the norms of states grow, while one text is read.

    Attributes:
        remedies: as of `rnn-longctx eval --mitigation`; the same is seen again under each.
    """

    length: int = 32768  # tokens
    every: int = 256  # tokens between two looks at the states
    text: str = "stdlib"
    remedies: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 1 <= self.every <= self.length:
            raise InputError(f"every: expected 1 to {self.length} tokens, got {self.every}")
        check_remedies("remedies", self.remedies)

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        long_enough("probe", [self.text], self.length)

    def rows(self, subject: Subject) -> Iterator[Row]:
        for remedy in dict.fromkeys(["none", *self.remedies]):
            yield from self._rows(subject, remedy)

    def _rows(self, subject: Subject, remedy: str) -> Iterator[Row]:
        length = min(self.length, subject.longest)
        of: Row = {"mitigation": str(parse_remedy(remedy)), "task": "probe", "text": self.text, "length": length}
        every = min(self.every, subject.train_length)
        try:
            with mitigate(subject.model, remedy, target_length=length):
                seen = probe(subject.model, load_text(self.text), length, every=every)
        except InputError as error:
            yield row_of("not_applicable", None, note=str(error), **of)
            return
        left = seen.heads[seen.heads["onset"].notna()]
        yield row_of("heads", len(seen.heads), **of)
        yield row_of("heads_left", len(left), note=seen.verdict, **of)
        yield row_of("onset", left["onset"].min() if len(left) else None, **of)
        yield row_of("worst_ratio", seen.heads["worst"].max(), **of)
        yield from _growth(seen, subject.train_length, of)


def _growth(seen: Probe, train_length: int, of: Row) -> Iterator[Row]:
    """Yield how the norm of a head's state grows from the training length on, in doublings of it: the geometric mean
    over heads, and the largest."""
    norms = seen.trace.pivot_table(index="position", columns=["layer", "head"], values="norm", dropna=False)
    within = norms.index[norms.index <= train_length]
    if not len(within):
        return
    base = norms.loc[within[-1]]
    length = int(within[-1])
    while length <= int(of["length"]):
        at = norms.index[norms.index <= length][-1]
        ratios = (norms.loc[at] / base)[base > 0]
        if len(ratios):
            mean = math.exp(sum(math.log(r) if r > 0 else -math.inf for r in ratios) / len(ratios))
            yield row_of("state_growth", mean, **(of | {"length": int(at)}))
            yield row_of("state_growth_max", ratios.max(), **(of | {"length": int(at)}))
        length *= 2


@dataclass(frozen=True)
class RemedyConfig:
    """Every remedy that a model can take: its loss and recall. Those that it cannot are listed with the reason.

    Attributes:
        names: as of `rnn-longctx eval --mitigation`; "all" stands for every one of `REMEDIES` at its usual settings.
        lengths: of losses and of answers, in tokens.
        tasks: of recall.
    """

    names: list[str] = field(default_factory=lambda: ["all"])
    lengths: list[int] = field(default_factory=lambda: [512, 32768])
    texts: list[str] = field(default_factory=lambda: ["stdlib"])
    slices: int = 4
    tasks: list[str] = field(default_factory=lambda: ["passkey:n=20,max=8k"])

    def __post_init__(self) -> None:
        ascending("lengths", self.lengths)
        check_remedies("names", [name for name in self.names if name != "all"])
        if self.tasks:
            RecallConfig(self.tasks, self.lengths)

    @property
    def jobs(self) -> list[Job]:
        return [LossOverLength(slices=self.slices, tokens=0), *map(parse_recall, self.tasks)]

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        long_enough("remedies", self.texts, self.lengths[-1])
        if self.tasks:
            RecallConfig(self.tasks, self.lengths).check(tokenizer, vocab_size)

    def rows(self, subject: Subject) -> Iterator[Row]:
        yield from subject.evaluated(self.lengths, self.jobs, ["none"], self.texts)  # what remedies are set against
        for remedy in self.names:
            yield from _usual_rows(self, subject) if remedy == "all" else _remedy_rows(self, subject, remedy)


def _usual_rows(c: RemedyConfig, subject: Subject) -> Iterator[Row]:
    for kind in REMEDIES.values():
        settings = kind.usual(subject.train_length)
        if not settings:
            needed = ", ".join(f"{f.name}=..." for f in fields(kind))
            note = f"has no usual setting: name it with {kind.name}:{needed}"
            yield row_of("not_applicable", None, mitigation=kind.name, note=note)
        for remedy in settings:
            yield from _remedy_rows(c, subject, remedy)


def _remedy_rows(c: RemedyConfig, subject: Subject, remedy: str) -> Iterator[Row]:
    """Yield the rows of one remedy. One that the model or its recurrence cannot follow has one row, with the reason:
    all else that could be refused has been measured without a remedy."""
    try:
        rows = list(subject.evaluated(c.lengths, c.jobs, [remedy], c.texts))
    except InputError as error:
        rows = [row_of("not_applicable", None, mitigation=str(parse_remedy(remedy)), note=str(error))]
    yield from rows


@dataclass(frozen=True)
class CostsConfig:
    """Seconds, bytes and joules of reading one prompt of random tokens up to its first answer, and of a token after it.

    Attributes:
        lengths: of prompts, in tokens.
        tokens: how many are generated after each.
    """

    lengths: list[int] = field(default_factory=lambda: [512, 8192])
    tokens: int = 20

    def __post_init__(self) -> None:
        ascending("lengths", self.lengths)
        if self.tokens < 1:
            raise InputError(f"tokens: expected at least 1, got {self.tokens}")

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None: ...

    @torch.inference_mode()
    def rows(self, subject: Subject) -> Iterator[Row]:
        segment = SEGMENTS[subject.model.device.type]
        for length in subject.within(self.lengths):
            try:
                for row in model_rows(subject.model, length, min(segment, length), self.tokens):
                    token = {"prefill": "first_token", "decode": "next_token"}[row["what"]]
                    yield row_of(f"{token}_seconds", row["seconds"], length=length)
                    yield row_of(f"{token}_joules", row["joules"], length=length)
                    if row["what"] == "prefill":
                        for metric in ("tokens_per_second", "peak_bytes", "carry_bytes"):
                            yield row_of(metric, row[metric], length=length)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                yield row_of("first_token_seconds", None, length=length, note=NO_MEMORY)
                return


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured; null leaves a measurement out.

    Attributes:
        batch: the most streams side by side.
    """

    loss: LossConfig | None = field(default_factory=LossConfig)
    recall: RecallConfig | None = field(default_factory=RecallConfig)
    probe: ProbeConfig | None = field(default_factory=ProbeConfig)
    remedies: RemedyConfig | None = field(default_factory=RemedyConfig)
    costs: CostsConfig | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"batch: expected at least 1 stream, got {self.batch}")

    @property
    def measurements(self) -> dict[str, Measurement]:
        """The measurements that are made, by the names of the fields."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in named if value is not None and not isinstance(value, int)}

    @property
    def lengths(self) -> list[int]:
        """The lengths that are read."""
        sections = [section for section in (self.loss, self.recall, self.remedies, self.costs) if section is not None]
        lengths = [length for section in sections for length in section.lengths]
        return lengths + ([self.probe.length] if self.probe is not None else [])

    @property
    def texts(self) -> list[str]:
        """The texts that are measured on."""
        sections = [section for section in (self.loss, self.remedies) if section is not None]
        texts = [text for section in sections for text in section.texts]
        return list(dict.fromkeys([*texts, *([self.probe.text] if self.probe is not None else [])]))

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raise InputError for what cannot be measured, before anything is trained."""
        for measurement in self.measurements.values():
            measurement.check(tokenizer, vocab_size)


def measure(subject: Subject, c: MeasureConfig) -> list[Row]:
    """Return the rows of all measurements; of two with one key the first."""
    rows = [row for measurement in c.measurements.values() for row in measurement.rows(subject)]
    keys = ["metric", "mitigation", "task", "text", "length", "depth"]
    kept = pd.DataFrame(rows, columns=keys, dtype=object).drop_duplicates().index
    return [rows[i] for i in kept]


def check_remedies(name: str, remedies: Sequence[str]) -> None:
    """Raise InputError where one of the remedies is none."""
    for remedy in remedies:
        try:
            parse_remedy(remedy)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def ascending(name: str, lengths: Sequence[int]) -> None:
    """Raise InputError where lengths are none, or not in ascending order."""
    if not lengths:
        raise InputError(f"{name}: expected at least one length, such as 512")
    for before, after in zip(lengths, lengths[1:]):
        if after <= before:
            raise InputError(
                f"{name}: expected lengths in ascending order, got {format_length(after)} after {format_length(before)}"
            )


def long_enough(name: str, texts: Sequence[str], longest: int) -> None:
    """Raise InputError where a text has no `longest` tokens and one more: a token is at least a byte."""
    for spec in texts:
        text = load_text(spec)
        if len(text) <= longest:
            raise InputError(f"measure.{name}: {text.name} has {len(text)} bytes, and {longest} tokens are to be read")
