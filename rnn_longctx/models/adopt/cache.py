"""The cache of an adopted model: the library's own, as a stream's."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.families.mamba2 import AdoptedMixer
from rnn_longctx.models.adopt.rows import attends, concat
from rnn_longctx.models.cache import Carry
from rnn_longctx.recurrence.carry import ScanCarry


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
        """The recurrent layers' carries, in order; empty before the first token. `scan.state` is what the library
        holds (the windowed state under a window); `log_decay` is not a number where no policy was active."""
        if self.library is None:
            return []
        carries = []
        for mixer in self.mixers:
            layer = mixer.layer_of(self.library)
            # (a copy: the library writes into its own)
            state, beside = mixer.state_of(layer).clone(), getattr(layer, "beside", None)
            total = beside.log_decay if beside is not None else None
            if total is None:
                total = mixer.no_log_decay(state)
            carries.append(Carry(mixer.conv_of(self.library), ScanCarry(state, self.position, total)))
        return carries

    @layers.setter
    def layers(self, layers: list[Carry]) -> None:
        if layers:
            raise InputError("the layers of an adopted model's cache can be dropped, not replaced")
        self.library, self.seen, self.padding, self.dropped, self.torn = None, 0, None, 0, False

    def crop_attention(self, tokens: int) -> None:
        """Drop attention's keys and values but for the last `tokens` columns. InputError: see `attends`."""
        for layer in filter(attends, self.library.layers):
            self.dropped = self.seen - min(tokens, layer.keys.shape[2])
            layer.keys, layer.values = layer.keys[:, :, -tokens:], layer.values[:, :, -tokens:]

    def clone(self) -> AdoptedCache:
        new = copy.copy(self)
        new.library = copy.deepcopy(self.library)
        return new

    def restore(self, other: AdoptedCache) -> None:
        """Become what another cache is, in place; the other is given up, since both share the library's cache."""
        vars(self).update(vars(other))

    def rows(self, index: Tensor | list[int]) -> AdoptedCache:
        """The cache of some rows, in that order (beam search, ragged batches)."""
        index = torch.as_tensor(index, device=getattr(index, "device", "cpu"))
        new = self.clone()
        if new.library is not None:
            new._reorder(index)
        new.position = self.position[index.cpu()]
        new.padding = self.padding if self.padding is None else self.padding[index.cpu()]
        new.tail = self.tail if self.tail is None else self.tail[index.to(self.tail.device)]
        return new

    concat = staticmethod(concat)

    def _reorder(self, index: Tensor) -> None:
        mixer = self.mixers[0]
        self.library.reorder_cache(index.to(mixer.state_of(mixer.layer_of(self.library)).device))
