"""The attention of one layer of a transformers decoder, some or all of whose heads are taken over.

It stands where the library's module stood, holds the same projections and norms, under the same names, and is called in
the same way: by the model's own forward and generate, and so by ours. What a part hands on from one call to the next
lies in the library's cache, in a layer of another class, so that beams and copies move it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.cache import cache_in
from rnn_longctx.models.adopt.dispatch import pads_explained, read_mask, static_attention
from rnn_longctx.models.carries import carry
from rnn_longctx.models.retrofit.heads import COS, KEYS, QUERIES, SIN, VALUES, Heads
from rnn_longctx.models.retrofit.parts import FULL, make_part
from rnn_longctx.models.retrofit.recurrences import RecurrentPart
from rnn_longctx.recurrence.carry import tree_map
from rnn_longctx.recurrence.span import Span

OWN = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")  # what a layer keeps of the library's


@carry
@dataclass
class LayerParts:
    """The carries of a retrofitted layer, part by part."""

    parts: list[Any]


class RetrofitAttention(nn.Module):
    """The attention of a layer whose heads are shared out between parts.

    Args:
        original: the library's attention, whose projections and norms this one holds.
        mixers: of each part its mixer and the heads of queries that it takes over. The rest stay full attention.
    """

    def __init__(self, original: Any, mixers: tuple[tuple[str, tuple[int, ...]], ...]):
        super().__init__()
        self.config, self.layer_idx = original.config, original.layer_idx
        self.head_dim, self.num_key_value_groups = original.head_dim, original.num_key_value_groups
        self.kv_heads = int(original.config.num_attention_heads) // original.num_key_value_groups
        for name in OWN:
            if isinstance(module := getattr(original, name, None), nn.Module):
                setattr(self, name, module)
        number = int(original.config.num_attention_heads)
        taken = {head for _, heads in mixers for head in heads}
        rest = tuple(head for head in range(number) if head not in taken)
        self.o_proj: nn.Module
        self.mixers = (*mixers, (FULL, rest)) if rest else mixers
        self.parts = nn.ModuleList(make_part(text, Heads.of(original, heads)) for text, heads in self.mixers)
        weight = original.q_proj.weight
        self.parts.to(weight.device, weight.dtype)
        for part in self.parts:
            if isinstance(part, RecurrentPart):
                part.keep_wide()
        order = [head for _, heads in self.mixers for head in heads]
        self.order = tuple(order.index(head) for head in range(number))  # where each head stands in the parts' outputs

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Read hidden_states (B, T, hidden_size) as the library's attention does, and return as much; there are no
        attention weights to return. Raises InputError for a cache of fixed size."""
        cache, u = cache_in(kwargs), hidden_states
        if static_attention(cache):
            raise InputError(
                'a retrofitted layer needs the cache that grows: generate without cache_implementation="static"'
            )
        layer = None if cache is None else _layer(cache, self.layer_idx)
        before = None if layer is None or layer.carry is None else layer.carry.parts
        y, carries = self.read(u, position_embeddings, read_mask(attention_mask, u), before)
        if layer is not None:
            layer.put(LayerParts(carries), u.shape[1])
        return self.o_proj(y.flatten(2)), None

    def read(
        self,
        u: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        before: list[Any] | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Return what the heads read of u (B, T, hidden_size), (B, T, H, D), and the parts' carries after it.

        Args:
            angles: cos and sin (1 or B, T, D) of the tokens' places.
            mask: (B, T) bool, False at padding. before: the parts' carries; None begins.
            values: (B, T, K, D), in the place of the values that the layer makes.
        """
        q, k, v = project(self, u)
        cos, sin = (x.expand(len(u), -1, -1) for x in angles)
        shared = {QUERIES: q, KEYS: k, VALUES: v if values is None else values, COS: cos, SIN: sin}
        span = Span(mask, shared=shared)
        carries = [None] * len(self.parts) if before is None else before
        with pads_explained(mask):
            read = [part(u, carry, span) for part, carry in zip(self.parts, carries, strict=True)]
        y = torch.cat([out for out, _ in read], 2).unflatten(2, (-1, self.head_dim))
        if self.order != tuple(range(len(self.order))):
            y = y.index_select(2, torch.tensor(self.order, device=u.device))
        return y, [carry for _, carry in read]


def project(attention: Any, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values (B, T, heads, D) that a layer of transformers makes of u, before it turns
    them."""
    q, k, v = (
        getattr(attention, name)(u).unflatten(-1, (-1, attention.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


def carry_layer(layer: Any) -> bool:
    """Whether a layer of a library's cache is of the class that holds a retrofitted layer's carry."""
    return hasattr(layer, "carry")


@functools.cache
def _carrying() -> Any:
    """Return the class of a cache's layer that holds the carries of a retrofitted one."""
    from transformers.cache_utils import CacheLayerMixin

    class CarryLayer(CacheLayerMixin):
        is_sliding = False

        def __init__(self) -> None:
            super().__init__()
            self.carry: LayerParts | None = None
            self.columns = 0

        def put(self, carry: LayerParts, read: int) -> None:
            self.carry, self.columns, self.is_initialized = carry, self.columns + read, True

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            raise NotImplementedError("a retrofitted layer keeps its own carry")

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("a retrofitted layer keeps its own carry")

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.columns + query_length, 0

        def get_seq_length(self) -> int:
            return self.columns

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length  # (its name before transformers 5.24)

        def offload(self) -> None:
            pass

        def prefetch(self) -> None:
            pass

        def reset(self) -> None:
            self.carry, self.columns, self.is_initialized = None, 0, False

        def crop(self, *args: Any, **kwargs: Any) -> None:
            raise InputError("a retrofitted layer cannot forget its last tokens again: no assisted generation")

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self._select(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.carry is not None:
                self.carry = tree_map(lambda t: t.repeat_interleave(repeats, 0), self.carry)

        def batch_select_indices(self, indices: Tensor) -> None:
            self._select(indices)

        def _select(self, rows: Tensor) -> None:
            if self.carry is not None:
                self.carry = tree_map(lambda t: t[rows.to(t.device)], self.carry)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _rebuild, (), self.__dict__

    return CarryLayer


def _rebuild() -> Any:
    return object.__new__(_carrying())


def _layer(cache: Any, layer_idx: int) -> Any:
    """Return the layer of a cache that holds the carries of a retrofitted one; the cache gets it, where it has none."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    if not carry_layer(cache.layers[layer_idx]):
        cache.layers[layer_idx] = _carrying()()
    return cache.layers[layer_idx]
