"""A control: the state dropped every T tokens, the last k read again. A remedy that gains nothing over it only forgets.

    reset:every=T,overlap=k

It restarts the whole model, not a layer (`rnn_longctx.models.restart`). The other control is `recompute`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Plan, Remedy, same_everywhere
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.restart import Restart
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class Reset(Remedy):
    """Drop the state now and then.

    Attributes:
        every: tokens between restarts.
        overlap: of these, how many of the last are read again.
    """

    name = "reset"
    control = True
    examples = ("reset:every=7,overlap=3",)
    every: int
    overlap: int = quiet(0)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"reset: every must be at least 1 token, got {self.every}")
        if not 0 <= self.overlap <= self.every:
            raise InputError(f"reset: overlap must lie between 0 and every={self.every}, got {self.overlap}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        return [f"reset:every={train_length or 512}"]

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model), Restart(self.every, self.overlap))
