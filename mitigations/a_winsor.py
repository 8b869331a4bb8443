"""A-winsorisation: the extremes of each layer's A drawn in to its own percentiles, without any calibration,

    A'_h = clip(A_h, quantile(A, share), quantile(A, 1 - share))

Reads A of every head and changes those of the heads beyond the percentiles: the ones that hardly forget now forget a
little, the fastest a little less. 5 to 8% are the shares reported (PG-19 at 64K, Mamba-2 1.3B: perplexity 13.19 to
11.44). A layer of few heads is clipped between neighbours, by linear interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy
from rnn_longctx.models.interface import LanguageModel, stepped_mixers
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.spec import Range, tuned

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class AWinsor(Remedy):
    """Draw the largest and smallest A of a layer in to its percentiles.

    Attributes:
        share: of a layer's heads to draw in at either end, in [0, 0.5).
    """

    name = "a-winsor"
    needs = frozenset({Need.RECURRENCE, Need.RATES})
    foldable = "a-winsor"
    search = "grid"
    share: float = tuned(0.05, over=Range(0.01, 0.4))

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise InputError(f"a-winsor: share must lie in [0, 0.5), got {self.share:g}")

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"share": [0.02, 0.05, 0.08, 0.15, 0.25]}

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        policies = []
        for mixer in stepped_mixers(model):
            A = mixer.A.detach().double().cpu()
            low, high = torch.quantile(A, torch.tensor([self.share, 1 - self.share], dtype=A.dtype, device=A.device))
            policies.append(ScanPolicy(mul=tuple((A.clamp(low, high) / A).tolist())))
        return Plan(tuple(policies), weights=model.weights_hash)
