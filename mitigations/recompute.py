"""A control: a fresh scan over the last tokens. A remedy that gains nothing over it only forgets.

    recompute:last=T    in strides of T/2: each position sees T/2 to T of the last tokens

It restarts the whole model, not a layer (`rnn_longctx.models.restart`). The other control is `reset`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Plan, Remedy, same_everywhere
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.restart import Restart

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class Recompute(Remedy):
    """Read the last tokens afresh, in strides.

    Attributes:
        last: the most tokens that a position sees; even.
    """

    name = "recompute"
    control = True
    examples = ("recompute:last=10",)
    last: int

    def __post_init__(self) -> None:
        if self.last < 2 or self.last % 2:
            raise InputError(f"recompute: last must be an even number of tokens, at least 2, got {self.last}")

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        if train_length is None:
            return ["recompute:last=512", "recompute:last=2048"]
        return [f"recompute:last={train_length // 2 * 2}", f"recompute:last={2 * train_length}"]

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model), Restart(self.last // 2, self.last // 2))
