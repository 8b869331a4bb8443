"""A control that tells whether attention of a hybrid fails beyond its training length.

    attention-window:tokens=T    attention sees the last T/2 to T tokens, the recurrence all

What the loss gains by it alone, attention had lost; what it gains by `reset-recurrence` alone, the recurrence. Before
every token whose position T/2 divides, keys and values are cropped to the last T/2. They carry their rotation at
absolute positions, which go on counting: rotary attention sees distances, and none is T or longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, NotApplicable, Plan, Remedy, same_everywhere
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.restart import Crop

if TYPE_CHECKING:
    from rnn_longctx.data import Text

MOVING = ("dynamic", "longrope")  # rotations that change with the longest position seen, however near the tokens are


@REMEDIES.register
@dataclass(frozen=True)
class AttentionWindow(Remedy):
    """Let attention see the last tokens only.

    Attributes:
        tokens: the most that a position attends to, itself among them; even.
    """

    name = "attention-window"
    needs = frozenset({Need.ATTENTION})
    control = True
    diagnoses = True
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.tokens % 2:
            raise InputError(f"attention-window: tokens must be an even number, at least 2, got {self.tokens}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return [] if train_length is None else [f"attention-window:tokens={train_length // 2 * 2}"]

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        if model.rotary_scaling in MOVING:
            scaling = model.rotary_scaling
            raise NotApplicable(f"attention-window: positions of {model.name} are scaled by length ({scaling})")
        return Plan(same_everywhere(model), Crop(self.tokens // 2, self.tokens // 2))
