"""YaRN (Peng et al., arXiv 2309.00071): rotary positions of full attention scaled for longer texts, without training.

    pairs of channels that turn often within the training length T stay as they are, the slow ones are slowed by a
    factor s, those between by parts ("NTK by parts"); scores are multiplied by (1 + 0.1 ln s)^2

What is scaled and how: `rnn_longctx.models.rotary.Yarn`. It may be put on and taken off between any two tokens: the
keys that are held are then turned on to where they would stand (`rnn_longctx.models.attention.WindowKeys.scaled`).
Without a factor it changes nothing up to the training length; with one it does at every length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, NotApplicable, Plan, Remedy, same_everywhere, train_length
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.rotary import Yarn
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class YarnScaling(Remedy):
    """Scale the positions of full attention.

    Attributes:
        factor: s, how many times the training length is to be read, at least 1; None: the length that is to be read
            over the training length.
    """

    name = "yarn"
    needs = frozenset({Need.ROTARY, Need.TRAIN_LENGTH})
    per_length = True
    examples = ("yarn:factor=4",)
    factor: float | None = quiet(None)

    def __post_init__(self) -> None:
        if self.factor is not None and not 1 <= self.factor < float("inf"):
            raise InputError(f"yarn: factor must be at least 1, got {self.factor:g}")

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        length, factor = train_length(model, "yarn"), self.factor
        if factor is None:
            if target_length is None:
                raise NotApplicable("yarn needs the length to be read: give target_length, or factor=4")
            factor = max(1.0, target_length / length)
        return Plan(same_everywhere(model), scaling=Yarn(factor, length) if factor > 1 else None)
