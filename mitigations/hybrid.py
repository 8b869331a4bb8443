"""Two controls that tell which part of a hybrid fails beyond its training length, attention or the recurrence.

    attention-window:tokens=T    attention sees the last T/2 to T tokens, the recurrence all
    reset-recurrence:every=T     scan states start again every T tokens, attention sees all

What the loss gains by the first alone, attention had lost; by the second alone, the recurrence. Before every token
whose position T/2 divides, keys and values are cropped to the last T/2. They carry their rotation at absolute
positions, which go on counting: rotary attention sees distances, and none is T or longer. The recurrence cannot be read
again without attention, so it restarts from nothing, but for the last inputs of its short convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import NotApplicable, Plan, Remedy, same_everywhere
from rnn_longctx.models.restart import Crop
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM

MOVING = ("dynamic", "longrope")  # rotations that change with the longest position seen, however near the tokens are


@dataclass(frozen=True)
class AttentionWindow(Remedy):
    """tokens: the most that a position attends to, itself among them; even."""

    name = "attention-window"
    control = True
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.tokens % 2:
            raise InputError(f"attention-window: tokens must be an even number, at least 2, got {self.tokens}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        _attends(model, self.name)
        rope = getattr(model.config, "rope_parameters", None) or {}
        if (kind := rope.get("rope_type")) in MOVING:
            raise NotApplicable(f"attention-window: positions of {model.name} are scaled by length ({kind})")
        return Plan(same_everywhere(model), Crop(self.tokens // 2, self.tokens // 2))


@dataclass(frozen=True)
class ResetRecurrence(Remedy):
    """every: tokens between restarts of the scan states."""

    name = "reset-recurrence"
    control = True
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"reset-recurrence: every must be at least 1 token, got {self.every}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        _attends(model, self.name)
        return Plan(same_everywhere(model, ScanPolicy(reset=self.every)))


def _attends(model: Mamba2LM, remedy: str) -> None:
    if not getattr(model, "attends", False):
        raise NotApplicable(f"{remedy} is for hybrids, and {model.name} has no attention")
