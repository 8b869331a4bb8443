"""A prompt's way through the blocks of transformers' pure models (Mamba2, Mamba), one after the other: see
`LayerByLayer`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.models.adopt.cache import AdoptedCache


class AdoptedBlocks:
    """Tokens are the residual, between two layers and in one: a block applies its own norm.

    Args:
        base: the library's model without its head.
        cache: an empty one, which the blocks move on.
        reading: inside it the library's parts may be called (`Adopted.reading`).
        longest: says how many tokens of so many rows may be read at once.
    """

    def __init__(self, base: Any, cache: AdoptedCache, reading: Callable[[], AbstractContextManager[None]],
                 longest: Callable[[int], int | None]):  # fmt: skip
        from transformers import DynamicCache

        self.base, self.cache, self.reading, self.longest = base, cache, reading, longest
        cache.library = DynamicCache(config=base.config)

    def embed(self, ids: Tensor) -> list[Tensor]:
        return [self.base.embeddings(ids)]

    def enter(self, layer: int, tokens: list[Tensor]) -> list[Tensor]:
        return tokens

    def normed(self, layer: int, tokens: list[Tensor]) -> Tensor:
        norm = self.base.layers[layer].norm
        return norm(tokens[0].to(norm.weight.dtype))

    def leave(self, layer: int, tokens: list[Tensor]) -> list[Tensor]:
        with self.reading():
            return [self.base.layers[layer](tokens[0], self.cache.library)]

    def finish(self, tokens: list[Tensor], length: int) -> tuple[Tensor, AdoptedCache]:
        last = tokens[0][:, -1]
        self.cache.seen, self.cache.position = length, torch.full((len(last),), length, device="cpu")
        return self.base.norm_f(last), self.cache
