"""A transformers decoder as a stream, whose attention is its own or, in some layers and heads, this library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rnn_longctx.models.adopt.cache import AdoptedCache, attends
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.carries import Carry, tree_zip
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.models.precision import state_dtype
from rnn_longctx.models.retrofit.attention import RetrofitAttention, carry_layer
from rnn_longctx.models.retrofit.parts import tokens_read
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.policy import PLAIN


class Retrofitted(Adopted):
    """A decoder of transformers as a stream. Its recurrent parts, if it has any, take remedies in its own forward too.

    Attributes:
        mixers: the recurrent parts of its layers, in order.
    """

    foldable = False

    def __init__(self, model: nn.Module):
        super().__init__(model, [])
        self.mixers: list[Any] = [part for attention in self.retrofitted for part in _recurrent(attention)]

    @property
    def attentions(self) -> list[Any]:
        """The attention of every layer, the library's or a retrofitted one."""
        return [layer.self_attn for layer in self.base.layers]

    @property
    def retrofitted(self) -> list[RetrofitAttention]:
        """The retrofitted ones of them."""
        return [attention for attention in self.attentions if isinstance(attention, RetrofitAttention)]

    @property
    def backend(self) -> str:
        names = {mixer.chosen_backend(self.device, self.dtype) for mixer in self.mixers}
        return "+".join(sorted(names)) or self.library

    def use_backend(self, name: str | None) -> None:
        for mixer in self.mixers:
            mixer.recurrence.backends.choose(PLAIN, name)
        for mixer in self.mixers:
            mixer.backend = name

    @property
    def hybrid(self) -> bool:
        return True  # (positions are counted and padding is masked as attention needs it)

    @property
    def attends(self) -> bool:
        return any(
            not isinstance(a, RetrofitAttention) or any(not isinstance(part, Recurrent) for part in a.parts)
            for a in self.attentions
        )

    def state_size(self) -> StateSize:
        size = StateSize()
        for attention in self.attentions:
            if isinstance(attention, RetrofitAttention):
                size = sum((part.state_size() for part in parts_of(attention)), size)
                continue
            own: Any = attention
            numbers = own.k_proj.out_features + own.v_proj.out_features
            window = window_of(attention)
            size += StateSize(per_token=numbers) if window is None else StateSize(windows={window - 1: numbers})
        return size

    def read_share(self, length: int) -> float:
        """Return how many keys and values the queries of a context of `length` tokens read in all layers and heads, as
        a share of those that full attention reads. A recurrence reads none."""
        full = length * (length + 1) // 2
        read = every = 0
        for attention in self.attentions:
            parts: list[Any] = parts_of(attention) if isinstance(attention, RetrofitAttention) else []
            for part in parts:
                read += len(part.of_heads.queries) * (tokens_read(part, length) or 0)
            window = None if parts else window_of(attention)
            if not parts:
                near = length if window is None else min(window, length)
                pairs = near * (near + 1) // 2 + (length - near) * near
                read += int(self.config.num_attention_heads) * pairs
            every += int(self.config.num_attention_heads) * full
        return read / every

    @property
    def state_dtype(self) -> torch.dtype | None:
        return next((mixer.state_dtype for mixer in self.mixers), None)

    def use_state_dtype(self, dtype: torch.dtype | str | None) -> None:
        rounded = state_dtype(dtype, self.dtype)
        for mixer in self.mixers:
            mixer.state_dtype = rounded

    @property
    def first_layer(self) -> nn.Module:
        return self.base.layers[0]

    def place_rows(self, cache: Any, before: Tensor) -> None:
        """Every carry counts its rows itself."""

    def new_cache(self) -> RetrofitCache:
        return RetrofitCache(self)


class RetrofitCache(AdoptedCache):
    """The cache of a retrofitted decoder: the library's, some of whose layers hold carries of parts."""

    def __init__(self, model: Retrofitted):
        super().__init__([])
        self.retrofitted = [attention.layer_idx for attention in model.retrofitted]

    def carries(self) -> list[Carry]:
        """Return the carries of the recurrent parts, in order."""
        held = [self.library.layers[i].carry for i in self.retrofitted]
        return [part for carry in held if carry is not None for part in carry.parts if isinstance(part, Carry)]

    def crop_attention(self, tokens: int) -> None:
        for layer in self.library.layers:
            if carry_layer(layer) and layer.carry is not None:
                parts = [c.cropped(tokens) if hasattr(c, "cropped") else c for c in layer.carry.parts]
                self.dropped = self.seen - min(tokens, layer.columns)
                layer.carry, layer.columns = type(layer.carry)(parts), min(tokens, layer.columns)
        if any(attends(layer) for layer in self.library.layers):
            super().crop_attention(tokens)

    def join_layer(self, layer: Any, layers: list[Any], cat: Callable) -> bool:
        if not carry_layer(layer):
            return False
        layer.carry = tree_zip(cat, [each.carry for each in layers])
        layer.columns = max(each.columns for each in layers)
        return True

    def _reorder(self, index: Tensor) -> None:
        self.library.reorder_cache(index)


def window_of(attention: Any) -> int | None:
    """Return how many tokens a layer of transformers attends to at most, or None where it attends to all."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def parts_of(attention: RetrofitAttention) -> list[Any]:
    """Return the parts that the heads of a retrofitted layer are shared out between."""
    return list(attention.parts)


def _recurrent(attention: RetrofitAttention) -> list[Recurrent]:
    return [part for part in attention.parts if isinstance(part, Recurrent)]
