"""The cache of an adopted model: the library's own, as a stream's."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt import beside
from rnn_longctx.models.adopt.mixer import AdoptedMixer
from rnn_longctx.models.cache import level_tails
from rnn_longctx.models.carries import Carry
from rnn_longctx.recurrence.carry import ScanCarry

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # from transformers 5.24 on; hybrids, pure models before


def cache_in(arguments: dict[str, Any]) -> Any:
    """Return the cache among the arguments of a mixer of transformers, or None."""
    return next((arguments[n] for n in CACHE_NAMES if arguments.get(n) is not None), None)


def cache_name(module: nn.Module) -> str:
    """Return what a module of transformers calls the cache, as an argument and in its output."""
    parameters = inspect.signature(module.forward).parameters
    name = next((n for n in CACHE_NAMES if n in parameters), None)
    if name is None:
        raise InputError(f"{type(module).__name__} takes no cache: mitigate it, and read with its own forward")
    return name


@functools.cache
def unattended() -> Any:
    """Return the class of a transformers cache for hybrids whose layers are all recurrent: to make attention's mask,
    which no layer takes, transformers (5.24) asks the first layer that attends how much it holds, and finds none."""
    from transformers import DynamicCache

    class Unattended(DynamicCache):
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return query_length, 0

    return Unattended


def attention_layers(config: Any) -> int:
    """Return how many layers of a model's cache, that a config of transformers describes, keep keys and values."""
    from transformers import DynamicCache

    return sum(hasattr(layer, "get_seq_length") for layer in DynamicCache(config=config).layers)


def widest_attention(modules: Iterable[Any]) -> int:
    """Return how many numbers of keys and values a layer of attention among these modules keeps for a token: those of
    a family are equally wide. (Zamba2's layers share one module, so layers are counted in the cache. Latent attention
    keeps what its keys and values are made of.)"""
    widths = []
    for m in modules:
        if hasattr(m, "k_proj"):
            widths.append(m.k_proj.out_features + m.v_proj.out_features)
        if hasattr(m, "kv_lora_rank"):
            widths.append(m.kv_lora_rank + m.qk_rope_head_dim)
    return max(widths)


class AdoptedCache:
    """A library's cache as a stream's: recurrent layers as carries, attention's beside them.

    Attributes:
        library: the library's own, or None before the first token.
        position: (B,) int64 on the CPU, tokens each row has read.
        seen, padding: columns read since the library's cache was new, and how many of them are a row's padding (B,).
        dropped: how many of the first columns attention holds no more.
        tail: see `Cache`.
        torn: whether a call broke off (out of memory, an interrupt): the library moves its cache on layer by layer, and
            some of its layers have read what others have not.
    """

    torn = False

    def __init__(self, mixers: list[AdoptedMixer]):
        self.mixers = mixers
        self.library: Any = None
        self.position = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.seen = self.dropped = 0
        self.padding: Tensor | None = None
        self.tail: Tensor | None = None

    @property
    def layers(self) -> list[Carry]:
        """The carries of the recurrent layers, in order; empty before the first token. `scan.state` is what the library
        holds (the windowed state under a window); `log_decay` is not a number where no policy was active."""
        return [] if self.library is None else self.carries()

    @layers.setter
    def layers(self, layers: list[Carry]) -> None:
        if layers:
            raise InputError("the layers of an adopted model's cache can be dropped, not replaced")
        self.library, self.seen, self.padding, self.dropped, self.torn = None, 0, None, 0, False

    def carries(self) -> list[Carry]:
        """Return what `layers` is after the first token."""
        carries = []
        for mixer in self.mixers:
            layer = mixer.layer_of(self.library)
            # (a copy: the library writes into its own)
            state, counted = (
                mixer.state_of(layer).clone(memory_format=torch.contiguous_format),
                getattr(layer, "beside", None),
            )
            total = counted.log_decay if counted is not None else None
            if total is None:
                total = mixer.no_log_decay(state)
            carries.append(Carry(mixer.conv_of(self.library), ScanCarry(state, self.position, total)))
        return carries

    def crop_attention(self, tokens: int) -> None:
        """Drop attention's keys and values but for the last `tokens` columns.

        Raises:
            InputError: some layers of attention hold fewer tokens than others, and see `attends`.
        """
        layers = [layer for layer in self.library.layers if attends(layer)]
        if len({layer.keys.shape[2] for layer in layers}) > 1:
            raise InputError("layers of attention that hold unequally many tokens cannot be cropped together")
        for layer in layers:
            self.dropped = self.seen - min(tokens, layer.keys.shape[2])
            layer.keys, layer.values = layer.keys[:, :, -tokens:], layer.values[:, :, -tokens:]
            count_columns(layer, layer.keys.shape[2])

    def clone(self) -> Self:
        new = copy.copy(self)
        new.library = copy.deepcopy(self.library)
        return new

    def snapshot(self) -> Self:
        """Return the cache as it is now: a clone, since the library writes into its own."""
        return self.clone()

    def restore(self, other: AdoptedCache) -> None:
        """Become what another cache is, in place; the other is given up, since both share the library's cache."""
        vars(self).update(vars(other))

    def rows(self, index: Tensor | list[int]) -> Self:
        """Return the cache of some rows, in that order (beam search, ragged batches)."""
        index = torch.as_tensor(index, device=getattr(index, "device", "cpu"))
        new = self.clone()
        if new.library is not None:
            new._reorder(index)
        new.position = self.position[index.cpu()]
        new.padding = self.padding if self.padding is None else self.padding[index.cpu()]
        new.tail = self.tail if self.tail is None else self.tail[index.to(self.tail.device)]
        return new

    @staticmethod
    def concat(parts: list[Any], order: list[int]) -> Any:
        """Return the rows of several caches as one cache; see `Cache.concat`.

        Where rows have read unequally much, attention's keys and values (B, heads, T, dim) are padded at the left, as
        if so many columns of padding had stood before the row.

        Raises:
            InputError: rows under a cropped attention, and see `attends`.
        """
        cat, new = in_order(order), parts[0].clone()
        if any(p.dropped for p in parts):
            raise InputError("rows whose attention was cropped cannot be put together")
        for i, layer in enumerate(new.library.layers):
            layers = [p.library.layers[i] for p in parts]
            if new.join_layer(layer, layers, cat):
                continue
            for states in ("conv_states", "recurrent_states"):
                for k, state in getattr(layer, states, {}).items():
                    if state is not None:  # (a layer of an MLP alone has places for states, in transformers 5.17)
                        getattr(layer, states)[k] = cat([getattr(each, states)[k] for each in layers])
            if attends(layer):
                for what in ("keys", "values"):
                    tensors = [getattr(each, what) for each in layers]
                    longest = max(t.shape[2] for t in tensors)
                    setattr(layer, what, cat([F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in tensors]))
                count_columns(layer, max(p.seen for p in parts))
            besides: list[Any] = [getattr(each, "beside", None) for each in layers]
            if besides[0] is not None:
                layer.beside = beside.joined(besides, cat)
        new.stand_where(parts, cat)
        return new

    def join_layer(self, layer: Any, layers: list[Any], cat: Callable) -> bool:
        """Put the rows of `layers`, one of each cache, into a layer of this one where it is of a kind of its own, and
        return whether it is."""
        return False

    def stand_where(self, parts: list[AdoptedCache], cat: Callable) -> None:
        """Say where the rows stand, of a cache that was made of others."""
        seen = max(p.seen for p in parts)
        shifts = [torch.full((len(p.position),), seen - p.seen, device="cpu") for p in parts]
        self.seen, self.position = seen, cat([p.position for p in parts])
        self.padding = cat([s if p.padding is None else s + p.padding for p, s in zip(parts, shifts)])
        self.tail = None if self.tail is None else cat(level_tails(parts))

    def _reorder(self, index: Tensor) -> None:
        mixer = self.mixers[0]
        self.library.reorder_cache(index.to(mixer.state_of(mixer.layer_of(self.library)).device))


def in_order(order: list[int]) -> Callable[[list[Tensor]], Tensor]:
    """Return what puts tensors together whose i-th row belongs at row order[i]."""
    back = torch.tensor(order, device="cpu").argsort()
    return lambda tensors: torch.cat(tensors)[back.to(tensors[0].device)]


def attends(layer: Any) -> bool:
    """Whether a layer of a library's cache holds keys and values.

    Raises:
        InputError: the layer holds them in another form (quantised), or more beside them (an indexer's keys).
    """
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor):
        return False
    indexed = getattr(layer, "indexer_keys", None) is not None
    slides = getattr(layer, "is_sliding", False) and not hasattr(layer, "cumulative_length")
    if slides or keys.ndim != 4 or indexed:
        raise InputError(f"a {type(layer).__name__} of the library's cache can be gone on from, not taken apart")
    return True


def count_columns(layer: Any, columns: int) -> None:
    """Say how many columns a layer of sliding attention has read, those that it holds no more among them: others count
    what they hold."""
    if getattr(layer, "is_sliding", False):
        layer.cumulative_length = columns
