"""What a run's loop keeps between two steps, and in a snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        step, tokens, seconds: made, read and spent so far.
        stage: the number of the stage, from 0.
        bad: steps in a row that were skipped.
        window: [loss, answer loss, gradient norm] of each update since the last row of the log.
        recent: losses of the last updates of this stage.
        gate: the least held-out loss at which a stage was entered, or None without stages.
        best: the score of the model in best/, or None without one.
    """

    step: int = 0
    seconds: float = 0.0
    bad: int = 0
    window: list[list[float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    tokens: int = 0
    stage: int = 0
    gate: float | None = None
    best: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a snapshot holds: what has no value yet is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RunState:
        """Return the state of a snapshot; an older version's may lack fields."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in state.items() if name in names})
