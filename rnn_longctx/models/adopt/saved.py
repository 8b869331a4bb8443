"""The cache of an adopted model as a plain one that a file can hold, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.models.adopt.cache import AdoptedCache, attends, count_columns
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.carries import Carry
from rnn_longctx.recurrence.carry import ScanCarry


def to_cache(cache: AdoptedCache) -> tuple[Cache, dict[str, Tensor]]:
    """Return the recurrent layers as a `Cache`, and beside it the keys and values of attention, where it stands in the
    stream (columns read, columns dropped) and the rows' padding; new tensors or views. InputError: see `attends`."""
    plain = Cache([], cache.position, cache.tail)
    extra = {"columns": torch.tensor([cache.seen, cache.dropped], device="cpu")}
    if cache.padding is not None:
        extra["padding"] = cache.padding
    for mixer, carry in zip(cache.mixers, cache.layers):
        beside = mixer.beside(mixer.layer_of(cache.library))
        # (under no policy the library steps itself, past what lies beside)
        if mixer.active and beside is not None and beside.log_decay is not None:
            state = carry.scan.state if beside.window is None else beside.window.block
            carry = Carry(carry.conv, ScanCarry(state, beside.position, beside.log_decay, beside.window))
        plain.layers.append(carry)
    layers = cache.library.layers if cache.library is not None else ()
    plain.layers += [layer.carry for layer in layers if hasattr(layer, "carry")]
    for i, layer in enumerate(layers):
        if attends(layer):
            extra |= {f"keys.{i}": layer.keys, f"values.{i}": layer.values}
    return plain, extra


@torch.no_grad()
def from_cache(model: Adopted, plain: Cache, extra: dict[str, Tensor]) -> AdoptedCache:
    """Return the cache that `to_cache` took apart, for the model that had read it, under the policies of then."""
    new = model.new_cache()
    if len(plain.position):
        # one token, so that the library makes a cache of its own kinds of layers, which are then filled
        model.read(torch.zeros(len(plain.position), 1, dtype=torch.int64, device=model.device), new)
        new.seen, new.dropped = extra["columns"].tolist()
        carrying = [layer for layer in new.library.layers if hasattr(layer, "carry")]  # (of a retrofitted decoder)
        for layer, carry in zip(carrying, plain.layers):
            layer.carry, layer.columns = carry, new.seen - new.dropped
        for mixer, carry in zip(new.mixers, plain.layers):
            layer = mixer.layer_of(new.library)
            if carry.conv is not None:
                layer.conv_states[0] = carry.conv
            mixer.put_state(layer, mixer.recurrence.state(carry.scan))
            if mixer.active:
                mixer.keep(layer, carry.scan)
        for i, layer in enumerate(new.library.layers):
            if attends(layer):
                layer.keys, layer.values = (extra[f"{what}.{i}"].to(model.device) for what in ("keys", "values"))
                count_columns(layer, new.seen - new.dropped)
    new.position, new.tail, new.padding = plain.position, plain.tail, extra.get("padding")
    return new
