"""The two controls. A remedy that gains nothing over them only forgets.

    reset:every=T,overlap=k    the state dropped every T tokens, the last k read again
    recompute:last=T           a fresh scan over the last tokens, in strides of T/2: each position sees T/2 to T of them

Both restart the whole model, not a layer (`rnn_longctx.models.restart`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import Plan, Remedy, same_everywhere
from rnn_longctx.models.restart import Restart
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM


@dataclass(frozen=True)
class Reset(Remedy):
    """every: tokens between restarts; overlap: of these, how many of the last are read again."""

    name = "reset"
    control = True
    every: int
    overlap: int = quiet(0)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"reset: every must be at least 1 token, got {self.every}")
        if not 0 <= self.overlap <= self.every:
            raise InputError(f"reset: overlap must lie between 0 and every={self.every}, got {self.overlap}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model), Restart(self.every, self.overlap))


@dataclass(frozen=True)
class Recompute(Remedy):
    """last: the most tokens a position sees; even."""

    name = "recompute"
    control = True
    last: int

    def __post_init__(self) -> None:
        if self.last < 2 or self.last % 2:
            raise InputError(f"recompute: last must be an even number of tokens, at least 2, got {self.last}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model), Restart(self.last // 2, self.last // 2))
