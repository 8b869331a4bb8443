"""A prompt's way through this library's blocks, one after the other: see `LayerByLayer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnn_longctx.models.block import Backbone
from rnn_longctx.models.cache import Cache
from rnn_longctx.recurrence.span import WHOLE


class BlockByBlock:
    """Between two layers, tokens are the residual and what the layer below adds to it (nothing yet after the
    embedding); in a layer, the residual and what the mixer reads: the sum is made together with the norm."""

    def __init__(self, backbone: Backbone, residual_in_fp32: bool):
        self.backbone, self.residual_in_fp32 = backbone, residual_in_fp32
        self.blocks = backbone.blocks
        self.carries: list[Any] = [None] * len(self.blocks)

    def longest(self, rows: int) -> int | None:
        return None

    def embed(self, ids: Tensor) -> list[Tensor]:
        return [self.backbone.embedding(ids)]

    def enter(self, layer: int, tokens: list[Tensor]) -> list[Tensor]:
        normed, residual = self._added(self.blocks[layer].norm, tokens)
        return [residual, normed]

    def normed(self, layer: int, tokens: list[Tensor]) -> Tensor:
        return tokens[1]

    def leave(self, layer: int, tokens: list[Tensor]) -> list[Tensor]:
        residual, normed = tokens
        out, self.carries[layer] = self.blocks[layer].mixer(normed, self.carries[layer], WHOLE)
        return [residual, out]

    def finish(self, tokens: list[Tensor], length: int) -> tuple[Tensor, Cache]:
        last = self._added(self.backbone.norm_f, tokens)[0][:, -1]
        return last, Cache(self.carries, torch.full((len(last),), length, device="cpu"))

    def _added(self, norm: Any, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The norm of the sum of tokens, and the sum."""
        return norm.add(tokens[0], tokens[1] if len(tokens) > 1 else None, self.residual_in_fp32)
