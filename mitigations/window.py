"""Sliding window (Stuffed Mamba, arXiv 2410.07145): every layer's state holds its last r inputs only.

    S^(r)_t = S_t - exp(sum of log_decay over the last r tokens) * S_{t-r}

Exact per token, without the subtraction (`recurrence.ssd.window`). Reads nothing of the model; costs a delay line of
2 r tokens a layer. The last layer still sees L * r tokens back, through the layers below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy, same_everywhere
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class Window(Remedy):
    """Let every state hold its last inputs only.

    Attributes:
        tokens: how many inputs a state holds, r above.
    """

    name = "window"
    needs = frozenset({Need.RECURRENCE})
    search = "grid"
    examples = ("window:tokens=9",)
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"window: tokens must be at least 1, got {self.tokens}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return [] if train_length is None else [f"window:tokens={train_length}", f"window:tokens={4 * train_length}"]

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"tokens": [train_length // 2, train_length, 2 * train_length, 4 * train_length]}

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model, ScanPolicy(window=self.tokens)))
