"""Causal softmax attention over the last `window` tokens, with rotary positions (arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rnn_longctx.errors import InputError
from rnn_longctx.models.attention import CausalAttention
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.spec import tuned


@dataclass(frozen=True)
class SlidingWindowConfig:
    """The shape of a layer.

    Attributes:
        window: tokens that a token attends to, itself among them.
    """

    window: int = tuned(256, over=(8, 16, 32, 64, 128, 256, 512))
    heads: int = 4

    def __post_init__(self) -> None:
        if self.window < 2 or self.heads < 1:
            raise InputError(
                f"sliding-window: expected a window of at least 2 tokens and at least 1 head, got {self.window} and "
                f"{self.heads}"
            )


@MIXERS.register
class SlidingWindow(CausalAttention):
    """A layer of attention over a window."""

    name = "sliding-window"
    Config: ClassVar[Any] = SlidingWindowConfig
    examples = ("sliding-window:window=7,heads=2",)  # (a window that ends within a test's stream)

    @property
    def window(self) -> int:
        return self.config.window
