"""RRI, forget more and remember less (Stuffed Mamba, arXiv 2410.07145):

    S_t = alpha a_t S_{t-1} + beta w_t x_t B_t^T

On a recurrence that erases (the delta rule) beta weakens what is written alone, or with erases=true what is erased as
well: there, one beta_t says how much of both a token does.

Reads nothing of the model and changes the gates of every head: log_decay + log(alpha), input_scale * beta. The
paper multiplies the decay by alpha (it does not raise it to a power) and takes 0.9999 and 0.75. An alpha a layer is
this project's: `rnn-longctx calibrate` finds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, NotApplicable, Plan, Remedy, above_zero, per_layer
from rnn_longctx.mitigations.scales import ALPHAS
from rnn_longctx.models.interface import LanguageModel, erases
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.spec import Range, quiet, tuned

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class RRI(Remedy):
    """Forget more and remember less, by two constants.

    Attributes:
        alpha: factor on every decay, in (0, 1]; one number, or one a layer as in 0.999/0.9999/...
        beta: factor on every input, above 0.
        erases: whether beta is a factor on what is erased, too, where a layer's recurrence erases.
    """

    name = "rri"
    needs = frozenset({Need.RECURRENCE})
    adds = True
    search = "spsa"
    one_a_layer = "alpha"
    examples = ("rri:erases=true",)
    alpha: float | str = tuned(0.9999, over=Range(0.98, 0.99999, "near-one"))
    beta: float = tuned(0.75, over=Range(0.25, 1.0))
    erases: bool = quiet(False)

    def __post_init__(self) -> None:
        if max(above_zero("rri", "alpha", self.alpha)) > 1:
            raise InputError(f"rri: alpha must lie in (0, 1], got {self.alpha}")
        if not 0 < self.beta < math.inf:
            raise InputError(f"rri: beta must be above 0, got {self.beta:g}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return ["rri", "rri:alpha=0.999,beta=1"]

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"alpha": list(ALPHAS), "beta": [1.0, 0.75, 0.5]}

    @property
    def forgets(self) -> bool:
        return True

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        alphas = per_layer("rri", self.alpha, model)
        if self.erases and not any(map(erases, model.mixers)):
            raise NotApplicable(f"{self} needs a recurrence that erases, as the delta rule does: {model.name} has none")
        erase = [self.beta if self.erases and erases(mixer) else 1.0 for mixer in model.mixers]
        return Plan(tuple(ScanPolicy(add=math.log(a), gain=self.beta, erase=e) for a, e in zip(alphas, erase)))
