"""State normalisation (Stuffed Mamba v1, arXiv 2410.07145): a head's state never grows past what training showed it.

    S_t <- S_t * min(1, cap / ||S_t||_F)        per head, after every token or every k tokens

Reads the largest norm each head reaches within the training length, in each of some slices of a calibration text
(`rnn_longctx.measure.envelope`), and makes a quantile of them that head's cap. Changes the recurrence of heads that
reach it, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rnn_longctx.errors import InputError
from rnn_longctx.measure.envelope import envelope_of
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy, train_length
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.spec import Range, tuned

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class StateNorm(Remedy):
    """Cap the norm of every head's state at what training showed.

    Attributes:
        every: tokens between two caps; 1 is exact, more is cheaper.
        quantile: of the slices' largest norms, in [0, 1]; 1 caps at the largest of all, less caps tighter.
    """

    name = "state-norm"
    needs = frozenset({Need.RECURRENCE, Need.TRAIN_LENGTH})
    adds = True
    search = "quantile"
    examples = ("state-norm:quantile=0.5",)
    every: int = tuned(1, over=(1, 4, 16, 64), quiet=True)
    quantile: float = tuned(1.0, over=Range(0.0, 1.0), quiet=True)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"state-norm: every must be at least 1 token, got {self.every}")
        if not 0 <= self.quantile <= 1:
            raise InputError(f"state-norm: quantile must lie in [0, 1], got {self.quantile:g}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return [] if train_length is None else ["state-norm", "state-norm:every=64"]

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"quantile": [1.0, 0.9, 0.75, 0.5, 0.0]}

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        envelope = envelope_of(model, train_length(model, "state-norm"), text)
        policies = tuple(ScanPolicy(caps=(Cap(caps, self.every),)) for caps in envelope.norms(self.quantile))
        return Plan(policies, calibrations=(envelope.calibration,), weights=model.weights_hash)
