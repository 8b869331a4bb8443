"""What can be tuned is a problem: its settings, how one is measured, and how two of them are compared."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rnn_longctx.eval.tune.space import Space
from rnn_longctx.progress import Say

PROBLEM = "problem.json"


@dataclass(frozen=True)
class Outcome:
    """What is measured of a setting on the data that the search may see.

    Attributes:
        value: the least is searched: the loss in nats a token, or 1 - recall where no text is learned.
        recall: the mean share of answers that are right; no candidate may have less than the default.
        about: numbers that are shown beside it.
        fault: how training diverged, or nothing.
    """

    value: float
    recall: float
    about: dict[str, float] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Held:
    """One measurement of a setting on held-out data, of one seed.

    Attributes:
        metric: "loss" or "recall".
        what: the text or the task.
        length: tokens.
    """

    metric: str
    what: str
    length: int
    value: float


class Problem(Protocol):
    """Settings are texts, `name:key=value,...`. A trial runs in a process of its own, which makes the problem again
    from `described`."""

    kind: ClassVar[str]

    @property
    def space(self) -> Space: ...

    @property
    def device(self) -> str: ...

    @property
    def seeds(self) -> int:
        """Of the comparison."""

    @property
    def metric(self) -> str:
        """What is searched for and judged by: "loss" or "recall"."""

    @property
    def comparison(self) -> float:
        """How many trials' time the comparison takes."""

    @property
    def warmup(self) -> int:
        """The step before which no trial is pruned."""

    def described(self) -> dict[str, Any]: ...

    def check(self, setting: str) -> None:
        """Raise InputError for a setting that cannot be had, before anything is measured."""

    def measure(self, setting: str, folder: Path) -> Outcome:
        """Measure a setting, going on where a killed process stopped."""

    def reports(self, folder: Path) -> dict[int, float]:
        """Return what `measure` has found so far: values, the less the better, by steps in ascending order."""

    def tidy(self, folder: Path) -> None:
        """Remove what is not needed of a trial that has ended."""

    def compare(self, settings: Sequence[str], out: Path, say: Say) -> dict[str, list[list[Held]]]:
        """Return the held-out measurements of settings, a list a seed, and of what else it is worth to compare with."""


def table_of(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file that a trial is writing, but for a last line that is not whole."""
    text = file.read_text() if file.exists() else ""
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def folder_of(out: Path, setting: str) -> Path:
    return out / "trials" / short(setting)


def short(setting: str) -> str:
    return hashlib.blake2b(setting.encode(), digest_size=5).hexdigest()


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def plain(value: Any) -> Any:
    """Return what JSON makes of it."""
    return json.loads(json.dumps(value))
