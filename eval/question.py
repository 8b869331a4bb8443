"""What `evaluate` is asked: as a file or a command line says it, and checked, as the evaluation takes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rnn_longctx.config import parse_lengths
from rnn_longctx.data import Text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.base import Job
from rnn_longctx.eval.jobs.parsing import parse_task
from rnn_longctx.mitigations import Remedy, parse_remedy, standard
from rnn_longctx.tasks.base import Task

TextLike = Text | str | Path


@dataclass(frozen=True)
class EvalConfig:
    """What `rnn-longctx eval` does; see configs/eval/demo.yaml."""

    model: str = "demo"
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096, 16384])
    tasks: list[str] = field(default_factory=lambda: ["lm", "passkey"])
    mitigations: list[str] = field(default_factory=lambda: ["none"])
    text: list[str] = field(default_factory=lambda: ["stdlib"])
    calibration_text: str | None = None  # None: what the checkpoint keeps, else the builtin text
    train_length: int | None = None  # None: what the checkpoint says
    tokenizer: str | None = None
    out: str = "runs/eval"
    batch: int = 32  # the most streams side by side
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    state_dtype: str | None = None  # None: float32, or float64 with dtype float64
    backend: str | None = None

    def question(self) -> Question:
        """Return what is asked of the model. Raises InputError for what does not depend on the model."""
        texts, calibration_text = self.text, self.calibration_text
        return Question.of(self.lengths, self.tasks, self.mitigations, texts, calibration_text, self.batch, self.seed)


@dataclass(frozen=True)
class Question:
    """Lengths, jobs, remedies and texts, each of which is valid by itself.

    Attributes:
        lengths: in tokens, sorted, none twice.
        mitigations: remedies, and "all", which stands for the standard ones of a model.
        texts: that losses are measured on, each a text or a spec that can be loaded.
        calibration_text: for remedies that are calibrated; None takes what is kept with the checkpoint.
        batch: the most streams side by side.
        seed: of the examples.
    """

    lengths: list[int]
    jobs: list[Job]
    mitigations: list[Remedy | str]
    texts: list[TextLike]
    calibration_text: TextLike | None
    batch: int
    seed: int

    @classmethod
    def of(
        cls,
        lengths: Sequence[int | str] | int | str,
        tasks: Any,
        mitigations: Any,
        text: TextLike | Sequence[TextLike],
        calibration_text: TextLike | None,
        batch: int,
        seed: int,
    ) -> Question:
        """Return the question that a caller's arguments ask; see `evaluate`.

        Raises:
            InputError: bad lengths, tasks or remedies, or none of one of them; a batch below 1, a seed below 0.
        """
        if not isinstance(batch, int) or batch < 1:
            raise InputError(f"batch must be at least 1 stream, got {batch!r}")
        if not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed: expected a whole number, at least 0, got {seed!r:.40}")
        tokens = sorted(set(parse_lengths([lengths] if isinstance(lengths, int) else lengths)))
        jobs = [parse_task(t) for t in _several(tasks, str | Task | Job, "tasks", "lm or passkey:n=100")]
        names = ["none"] if mitigations is None else mitigations
        remedies = _several(names, str | Remedy, "mitigations", "none or state-norm")
        remedies = [name if name == "all" else parse_remedy(name) for name in remedies]
        if not tokens or not jobs or not remedies:
            raise InputError("evaluate needs at least one length, one task and one mitigation")
        several: Sequence[Any] = text if isinstance(text, list | tuple) else [text]
        texts = list({str(t) if isinstance(t, str | Path) else id(t): t for t in several}.values())
        if not texts:
            raise InputError("evaluate needs at least one text")
        return cls(tokens, jobs, remedies, texts, calibration_text or None, batch, seed)

    def remedies(self, train_length: int | None) -> dict[str, Remedy]:
        """Return the remedies for a model of that training length by their canonical texts."""
        named = [r for m in self.mitigations for r in (standard(train_length) if m == "all" else [m])]
        return {str(remedy): remedy for remedy in map(parse_remedy, named)}

    def names(self, remedy: Remedy) -> bool:
        """Whether a remedy is asked for by its name, and not by "all" alone."""
        return remedy in self.mitigations


def _several(value: Any, one: Any, what: str, such_as: str) -> list[Any]:
    """Return one of something, or several, as a list. InputError for what is neither."""
    if value is None or isinstance(value, one):
        return [] if value is None else [value]
    if not isinstance(value, Iterable):
        raise InputError(f"{what}: expected one such as {such_as}, or a list of them; got {value!r:.60}")
    return list(value)
