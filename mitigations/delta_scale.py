"""Delta scaling (MambaExtend, ICLR 2025): every layer's step size times a constant of its own,

    dt' = s_layer * dt,    so    a_t' = exp(s dt_t A)    and    w_t' = s dt_t

Reads nothing of the model. Changes decay and input alike, after softplus and clamp. Below 1 a layer forgets less and
writes less. Where a recurrence erases (the delta rule), what it writes hangs on a beta of its own and on no step, so
that the decay alone is scaled. The paper finds one s a layer by SPSA (`rnn-longctx calibrate`); its public code accepts
steps on the text it then reports, which calibration here never sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy, above_zero, per_layer
from rnn_longctx.mitigations.scales import FACTORS
from rnn_longctx.models.interface import LanguageModel, erases
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class DeltaScale(Remedy):
    """Scale every step of a layer.

    Attributes:
        scale: above 0; one number, or one a layer as in 0.7/0.8/...
    """

    name = "delta-scale"
    needs = frozenset({Need.RECURRENCE})
    adds = True
    search = "spsa"
    one_a_layer = "scale"
    scale: float | str

    def __post_init__(self) -> None:
        above_zero("delta-scale", "scale", self.scale)

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return ["delta-scale:scale=0.7"]

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"scale": list(FACTORS)}

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        scales = per_layer("delta-scale", self.scale, model)
        layers = zip(model.mixers, scales)
        return Plan(tuple(ScanPolicy(mul=s, gain=1.0 if erases(mixer) else s) for mixer, s in layers))
