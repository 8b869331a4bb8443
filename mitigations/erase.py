"""How much a delta rule erases: erase_t' = max(scale * erase_t, least), of what the state holds along a token's key.

Our own. Reads nothing of the model and changes what is erased alone: what is written stays as it is. Above 1, or with a
floor under it, a layer forgets more of what it overwrites; with scale=0 it erases nothing and is a scan. Along a key of
length 1, erase = 1 takes away all that is held there; above 2 the part held there grows from token to token. Layers
whose recurrence erases nothing stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy
from rnn_longctx.models.interface import LanguageModel, erases
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.spec import Range, tuned

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class Erase(Remedy):
    """Erase more, or less, before a token is written.

    Attributes:
        scale: factor on what is erased, at least 0.
        least: the least that a token erases, at least 0, after the factor.
    """

    name = "erase"
    needs = frozenset({Need.RECURRENCE, Need.ERASING})
    search = "grid"
    examples = ("erase:scale=0.9", "erase:least=0.1")
    scale: float = tuned(1.0, over=Range(0.25, 1.5))
    least: float = tuned(0.0, over=Range(0.0, 0.3))

    def __post_init__(self) -> None:
        for name in ("scale", "least"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"erase: {name} must be at least 0, got {getattr(self, name):g}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return ["erase:scale=0.9", "erase:scale=1,least=0.1"]

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"scale": [0.8, 0.9, 1.0, 1.1], "least": [0.0, 0.05, 0.1, 0.2]}

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        policy = ScanPolicy(erase=self.scale, least_erase=self.least)
        return Plan(tuple(policy if erases(mixer) else PLAIN for mixer in model.mixers))
