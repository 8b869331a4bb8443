"""Sliding window (Stuffed Mamba, arXiv 2410.07145): every layer's state holds its last r inputs only.

    S^(r)_t = S_t - exp(sum of log_decay over the last r tokens) * S_{t-r}

Exact per token, without the subtraction (`recurrence.ssd.window`). Reads nothing of the model; costs a delay line of
2 r tokens a layer. The last layer still sees L * r tokens back, through the layers below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import Plan, Remedy, same_everywhere
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM


@dataclass(frozen=True)
class Window(Remedy):
    """tokens: r, the tokens a state holds."""

    name = "window"
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"window: tokens must be at least 1, got {self.tokens}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model, ScanPolicy(window=self.tokens)))
