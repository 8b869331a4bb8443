"""Causal softmax attention over all that was read (arXiv 1706.03762), with rotary positions (arXiv 2104.09864) or none:
the reference that recurrences are compared with. Its carry grows with every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rnn_longctx.errors import InputError
from rnn_longctx.models.attention import CausalAttention
from rnn_longctx.models.mixers import MIXERS


@dataclass(frozen=True)
class FullAttentionConfig:
    """The shape of a layer.

    Attributes:
        positions: "rope", or "none": then a token knows the order of what it reads by the causal mask alone.
    """

    heads: int = 4
    positions: Literal["rope", "none"] = "rope"

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise InputError(f"full-attention: expected at least 1 head, got {self.heads}")


@MIXERS.register
class FullAttention(CausalAttention):
    """A layer of attention over everything before a token."""

    name = "full-attention"
    Config: ClassVar[Any] = FullAttentionConfig
    examples = ("full-attention:heads=2", "full-attention:heads=2,positions=none")

    @property
    def rotary(self) -> bool:
        return self.config.positions == "rope"
