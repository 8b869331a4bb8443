"""No remedy: what every other line of a table is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.mitigations.base import REMEDIES, Plan, Remedy, same_everywhere
from rnn_longctx.models.interface import LanguageModel

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class Nothing(Remedy):
    """The model as it is."""

    name = "none"

    @property
    def parts(self) -> tuple[Remedy, ...]:
        return ()

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model))
