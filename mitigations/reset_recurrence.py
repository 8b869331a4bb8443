"""A control that tells whether the recurrence of a hybrid fails beyond its training length.

    reset-recurrence:every=T     scan states start again every T tokens, attention sees all

What the loss gains by it alone, the recurrence had lost; what it gains by `attention-window` alone, attention. The
recurrence cannot be read again without attention, so it restarts from nothing, but for the last inputs of its short
convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy, same_everywhere
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class ResetRecurrence(Remedy):
    """Drop the scan states now and then, and nothing that attention keeps.

    Attributes:
        every: tokens between restarts of the scan states.
    """

    name = "reset-recurrence"
    needs = frozenset({Need.ATTENTION})
    control = True
    diagnoses = True
    examples = ("reset-recurrence:every=9",)
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"reset-recurrence: every must be at least 1 token, got {self.every}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return [] if train_length is None else [f"reset-recurrence:every={train_length}"]

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model, ScanPolicy(reset=self.every)))
