"""State normalisation (Stuffed Mamba v1, arXiv 2410.07145): a head's state never grows past what training showed it.

    S_t <- S_t * min(1, cap / ||S_t||_F)        per head, after every token or every k tokens

Reads the largest norm each head reaches within the training length on a calibration text (`probes.envelope`) and
makes it that head's cap. Changes the recurrence of heads that reach it, and no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import Plan, Remedy, train_length
from rnn_longctx.probes.envelope import envelope_of
from rnn_longctx.spec import quiet
from rnn_longctx.ssd import Cap, ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models import Mamba2LM


@dataclass(frozen=True)
class StateNorm(Remedy):
    """every: tokens between two caps; 1 is exact, more is cheaper."""

    name = "state-norm"
    every: int = quiet(1)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"state-norm: every must be at least 1 token, got {self.every}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        envelope = envelope_of(model, train_length(model, "state-norm"), text)
        policies = tuple(ScanPolicy(caps=(Cap(tuple(norms), self.every),)) for norms in envelope.norms)
        return Plan(policies, calibration=envelope.label)
