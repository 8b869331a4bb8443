"""RRI, forget more and remember less (Stuffed Mamba, arXiv 2410.07145):

    S_t = alpha a_t S_{t-1} + beta w_t x_t B_t^T

Reads nothing of the model and changes the gates of every head: log_decay + log(alpha), input_scale * beta. The
paper multiplies the decay by alpha (it does not raise it to a power) and takes 0.9999 and 0.75.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import Plan, Remedy, same_everywhere
from rnn_longctx.ssd import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models import Mamba2LM


@dataclass(frozen=True)
class RRI(Remedy):
    """alpha: factor on every decay, in (0, 1]; beta: factor on every input, above 0."""

    name = "rri"
    alpha: float = 0.9999
    beta: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise InputError(f"rri: alpha must lie in (0, 1], got {self.alpha:g}")
        if not 0 < self.beta < math.inf:
            raise InputError(f"rri: beta must be above 0, got {self.beta:g}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model, ScanPolicy(add=math.log(self.alpha), gain=self.beta)))
