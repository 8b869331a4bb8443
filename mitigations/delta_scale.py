"""Delta scaling (MambaExtend, ICLR 2025): every layer's step size times a constant of its own,

    dt' = s_layer * dt,    so    a_t' = exp(s dt_t A)    and    w_t' = s dt_t

Reads nothing of the model. Changes decay and input alike, after softplus and clamp. Below 1 a layer forgets less and
writes less. The paper finds one s a layer by SPSA (`rnn-longctx calibrate`); its public code accepts steps on the text
it then reports, which calibration here never sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.mitigations.base import Plan, Remedy, above_zero, per_layer
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM


@dataclass(frozen=True)
class DeltaScale(Remedy):
    """scale: above 0; one number, or one a layer: 0.7/0.8/..."""

    name = "delta-scale"
    adds = True
    scale: float | str

    def __post_init__(self) -> None:
        above_zero("delta-scale", "scale", self.scale)

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        scales = per_layer("delta-scale", self.scale, model)
        return Plan(tuple(ScanPolicy(mul=s, gain=s) for s in scales))
