"""Causal softmax attention as a layer that goes on from a carry: what full and sliding-window attention share, and of
it what every layer that attends does.

A row keeps the keys and values of the tokens that it has read, all of them or the last window - 1. Keys are kept as
they were turned, once, by their place in the row. What a query reads hangs on distances alone, so that a carry may be
cropped, and rows of unequal lengths put together: each counts its own places. Where positions are scaled otherwise than
when keys were read, these are turned on to where they would stand (`WindowKeys.scaled`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import carry
from rnn_longctx.models.flash import At, Pattern, one_softmax, readable
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.room import extended, newest
from rnn_longctx.models.rotary import Yarn, turned, turned_on
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.carry import ON_CPU
from rnn_longctx.recurrence.span import Span

CHUNK = 256  # queries whose scores are held at once
WITHOUT_CUDNN = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
_CHOICE = Lock()

carry(Yarn)


def _level(carries: list[WindowKeys]) -> list[WindowKeys]:
    """Return carries as wide as the widest, turned as the first; what stands before a row's tokens is not read."""
    width = max(c.keys.shape[1] for c in carries)
    carries = [c.scaled(carries[0].scaling) for c in carries]

    def widened(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, 0, width - tensor.shape[1], 0))

    return [replace(c, keys=widened(c.keys), values=widened(c.values)) for c in carries]


@carry(level=_level)
@dataclass
class WindowKeys:
    """The carry: the tokens read, with a window the last window - 1 at most, the newest at the right end.

    S is the same for all rows. One that began later, after padding or with a document of its own, holds fewer tokens.

    Attributes:
        keys, values: (B, S, H, D), of a room for more (`rnn_longctx.models.room`); keys as they were turned.
        held: (B,) int64 on the CPU, how many of them, at the right end, are tokens of the row's document.
        position: (B,) int64 on the CPU, the place of a row's next token, as keys are turned; padding has places, too.
        scaling: how the positions of all keys are scaled.
    """

    keys: Tensor
    values: Tensor
    held: Tensor = field(metadata=ON_CPU)
    position: Tensor = field(metadata=ON_CPU)
    scaling: Yarn | None = None

    @property
    def full(self) -> bool:
        """Whether every row holds as many tokens as there is room for."""
        return bool((self.held == self.keys.shape[1]).all())

    def cropped(self, tokens: int) -> WindowKeys:
        """Return the carry with the last `tokens` tokens alone."""
        first = max(0, self.keys.shape[1] - tokens)
        keys, values = self.keys[:, first:], self.values[:, first:]
        return replace(self, keys=keys, values=values, held=self.held.clamp(max=tokens))

    def places(self, begin: int, end: int) -> Tensor:
        """Return the places (T), or (B, T) where rows differ, of the tokens from `begin` up to `end`, counted from the
        next one: of those before it from -S on."""
        device = self.keys.device
        if bool((self.position == self.position[:1]).all()):
            first = int(self.position[:1].sum())  # (of no rows: 0)
            return torch.arange(first + begin, first + end, device=device)
        return self.position.to(device)[:, None] + torch.arange(begin, end, device=device)

    def scaled(self, scaling: Yarn | None) -> WindowKeys:
        """Return the carry with its keys as they are where positions are scaled so."""
        if scaling == self.scaling:
            return self
        places = self.places(-self.keys.shape[1], 0)
        return replace(self, keys=turned_on(self.keys, places, self.scaling, scaling), scaling=scaling)


class Attention(nn.Module):
    """A layer's projections to queries, keys and values, and back. A subclass has a name, a `Config` with `heads`, and
    a carry of its own.

    Attributes:
        rotary: whether queries and keys are turned by their places.
        spreads: whether several ranks may share a stream.
    """

    name: ClassVar[str]
    attends: ClassVar[bool] = True
    spreads: ClassVar[bool] = False

    def __init__(self, config: Any, model: Shape):
        super().__init__()
        self.config = config
        self.make_projections(model)

    def make_projections(self, model: Any) -> None:
        """Make `in_proj` and `out_proj`."""
        heads = self.config.heads
        if model.d_model % (heads * (2 if self.rotary else 1)):
            size = " of even size" if self.rotary else ""
            raise InputError(f"{self.name}: d_model = {model.d_model} does not divide into {heads} heads{size}")
        self.in_proj = nn.Linear(model.d_model, 3 * model.d_model, bias=False)
        self.out_proj = nn.Linear(model.d_model, model.d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: Any, model: Shape) -> Self:
        return cls(config, model)

    @property
    def rotary(self) -> bool:
        return True

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device that a new carry is to have."""
        return self.in_proj.weight

    @property
    def head_dim(self) -> int:
        """D, the channels of a head."""
        return self.in_proj.in_features // self.config.heads

    @property
    def kv_heads(self) -> int:
        """How many heads of keys and values `projected` gives. Several heads of queries may share one (`by_head`)."""
        return self.config.heads

    def by_head(self, x: Tensor, dim: int) -> Tensor:
        """Return for each head of queries what x holds along `dim` for the heads of keys and values."""
        return x

    def turn(self, q: Tensor, k: Tensor, places: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Return queries and keys of a call's tokens turned by their places (T) or (B, T) in their documents."""
        return turned(q, places), turned(k, places)

    def projected(self, u: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (B, T, H, D) each, of u. Raises InputError for a part of a stream that
        several ranks share."""
        if span.shard is not None and not self.spreads:
            raise InputError(f"{self.name} cannot be followed where a context is read over several ranks")
        return self.in_proj(u).unflatten(-1, (3, self.config.heads, -1)).unbind(2)

    def pairs(self, length: int) -> int | None:
        """Return how many pairs of a query and a key all heads compare in a document of `length` tokens, or None where
        nobody has counted them."""
        return None

    def operations(self, length: int) -> int | None:
        """Return the operations (a product and a sum are two) of the matrix products that reading `length` tokens
        takes: projections, scores and sums of values, and nothing that a kernel works out beside them. None: see
        `pairs`."""
        d_model, pairs = self.in_proj.in_features, self.pairs(length)
        return None if pairs is None else 8 * d_model**2 * length + 4 * d_model // self.config.heads * pairs


class CausalAttention(Attention):
    """A layer of attention that says what is seen of what was read.

    Attributes:
        window: tokens that a token attends to, itself among them; None: all before it.
        yarn: how rotary positions are scaled, by a remedy, or None; set it, and the next token is read so.
    """

    yarn: Yarn | None = None

    @property
    def window(self) -> int | None:
        return None

    def forward(self, u: Tensor, carry: WindowKeys | None, span: Span) -> tuple[Tensor, WindowKeys]:
        carry = self.new_carry(len(u)) if carry is None else carry
        before, length = carry.keys.shape[1], u.shape[1]
        window = before + length if self.window is None else self.window
        q, k, v = self.projected(u, span)
        if self.rotary:
            carry, places = carry.scaled(self.yarn), carry.places(0, length)
            q, k = turned(q, places, self.yarn), turned(k, places, self.yarn)
        k, v = (extended(carry.keys, k), extended(carry.values, v))  # (B, S + T, H, D)
        alike = span.mask is None and span.reset is None and carry.full
        if alike and before + length <= window and (before == 0 or length == 1 or readable(q)):
            y, held = _all_before(q, k, v), carry.held + length
        else:
            begin = begins((before - carry.held).to(u.device), before, length, span)  # (B, T)
            y, held = _chunks(q, k, v, begin, window), (before + length - begin[:, -1]).cpu()
        last = before + length if self.window is None else window - 1  # the most that are kept
        after = replace(
            carry,
            keys=newest(k, last),
            values=newest(v, last),
            held=held.clamp(max=last),
            position=carry.position + length,
        )
        return self.out_proj(y.flatten(2)), after

    def pairs(self, length: int) -> int:
        window = length if self.window is None else min(self.window, length)
        return self.config.heads * (window * (window + 1) // 2 + (length - window) * window)

    def state_size(self) -> StateSize:
        numbers = 2 * self.in_proj.in_features
        return StateSize(per_token=numbers) if self.window is None else StateSize(windows={self.window - 1: numbers})

    def new_carry(self, rows: int) -> WindowKeys:
        keys = self.like.new_zeros(rows, 0, self.kv_heads, self.head_dim)
        none = torch.zeros(rows, dtype=torch.int64, device="cpu")
        return WindowKeys(keys, torch.zeros_like(keys), none, none.clone())


def begins(first: Tensor, before: int, length: int, span: Span) -> Tensor:
    """Return the place (B, T) where each token's document begins, or what is left of it.

    Args:
        first: (B,), the place where the document that the carry holds begins.
        before: the place of the call's first token.
        length: T, the tokens of the call.
    """
    if span.mask is not None:  # padding stands before the first token of a row
        first = first + length - span.mask.sum(1)
    if span.reset is None:
        return first[:, None].expand(-1, length)
    places = torch.arange(before, before + length, device=first.device)
    return torch.where(span.reset, places, first[:, None]).cummax(1).values


def _all_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what T queries read of the keys and values (B, S + T, H, D) of all tokens up to each of their own."""
    before, length = k.shape[1] - q.shape[1], q.shape[1]
    if before == 0:
        return softmax(q, k, v)
    if length == 1:  # it sees everything, and nothing is copied for it
        return softmax(q, k, v, causal=False)
    held = k[:, :before].transpose(1, 2), v[:, :before].transpose(1, 2)
    whole = At((Pattern(before + length, 1),), before, length)
    return one_softmax(q, k[:, before:], v[:, before:], [held], whole)


def _chunks(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, window: int) -> Tensor:
    """Return `attend` of CHUNK queries at a time."""
    before, chunks = k.shape[1] - q.shape[1], []
    for t in range(0, q.shape[1], CHUNK):
        queries = q[:, t : t + CHUNK]
        first = max(0, before + t - (window - 1))
        seen = slice(first, before + t + queries.shape[1])
        chunks.append(attend(queries, k[:, seen], v[:, seen], begin[:, t : t + CHUNK] - first, window))
    return torch.cat(chunks, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, window: int) -> Tensor:
    """Return (B, T, H, D): what T queries read of the keys and values (B, S + T, H, D) of the S tokens before and of
    their own; each of `window` tokens at most, its own the last, none before the place `begin` (B, T)."""
    before = k.shape[1] - q.shape[1]
    places = torch.arange(k.shape[1], device=q.device)
    queries = places[before:, None]  # (T, 1)
    near = (places <= queries) & (places > queries - window)  # (T, S + T)
    seen = near & ((places >= begin[..., None]) | (places == queries))  # (B, T, S + T); padding sees itself
    return softmax(q, k, v, seen[:, None])


def softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, causal: bool = True) -> Tensor:
    """Return softmax attention (B, T, H, D) of queries over what they see: (B, 1, T, S) bool; None: their own place and
    all before it, of as many keys, or everything, where it is not causal."""
    causal = causal and seen is None
    with _unplanned() if q.is_cuda and q.shape[1] == 1 else nullcontext():
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, is_causal=causal
        )
    return y.transpose(1, 2)


@contextmanager
def _unplanned() -> Iterator[None]:
    """Inside, PyTorch has the choice among the kernels that it has outside, but for cuDNN's, which plans every number
    of keys anew: a token waits 1.5 ms a layer for it (torch 2.11, H200)."""
    with _CHOICE:  # which is the process's, and not a thread's
        others = [kernel for kernel, is_on in WITHOUT_CUDNN.items() if is_on()]
        with sdpa_kernel(others) if others and torch.backends.cuda.cudnn_sdp_enabled() else nullcontext():
            yield


def weighed(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return softmax attention (..., T, D) of queries (..., T, D) over keys (..., D, S) and values (..., S, D) in plain
    products, and the logarithms (..., T) of the softmax's denominators, at least float32, so that parts of what a query
    reads can be put together. seen: (..., T, S) bool, for each query some; None: all."""
    scores = (q @ k).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    exponentials = (scores - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    return (exponentials.to(v.dtype) @ v) / total.to(v.dtype), (largest + total.log())[..., 0]
