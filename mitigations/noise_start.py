"""Rows that start from noise, not from zero (Ruiz & Gu, arXiv 2507.02782, use it in training): S_0 ~ N(0, std^2).

Reads nothing of the model and changes the first state of every head, in its own units. One fixed draw a layer, from the
seed, so that every row and every run starts alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import ScanPolicy, nested
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class NoiseStart(Remedy):
    """std: of the numbers of the state, at least 0."""

    name = "noise-start"
    needs = frozenset({Need.RECURRENCE})
    starts = True
    std: float
    seed: int = quiet(0)

    def __post_init__(self) -> None:
        if not 0 <= self.std < float("inf"):
            raise InputError(f"noise-start: std must be at least 0, got {self.std:g}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"noise-start: seed must lie between 0 and 2^63, got {self.seed}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return ["noise-start:std=0.1"]

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        draw = torch.Generator().manual_seed(self.seed)
        shapes = [(m.heads, m.headdim, m.d_state) for m in model.mixers]
        starts = [torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu") * self.std for shape in shapes]
        return Plan(tuple(ScanPolicy(start=nested(start)) if self.std else ScanPolicy() for start in starts))
