"""How much each head reads of each block of tokens: of a layer of transformers its softmax weights, summed up block by
block; of a retrofitted one the same numbers, whatever stands there.

What a mixer reads is linear in the values. So where the values are 1 in a block and 0 elsewhere, its output is the
weight of that block; a head of D channels gives D blocks at once. (A recurrence's weights may be negative, and its norm
is left out.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.models.retrofit.attention import RetrofitAttention, project
from rnn_longctx.models.retrofit.heads import turned_by
from rnn_longctx.models.retrofit.model import window_of
from rnn_longctx.models.retrofit.recurrences import RecurrentPart

QUERIES = 256  # whose weights are held at once


@dataclass
class Inputs:
    """What a layer's attention was given in a call, and what it gave.

    Attributes:
        u: (B, T, hidden_size).
        angles: cos and sin (1 or B, T, D).
        output: (B, T, hidden_size).
    """

    u: Tensor
    angles: tuple[Tensor, Tensor]
    output: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def watched(attentions: Sequence[Any]) -> Iterator[dict[int, Inputs]]:
    """Give a dict in which, after every call of the model inside the block, the inputs of these layers stand by their
    places in the list."""
    seen: dict[int, Inputs] = {}

    def before(i: int) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            u = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen[i] = Inputs(u, kwargs["position_embeddings"])

        return note

    def after(i: int) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            seen[i].output = out[0]

        return note

    handles = []
    for i, attention in enumerate(attentions):
        handles.append(attention.register_forward_pre_hook(before(i), with_kwargs=True))
        handles.append(attention.register_forward_hook(after(i), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def softmax_weights(attention: Any, inputs: Inputs, queries: slice) -> Tensor:
    """Return the weights (B, H, t, T), at least float32, of a layer of transformers, of some of its queries."""
    u, (cos, sin) = inputs.u, inputs.angles
    wide = torch.promote_types(u.dtype, torch.float32)
    q, k, _ = project(attention, u)
    q = turned_by(q[:, queries], cos[:, queries], sin[:, queries]).to(wide)
    k = turned_by(k, cos, sin).to(wide).repeat_interleave(attention.num_key_value_groups, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * attention.scaling
    places = torch.arange(u.shape[1], device=u.device)
    back = places[queries, None] - places
    window = window_of(attention)
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    return scores.masked_fill(~seen, -math.inf).softmax(3)


def in_blocks(weights: Tensor, block: int) -> Tensor:
    """Return (..., M) of weights (..., T): their sums over blocks of tokens, the last of which may be cut short."""
    return F.pad(weights, (0, -weights.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def pooled(attention: Any, inputs: Inputs, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield, some queries at a time, which they are and how much each head reads of each block, (B, H, t, M)."""
    length = inputs.u.shape[1]
    if isinstance(attention, RetrofitAttention):
        whole = _of_parts(attention, inputs, block)
        for t in range(0, length, QUERIES):
            queries = slice(t, min(t + QUERIES, length))
            yield queries, whole[:, :, queries]
        return
    for t in range(0, length, QUERIES):
        queries = slice(t, min(t + QUERIES, length))
        yield queries, in_blocks(softmax_weights(attention, inputs, queries), block)


def _of_parts(attention: RetrofitAttention, inputs: Inputs, block: int) -> Tensor:
    rows, length = inputs.u.shape[:2]
    size, keys = attention.head_dim, attention.kv_heads
    of = torch.arange(length, device=inputs.u.device) // block
    weights = []
    with _without_norms(attention):
        for first in range(0, -(-length // block), size):
            values = (of[:, None] == first + torch.arange(size, device=of.device)).to(inputs.u.dtype)
            y, _ = attention.read(inputs.u, inputs.angles, values=values[None, :, None].expand(rows, -1, keys, -1))
            weights.append(y.transpose(1, 2))
    return torch.cat(weights, 3)[..., : -(-length // block)].abs()


@contextmanager
def _without_norms(attention: RetrofitAttention) -> Iterator[None]:
    parts = [part for part in attention.parts if isinstance(part, RecurrentPart)]
    norms = [part.norm for part in parts]
    try:
        for part in parts:
            part.norm = nn.Identity()  # type: ignore[assignment]
        yield
    finally:
        for part, norm in zip(parts, norms, strict=True):
            part.norm = norm
