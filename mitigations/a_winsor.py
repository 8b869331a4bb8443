"""A-winsorisation: the extremes of each layer's A drawn in to its own percentiles, without any calibration,

    A'_h = clip(A_h, quantile(A, share), quantile(A, 1 - share))

Reads A of every head and changes those of the heads beyond the percentiles: the ones that hardly forget now forget a
little, the fastest a little less. 5 to 8% are the shares reported (PG-19 at 64K, Mamba-2 1.3B: perplexity 13.19 to
11.44). A layer of few heads is clipped between neighbours, by linear interpolation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import NotApplicable, Plan, Remedy
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM


@dataclass(frozen=True)
class AWinsor(Remedy):
    """share: of a layer's heads to draw in at either end, in [0, 0.5)."""

    name = "a-winsor"
    share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise InputError(f"a-winsor: share must lie in [0, 0.5), got {self.share:g}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        if any(mixer.A.ndim > 1 for mixer in model.mixers):
            raise NotApplicable(
                f"a-winsor needs one A a head, as Mamba-2 has: {model.name} has Mamba-1's, one a channel"
            )
        policies = []
        for mixer in model.mixers:
            A = mixer.A.detach().double().cpu()
            low, high = torch.quantile(A, torch.tensor([self.share, 1 - self.share], dtype=A.dtype, device=A.device))
            policies.append(ScanPolicy(mul=tuple((A.clamp(low, high) / A).tolist())))
        return Plan(tuple(policies), weights=model.weights_hash)
