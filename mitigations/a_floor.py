"""A floor under every head's decay: on the average none remembers longer than `tokens` tokens,

    A'_h = A_h * max(1, (1 / tokens) / m_h)        m_h = mean of dt_{t,h} |A_h|

so that a state falls by e in `tokens` tokens of typical text. Our own: the lower end of A-winsorisation with its limit
measured in tokens, not in a quantile of A, which says nothing of a layer most of whose heads never forget.

Reads dt of every head on a calibration text, within the training length. Changes A of the heads that forget more
slowly; the others stay as they are, bit for bit. A constant a head costs nothing at run time, and can be folded into
the weights (`rnn_longctx.fold`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import steps_of
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy, train_length
from rnn_longctx.models.interface import LanguageModel, stepped_mixers
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text

LEAST = torch.finfo(torch.float32).tiny  # a log-decay below it is a head that takes no steps: there is none to scale


@REMEDIES.register
@dataclass(frozen=True)
class AFloor(Remedy):
    """Let no head remember longer than so many tokens, on the average.

    Attributes:
        tokens: that a head remembers at most; the training length if not given. It is also the length of the
            calibration's windows where the model does not say its training length.
    """

    name = "a-floor"
    needs = frozenset({Need.RECURRENCE, Need.STEPS})
    foldable = "a-floor"
    search = "grid"
    tokens: int | None = quiet(None)

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"a-floor: tokens must be at least 1, got {self.tokens}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return [] if train_length is None else ["a-floor"]

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"tokens": [train_length // 2, train_length, 2 * train_length, 4 * train_length]}

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        tokens = self.tokens or train_length(model, "a-floor without tokens=...")
        steps, calibration = steps_of(model, model.train_length or tokens, text)
        policies = []
        for mixer, dt in zip(stepped_mixers(model), steps):
            m = dt.double().mean((0, 1)) * mixer.A.detach().double().cpu().abs()
            slow = (m < 1 / tokens) & (m >= LEAST)
            mul = torch.where(slow, 1 / (tokens * m), 1.0)
            policies.append(ScanPolicy(mul=tuple(mul.tolist())) if bool(slow.any()) else PLAIN)
        return Plan(tuple(policies), calibrations=(calibration,), weights=model.weights_hash)
