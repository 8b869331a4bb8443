"""The interface of tasks, and what they are given: a model with a remedy on it, and a place for results."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from rnn_longctx.data import Text
from rnn_longctx.eval.results import Results, Row
from rnn_longctx.eval.stats import mean_stderr
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.precision import computes_as
from rnn_longctx.spec import canonical
from rnn_longctx.version import __version__


@dataclass
class Context:
    """What a task works with.

    Attributes:
        mitigation, calibration: canonical texts of what is on the model.
        text: the text to evaluate on, or its spec.
        batch: the most streams read side by side; segment: tokens read in one call, all streams together.
        progress: called with a number of tokens read.
    """

    model: Mamba2LM
    mitigation: str = "none"
    calibration: str | None = None
    text: Text | str | Path = "stdlib"
    batch: int = 8
    segment: int = 4096
    seed: int = 0
    results: Results | None = None
    snapshot_seconds: float = 30.0
    progress: Callable[[int], None] = lambda tokens: None
    _memory: dict[Any, Any] = field(default_factory=dict)

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """A text is loaded once for all remedies."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    @property
    def weights_hash(self) -> str:
        """The model's when it was first asked for: it is not to change while a context is worked with."""
        return self.memo("weights", lambda: self.model.weights_hash)

    def key(self, task: Task, text: Text | str, length: int, metric: str, depth: float | None = None) -> Row:
        m = self.model
        device = torch.cuda.get_device_name(m.device) if m.device.type == "cuda" else m.device.type
        kept = {} if m.state_dtype is None else {"state_dtype": str(m.state_dtype).removeprefix("torch.")}
        return kept | {
            "model": m.name, "weights_hash": self.weights_hash, "mitigation": self.mitigation,
            "calibration": self.calibration, "task": task.label, "text": text if isinstance(text, str) else text.name,
            "text_hash": None if isinstance(text, str) else text.hash, "tokenizer": m.tokenizer.name,
            "length": length, "depth": depth, "metric": metric, "batch": self.batch,
            "dtype": computes_as(m), "backend": m.backend, "device": device, "seed": self.seed,
        }  # fmt: skip

    def row(self, task: Task, text: Text | str, length: int, metric: str, samples: Sequence[float],
            depth: float | None = None, **cost: Any) -> Row:  # fmt: skip
        """A finished cell: the mean of its samples, stored at once."""
        value, stderr = mean_stderr(samples)
        row = self.key(task, text, length, metric, depth) | {
            "value": value, "stderr": stderr, "n": len(samples), "samples": [float(s) for s in samples],
            "train_length": self.model.train_length, "version": __version__, **cost,
        }  # fmt: skip
        if self.results:
            self.results.put(row)
        return row

    def done(self, task: Task, text: Text | str, length: int, metric: str, n: int) -> bool:
        """Whether the cell is stored already, from as many samples or more: fewer would only be a part of them."""
        stored = self.results.get(self.key(task, text, length, metric)) if self.results else None
        return stored is not None and stored["n"] >= n

    def snapshot_name(self, *what: Any) -> str:
        """A name for the snapshots of a stream that no other model, remedy or text shares."""
        key = self.key(Task(), "", 0, "")
        return hashlib.sha256(json.dumps([key, what], sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Task:
    """Base of the tasks. The fields of the dataclass are its parameters, `name:key=value,...`."""

    name: ClassVar[str] = ""

    @property
    def label(self) -> str:
        """What cells are filed under: tasks that ask for something else are called something else."""
        return self.name

    asks: ClassVar[bool] = False  # about a prompt as a whole: remedies that read it otherwise can be measured

    def lengths(self, asked: list[int], train_length: int | None) -> list[int]:
        """Which of the lengths asked for this task measures."""
        longest = getattr(self, "max", None)
        return [n for n in asked if longest is None or n <= longest]

    def check(self, context: Context, lengths: list[int]) -> None:
        """Raise InputError for what cannot be measured, before anything is."""

    def cost(self, context: Context, lengths: list[int]) -> int:
        """Tokens that `run` is going to read, for the progress bar."""
        raise NotImplementedError

    def run(self, context: Context, lengths: list[int]) -> Iterator[Row]:
        """Measure and store the cells that are not stored yet, and yield them."""
        raise NotImplementedError

    def __str__(self) -> str:
        return canonical(self.name, self)


def forget_peak(context: Context) -> None:
    """Let `peak_bytes` count from here on, where it can: a remedy is not to be given the peak of the one before it."""
    if context.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.model.device)


def peak_bytes(context: Context) -> int:
    """The most memory since `forget_peak` of the GPU, where the model is on one; else of the process so far."""
    if context.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(context.model.device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
