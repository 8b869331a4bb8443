"""Causal softmax attention over the last `window` tokens, with rotary positions (arXiv 2104.09864).

A row keeps the keys and values of the tokens that it has read, the last window - 1 at most. Keys are kept as they were
before they are turned, and turned by their place in what a call reads: so angles stay small, and are as exact at a
million tokens as at the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import carry
from rnn_longctx.models.interface import Shape, StateSize
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.recurrence.span import Span

CHUNK = 256  # queries whose scores are held at once
BASE = 10_000.0  # of the rotary angles


@dataclass(frozen=True)
class SlidingWindowConfig:
    """The shape of a layer.

    Attributes:
        window: tokens that a token attends to, itself among them.
    """

    window: int = 256
    heads: int = 4

    def __post_init__(self) -> None:
        if self.window < 2 or self.heads < 1:
            raise InputError(
                f"sliding-window: expected a window of at least 2 tokens and at least 1 head, got {self.window} and "
                f"{self.heads}"
            )


def _level(carries: list[WindowKeys]) -> list[WindowKeys]:
    """Return carries as wide as the widest; what stands before a row's tokens is not read."""
    width = max(c.keys.shape[1] for c in carries)

    def widened(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, 0, width - tensor.shape[1], 0))

    return [replace(c, keys=widened(c.keys), values=widened(c.values)) for c in carries]


@carry(level=_level)
@dataclass
class WindowKeys:
    """The carry: the tokens read, the last window - 1 at most, the newest at the right end.

    S is the same for all rows. One that began later, after padding or with a document of its own, holds fewer tokens.

    Attributes:
        keys, values: (B, S, H, D), S < window; keys before they are turned.
        held: (B,) int64, how many of them, at the right end, are tokens of the row's document.
    """

    keys: Tensor
    values: Tensor
    held: Tensor

    def cropped(self, tokens: int) -> WindowKeys:
        """Return the carry with the last `tokens` tokens alone."""
        first = max(0, self.keys.shape[1] - tokens)
        return WindowKeys(self.keys[:, first:], self.values[:, first:], self.held.clamp(max=tokens))


@MIXERS.register
class SlidingWindow(nn.Module):
    """A layer of attention over a window."""

    name: ClassVar[str] = "sliding-window"
    Config: ClassVar[Any] = SlidingWindowConfig
    attends: ClassVar[bool] = True
    examples = ("sliding-window:window=7,heads=2",)  # (a window that ends within a test's stream)

    def __init__(self, config: SlidingWindowConfig, model: Shape):
        super().__init__()
        if model.d_model % (2 * config.heads):
            raise InputError(
                f"sliding-window: d_model = {model.d_model} does not divide into {config.heads} heads of even size"
            )
        self.config = config
        self.in_proj = nn.Linear(model.d_model, 3 * model.d_model, bias=False)
        self.out_proj = nn.Linear(model.d_model, model.d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: SlidingWindowConfig, model: Shape) -> SlidingWindow:
        return cls(config, model)

    def forward(self, u: Tensor, carry: WindowKeys | None, span: Span) -> tuple[Tensor, WindowKeys]:
        if span.shard is not None:
            raise InputError("sliding-window attention cannot be followed where a context is read over several ranks")
        carry = self.new_carry(len(u)) if carry is None else carry
        window, before, length = self.config.window, carry.keys.shape[1], u.shape[1]
        q, k, v = self.in_proj(u).unflatten(-1, (3, self.config.heads, -1)).unbind(2)  # (B, T, H, D)
        k = torch.cat([carry.keys.to(k.dtype), k], 1)  # (B, S + T, H, D), as places are counted from here on
        v = torch.cat([carry.values.to(v.dtype), v], 1)
        begin = self._begin(carry, length, span)  # (B, T)
        chunks = []
        for t in range(0, length, CHUNK):
            queries = q[:, t : t + CHUNK]
            first = max(0, before + t - (window - 1))
            seen = slice(first, before + t + queries.shape[1])
            chunks.append(attend(queries, k[:, seen], v[:, seen], begin[:, t : t + CHUNK] - first, window))
        held = (before + length - begin[:, -1]).clamp(max=window - 1)
        kept = slice(max(0, before + length - (window - 1)), None)
        after = WindowKeys(k[:, kept].contiguous(), v[:, kept].contiguous(), held)
        return self.out_proj(torch.cat(chunks, 1).flatten(2)), after

    def _begin(self, carry: WindowKeys, length: int, span: Span) -> Tensor:
        """Return the place (B, T) where each token's document begins, or what is left of it."""
        before = carry.keys.shape[1]
        first = before - carry.held  # (B,)
        if span.mask is not None:  # padding stands before the first token of a row
            first = first + length - span.mask.sum(1)
        if span.reset is None:
            return first[:, None].expand(-1, length)
        places = torch.arange(before, before + length, device=first.device)
        return torch.where(span.reset, places, first[:, None]).cummax(1).values

    def state_size(self) -> StateSize:
        return StateSize(windows={self.config.window - 1: 2 * self.in_proj.in_features})

    def new_carry(self, rows: int) -> WindowKeys:
        weight, heads = self.in_proj.weight, self.config.heads
        keys = weight.new_zeros(rows, 0, heads, self.in_proj.in_features // heads)
        return WindowKeys(keys, torch.zeros_like(keys), torch.zeros(rows, dtype=torch.int64, device=weight.device))


def attend(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, window: int) -> Tensor:
    """Return (B, T, H, D): what T queries read of the keys and values (B, S + T, H, D) of the S tokens before and of
    their own; each of `window` tokens at most, its own the last, none before the place `begin` (B, T)."""
    before = k.shape[1] - q.shape[1]
    places = torch.arange(k.shape[1], device=q.device)
    queries = places[before:, None]  # (T, 1)
    near = (places <= queries) & (places > queries - window)  # (T, S + T)
    seen = near & ((places >= begin[..., None]) | (places == queries))  # (B, T, S + T); padding sees itself
    y = F.scaled_dot_product_attention(
        turned(q, before).transpose(1, 2), turned(k, 0).transpose(1, 2), v.transpose(1, 2), seen[:, None]
    )
    return y.transpose(1, 2)


def turned(x: Tensor, first: int) -> Tensor:
    """Return x (B, T, H, D) turned by the angles of the places from `first` on."""
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    rates = BASE ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angles = (
        torch.arange(first, first + x.shape[1], device=x.device, dtype=wide)[:, None, None] * rates
    )  # (T, 1, D / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
