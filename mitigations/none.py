"""No remedy: what every other line of a table is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.mitigations.base import Plan, Remedy, same_everywhere

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM


@dataclass(frozen=True)
class Nothing(Remedy):
    name = "none"

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model))
