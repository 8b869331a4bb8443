"""What can be measured of a model (a job), and what a job works with: a model with a remedy on it, and results."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from rnn_longctx.data import Text, load_text
from rnn_longctx.devices import device_name, dtype_name
from rnn_longctx.eval.results import Results, Row
from rnn_longctx.eval.stats import mean_stderr
from rnn_longctx.eval.tables.sheets import Kind
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.precision import computes_as
from rnn_longctx.plain import plain
from rnn_longctx.plugins import digest
from rnn_longctx.spec import canonical
from rnn_longctx.version import __version__


@dataclass
class Measuring:
    """What a job works with.

    Attributes:
        mitigation, calibration: canonical texts of what is on the model.
        text: the text that losses are measured on, or its spec.
        batch: the most streams read side by side; segment: tokens read in one call, all streams together.
        progress: called with a number of tokens read.
        memory: what was made once (see `memo`); those that measure one model on several texts may share it.
    """

    model: LanguageModel
    mitigation: str = "none"
    calibration: str | None = None
    text: Text | str | Path = "stdlib"
    batch: int = 8
    segment: int = 4096
    seed: int = 0
    results: Results | None = None
    snapshot_seconds: float = 30.0
    progress: Callable[[int], None] = lambda tokens: None
    memory: dict[Any, Any] = field(default_factory=dict)

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what `make` gave at the first call: a text is loaded once for all remedies."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    @property
    def weights_hash(self) -> str:
        """The model's when it was first asked for: it is not to change while it is measured."""
        return self.memo("weights", lambda: self.model.weights_hash)

    @property
    def loaded_text(self) -> Text:
        """The text that losses are measured on."""
        text = self.text
        return text if isinstance(text, Text) else self.memo(("text", text), lambda: load_text(text))

    def key(
        self, label: str = "", text: Text | str = "", length: int = 0, metric: str = "", depth: float | None = None
    ) -> Row:
        """Return the key of a cell; without arguments, what all cells of this model and remedy share."""
        m = self.model
        rounded = {} if m.state_dtype is None else {"state_dtype": dtype_name(m.state_dtype)}
        plugins = {} if (text_of_plugins := digest()) is None else {"plugins": text_of_plugins}
        key = (
            rounded
            | plugins
            | {
                "model": m.name,
                "weights_hash": self.weights_hash,
                "mitigation": self.mitigation,
                "calibration": self.calibration,
                "task": label,
                "text": text if isinstance(text, str) else text.name,
                "text_hash": None if isinstance(text, str) else text.hash,
                "tokenizer": m.tokenizer.name,
                "length": length,
                "depth": depth,
                "metric": metric,
                "batch": self.batch,
                "dtype": computes_as(m),
                "backend": m.backend,
                "device": device_name(m.device),
                "seed": self.seed,
            }
        )
        return {column: plain(value) if isinstance(value, str) else value for column, value in key.items()}

    def row(self, key: Row, samples: Sequence[float], **cost: Any) -> Row:
        """Return a finished cell, the mean of its samples, which is stored at once."""
        value, stderr = mean_stderr(samples)
        row = key | {
            "value": value,
            "stderr": stderr,
            "n": len(samples),
            "samples": [float(s) for s in samples],
            "train_length": self.model.train_length,
            "version": __version__,
            **cost,
        }
        if self.results:
            self.results.put(row)
        return row

    def done(self, key: Row, n: int) -> bool:
        """Whether the cell is stored already, from as many samples or more: fewer would only be a part of them."""
        stored = self.results.get(key) if self.results else None
        return stored is not None and stored["n"] >= n

    def snapshot_name(self, *what: Any) -> str:
        """Return a name for the snapshots of a stream that no other model, remedy or text shares."""
        return hashlib.sha256(json.dumps([self.key(), what], sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Job(ABC):
    """Base of what can be measured. The fields of the dataclass are its parameters, `name:key=value,...`.

    Attributes:
        kind: of what is measured, a "loss" of a text or an "accuracy" of answers.
        one_pass: whether one pass gives all lengths; elsewhere each can be measured by itself.
    """

    kind: ClassVar[Kind]
    one_pass: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name on the command line."""

    @property
    def label(self) -> str:
        """The name that cells are filed under: jobs that ask for something else are called something else."""
        return self.name

    @property
    def reads_prompts(self) -> bool:
        """Whether it measures the answer to a whole prompt, however that is read: it then fits remedies that read a
        prompt in a way of their own."""
        return False

    def lengths(self, lengths: list[int], train_length: int | None) -> list[int]:
        """Return those of the lengths that this job measures."""
        longest = getattr(self, "max", None)
        return [n for n in lengths if longest is None or n <= longest]

    @abstractmethod
    def check(self, measuring: Measuring, lengths: list[int]) -> None:
        """Raise InputError for what cannot be measured, before anything is."""

    @abstractmethod
    def todo(self, measuring: Measuring, lengths: list[int]) -> list[int]:
        """Return those of the lengths whose cells are not stored yet."""

    @abstractmethod
    def cost(self, measuring: Measuring, lengths: list[int]) -> int:
        """Return the tokens that `run` is going to read, for the progress bar."""

    @abstractmethod
    def run(self, measuring: Measuring, lengths: list[int]) -> Iterator[Row]:
        """Measure and store the cells that are not stored yet, and yield them."""

    def __str__(self) -> str:
        return canonical(self.name, self)


def forget_peak(measuring: Measuring) -> None:
    """Let `peak_bytes` count from here on, where it can: a remedy is not to be given the peak of the one before it."""
    if measuring.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(measuring.model.device)


def peak_bytes(measuring: Measuring) -> int:
    """Return the most memory since `forget_peak` of the GPU, where the model is on one; else of the process so far."""
    if measuring.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(measuring.model.device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
