"""Rows of an adopted model's cache, hybrid or pure: put together, kept in a file, and documents packed into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.layer import Beside
from rnn_longctx.models.cache import Cache, Carry, level_tails, tree_zip
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.ssd.window import level, window_state

if TYPE_CHECKING:
    from rnn_longctx.models.adopt.cache import AdoptedCache
    from rnn_longctx.models.adopt.model import Adopted


def concat(parts: list[AdoptedCache], order: list[int]) -> AdoptedCache:
    """As `Cache.concat`. Where rows have read unequally much, attention's keys and values (B, heads, T, dim) are padded
    at the left, as if so many columns of padding had stood before the row.

    Raises:
        InputError: rows under a cropped attention, and see `attends`.
    """
    cat, new = in_order(order), parts[0].clone()
    if any(p.dropped for p in parts):
        raise InputError("rows whose attention was cropped cannot be put together")
    for i, layer in enumerate(new.library.layers):
        layers = [p.library.layers[i] for p in parts]
        for states in ("conv_states", "recurrent_states"):
            for k, state in getattr(layer, states, {}).items():
                if state is not None:  # (a layer of an MLP alone has places for states, in transformers 5.17)
                    getattr(layer, states)[k] = cat([getattr(each, states)[k] for each in layers])
        if attends(layer):
            for what in ("keys", "values"):
                tensors = [getattr(each, what) for each in layers]
                longest = max(t.shape[2] for t in tensors)
                setattr(layer, what, cat([F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in tensors]))
        besides: list[Any] = [getattr(each, "beside", None) for each in layers]
        if besides[0] is not None:
            layer.beside = join_besides(besides, cat)
    place(new, parts, cat)
    return new


def in_order(order: list[int]) -> Callable[[list[Tensor]], Tensor]:
    """Puts tensors together whose i-th row belongs at row order[i]."""
    back = torch.tensor(order, device="cpu").argsort()
    return lambda tensors: torch.cat(tensors)[back.to(tensors[0].device)]


def join_besides(besides: list[Beside], cat: Callable) -> Beside:
    """What lies beside one layer's states, of all rows."""
    if windows := [b.window for b in besides if b.window is not None]:
        besides = [replace(b, window=w) for b, w in zip(besides, level(windows))]
    return tree_zip(cat, besides)


def place(new: AdoptedCache, parts: list[AdoptedCache], cat: Callable) -> None:
    """Say where the rows of a cache stand that was made of others."""
    seen = max(p.seen for p in parts)
    shifts = [torch.full((len(p.position),), seen - p.seen, device="cpu") for p in parts]
    new.seen, new.position = seen, cat([p.position for p in parts])
    new.padding = cat([s if p.padding is None else s + p.padding for p, s in zip(parts, shifts)])
    new.tail = None if new.tail is None else cat(level_tails(parts))


def read_packed(model: Adopted, ids: Tensor, cache: AdoptedCache, reset: Tensor) -> Tensor:
    """`Adopted.read` of rows in which documents begin where reset (B, T) is True: each document is read as a row of its
    own, one after the other, since the families' convolutions keep documents apart with a kernel of theirs only. The
    cache is left at each row's last document; positions count from its beginning."""
    parts, hidden = [], []
    for row, begins in enumerate(reset.tolist()):
        cuts = [t for t in range(ids.shape[1] + 1) if t in (0, ids.shape[1]) or begins[t]]
        part, found = cache.rows([row]) if cache.seen else model.new_cache(), []
        for start, end in zip(cuts, cuts[1:]):
            part = model.new_cache() if begins[start] else part
            found.append(model.read(ids[row : row + 1, start:end], part))
        parts.append(part)
        hidden.append(torch.cat(found, 1))
    whole = concat(parts, list(range(len(parts))))
    cache.library, cache.position, cache.seen, cache.padding = whole.library, whole.position, whole.seen, whole.padding
    return torch.cat(hidden)


def to_cache(cache: AdoptedCache) -> tuple[Cache, dict[str, Tensor]]:
    """The recurrent layers as a `Cache`, and beside it the keys and values of attention, where it stands in the stream
    (columns read, columns dropped) and the rows' padding; new tensors or views. Raises InputError: see `attends`."""
    found = Cache([], cache.position, cache.tail)
    extra = {"columns": torch.tensor([cache.seen, cache.dropped], device="cpu")}
    if cache.padding is not None:
        extra["padding"] = cache.padding
    for mixer, carry in zip(cache.mixers, cache.layers):
        beside = mixer.beside(cache.library.layers[mixer.module.layer_idx])
        # (under no policy the library steps itself, past what lies beside)
        if mixer.active and beside is not None and beside.log_decay is not None:
            state = carry.scan.state if beside.window is None else beside.window.block
            carry = Carry(carry.conv, ScanCarry(state, beside.position, beside.log_decay, beside.window))
        found.layers.append(carry)
    for i, layer in enumerate(cache.library.layers if cache.library is not None else ()):
        if attends(layer):
            extra |= {f"keys.{i}": layer.keys, f"values.{i}": layer.values}
    return found, extra


@torch.no_grad()
def from_cache(model: Adopted, kept: Cache, extra: dict[str, Tensor]) -> AdoptedCache:
    """The cache that `to_cache` was given, for the model whose it was, under the policies of then."""
    new = model.new_cache()
    if kept.layers:
        # one token, so that the library makes a cache of its own kinds of layers, which are then filled
        model.read(torch.zeros(len(kept.position), 1, dtype=torch.int64, device=model.device), new)
        new.seen, new.dropped = extra["columns"].tolist()
        for mixer, carry in zip(model.mixers, kept.layers):
            layer = new.library.layers[mixer.module.layer_idx]
            shape = layer.recurrent_states[0].shape
            layer.conv_states[0], layer.recurrent_states[0] = carry.conv, window_state(carry.scan).reshape(shape)
            if mixer.active:
                mixer.keep(layer, Beside(mixer._era, carry.scan.position, carry.scan.log_decay, carry.scan.window))
        for i, layer in enumerate(new.library.layers):
            if attends(layer):
                layer.keys, layer.values = (extra[f"{what}.{i}"].to(model.device) for what in ("keys", "values"))
    new.position, new.tail, new.padding = kept.position, kept.tail, extra.get("padding")
    return new


def attends(layer: Any) -> bool:
    """Whether a layer of a library's cache holds keys and values.

    Raises:
        InputError: the layer forgets old ones by itself, or holds them in another form (quantised).
    """
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor):
        return False
    if getattr(layer, "is_sliding", False) or keys.ndim != 4:
        raise InputError(f"a {type(layer).__name__} of the library's cache can be gone on from, not taken apart")
    return True
