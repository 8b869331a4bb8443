"""Scaling the spectrum of A (Mamba Modulation, arXiv 2509.19633), a constant s a layer; the input stays as it is.

    place=rate     A' = s A                      a_t' = exp(dt_t A)^s     the paper's text, and the default
    place=decay    exp(dt A)' = s exp(dt A)      a_t' = s a_t             of the discretised matrix; s at most 1

A is any rate that multiplies a step, or a gate in its place, to a log-decay: a factor on it is one on every log-decay,
which is all that changes. Where A stands inside a sigmoid that is not so, and place=rate is refused.

Reads nothing of the model. The public code disagrees with itself on the place, so that it is named here. Above 1 (rate)
or below 1 (decay) a layer forgets more. On the decay it is RRI with beta = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, NotApplicable, Plan, Remedy, above_zero, per_layer
from rnn_longctx.mitigations.scales import ALPHAS, FACTORS
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class AScale(Remedy):
    """Scale the rate A, or the decay, of every head of a layer.

    Attributes:
        scale: above 0; one number, or one a layer as in 1.2/1.1/...
        place: "rate" or "decay".
    """

    name = "a-scale"
    needs = frozenset({Need.RECURRENCE})
    adds = True
    foldable = "a-scale (place=rate)"
    search = "spsa"
    one_a_layer = "scale"
    examples = ("a-scale:scale=0.9,place=decay",)
    scale: float | str
    place: str = quiet("rate")

    def __post_init__(self) -> None:
        scales = above_zero("a-scale", "scale", self.scale)
        if self.place not in ("rate", "decay"):
            raise InputError(f"a-scale: place is rate or decay, got {self.place!r}")
        if self.place == "decay" and max(scales) > 1:
            raise InputError(f"a-scale: decays above 1 grow without end; scale must be at most 1, got {max(scales):g}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return ["a-scale:scale=1.5"]

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"scale": list(ALPHAS if fixed.get("place") == "decay" else FACTORS)}

    @property
    def forgets(self) -> bool:
        return self.place == "decay"

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        scales = per_layer("a-scale", self.scale, model)
        if self.place == "rate":
            if any(mixer.bounded for mixer in model.mixers):
                raise NotApplicable(
                    f"a-scale: decays of {model.name} are made by a sigmoid with a lower bound, so that a factor on A "
                    "is none on a log-decay: delta-scale, place=decay and rri act on that itself"
                )
            return Plan(tuple(ScanPolicy(mul=s) for s in scales))
        return Plan(tuple(ScanPolicy(add=math.log(s)) for s in scales))
