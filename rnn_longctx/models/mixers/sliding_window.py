"""Causal softmax attention over the last `window` tokens, with rotary positions (arXiv 2104.09864).

A row keeps the keys and values of window - 1 tokens, whatever it has read. Keys are kept as they were before they are
turned, and turned by their place in what a call reads: so angles stay small, and are as exact at a million tokens as at
the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import carry
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


@carry
@dataclass
class WindowKeys:
    """The carry: the last window - 1 tokens, the newest at the right end.

    Attributes:
        keys, values: (B, window - 1, H, D); keys before they are turned.
        held: (B,) int64, how many of them, at the right end, are tokens of the row's document.
    """

    keys: Tensor
    values: Tensor
    held: Tensor

    def cropped(self, tokens: int) -> WindowKeys:
        """Return the carry with the last `tokens` tokens alone."""
        return replace(self, held=self.held.clamp(max=tokens))


@MIXERS.register
class SlidingWindow(nn.Module):
    """A layer of attention over a window."""

    name, Config = "sliding-window", SlidingWindowConfig
    attends = True

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
        length, before = u.shape[1], self.config.window - 1
        q, k, v = self.in_proj(u).unflatten(-1, (3, self.config.heads, -1)).unbind(2)  # (B, T, H, D)
        carry = self.new_carry(len(u)) if carry is None else carry
        k = torch.cat([carry.keys.to(k.dtype), k], 1)  # (B, window - 1 + T, H, D), as places are counted from here on
        v = torch.cat([carry.values.to(v.dtype), v], 1)
        begin = self._begin(carry.held, length, span)  # (B, T)
        chunks = []
        for t in range(0, length, CHUNK):
            queries = q[:, t : t + CHUNK]
            seen = slice(t, t + queries.shape[1] + before)
            chunks.append(attend(queries, k[:, seen], v[:, seen], begin[:, t : t + CHUNK] - t))
        held = (before + length - begin[:, -1]).clamp(max=before)
        after = WindowKeys(k[:, length:].contiguous(), v[:, length:].contiguous(), held)
        return self.out_proj(torch.cat(chunks, 1).flatten(2)), after

    def _begin(self, held: Tensor, length: int, span: Span) -> Tensor:
        """Return the place (B, T) where each token's document begins, or what is left of it."""
        before = self.config.window - 1
        first = before - held  # (B,)
        if span.mask is not None:  # padding stands before the first token of a row
            first = first + length - span.mask.sum(1)
        if span.reset is None:
            return first[:, None].expand(-1, length)
        places = torch.arange(before, before + length, device=held.device)
        return torch.where(span.reset, places, first[:, None]).cummax(1).values

    def state_size(self) -> StateSize:
        width = self.in_proj.in_features
        return StateSize({"attention": 2 * (self.config.window - 1) * width})

    def new_carry(self, rows: int) -> WindowKeys:
        weight, heads = self.in_proj.weight, self.config.heads
        keys = weight.new_zeros(rows, self.config.window - 1, heads, self.in_proj.in_features // heads)
        return WindowKeys(keys, torch.zeros_like(keys), torch.zeros(rows, dtype=torch.int64, device=weight.device))


def attend(q: Tensor, k: Tensor, v: Tensor, begin: Tensor) -> Tensor:
    """Return (B, T, H, D): what T queries read of the keys and values (B, S + T, H, D) of the S tokens before and of
    their own; each of at most S tokens before its own, none before the place `begin` (B, T)."""
    before = k.shape[1] - q.shape[1]
    places = torch.arange(k.shape[1], device=q.device)
    own = places[before:, None]  # (T, 1)
    near = (places <= own) & (places >= own - before)  # (T, S + T)
    seen = near & ((places >= begin[..., None]) | (places == own))  # (B, T, S + T); padding sees itself
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
