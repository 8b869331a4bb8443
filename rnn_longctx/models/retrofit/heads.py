"""Heads of a transformers attention layer as the mixers of this library see them: what they take over.

Projections, norms of queries and keys, and the output projection stay the layer's own, and so do its rotary angles. A
part reads the queries, keys and values that the layer made of a call's tokens, and gives back what its heads read, not
yet projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rnn_longctx.recurrence.span import Span

QUERIES, KEYS, VALUES, COS, SIN = "queries", "keys", "values", "cos", "sin"  # what a layer shares with its parts


@dataclass(frozen=True)
class Heads:
    """The heads of a layer that a part takes over.

    Attributes:
        queries: their numbers in the layer.
        keys: the numbers of the heads of keys and values that they read.
        which: of each head of queries, the place in `keys` of the one that it reads.
        head_dim: the channels of a head.
        d_model, norm_eps: the layer's.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    which: tuple[int, ...]
    head_dim: int
    d_model: int
    norm_eps: float

    @classmethod
    def of(cls, attention: Any, queries: tuple[int, ...]) -> Heads:
        """Return those heads of queries of a layer of transformers, and what belongs to them."""
        shared = [head // attention.num_key_value_groups for head in queries]
        keys = sorted(set(shared))
        return cls(
            tuple(queries),
            tuple(keys),
            tuple(keys.index(head) for head in shared),
            int(attention.head_dim),
            int(attention.config.hidden_size),
            float(getattr(attention.config, "rms_norm_eps", 1e-6)),
        )


class OfHeads(nn.Module):
    """What every part of a retrofitted layer has, before the class of its mixer.

    Attributes:
        of_heads: the heads that it takes over.
    """

    of_heads: Heads
    place: Tensor

    def take(self, heads: Heads) -> None:
        self.of_heads = heads
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device that a new carry is to have."""
        return self.place

    @property
    def head_numbers(self) -> tuple[int, ...]:
        """The numbers of the heads in the layer."""
        return self.of_heads.queries

    @property
    def head_dim(self) -> int:
        return self.of_heads.head_dim

    @property
    def kv_heads(self) -> int:
        return len(self.of_heads.keys)

    def by_head(self, x: Tensor, dim: int) -> Tensor:
        """Return for each head of queries what x holds along `dim` for the heads of keys and values."""
        which = self.of_heads.which
        if which == tuple(range(self.kv_heads)):
            return x
        return x.index_select(dim, torch.tensor(which, device=x.device))

    def shared(self, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries (B, T, H, D), keys and values (B, T, K, D) of these heads, before they are turned."""
        assert span.shared is not None
        queries, keys = self.of_heads.queries, self.of_heads.keys
        return (_some(span.shared[QUERIES], queries), _some(span.shared[KEYS], keys), _some(span.shared[VALUES], keys))


def _some(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    if heads == tuple(range(x.shape[2])):
        return x
    return x.index_select(2, torch.tensor(heads, device=x.device))


def turned_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, T, H, D) turned by the layer's own angles, cos and sin (B, T, D), as transformers does."""
    a, b = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-b, a], -1) * sin[:, :, None]
