"""A prompt's way through this library's blocks, one after the other: see `LayerByLayer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnn_longctx.models.block import Backbone
from rnn_longctx.models.cache import Cache
from rnn_longctx.recurrence.span import Span


class BlockByBlock:
    """Between two layers, tokens are the residual and what the layer below adds to it (nothing yet after the
    embedding); in a layer, the residual and what the mixer reads: the sum is made together with the norm. Behind these
    two stands what layers left to those above (`Span.shared`), which is cut with them."""

    def __init__(self, backbone: Backbone, residual_in_fp32: bool):
        self.backbone, self.residual_in_fp32 = backbone, residual_in_fp32
        self.blocks: list[Any] = list(backbone.layers)
        self.carries: list[Any] = [None] * len(self.blocks)
        self.names: list[str] = []  # of what is shared

    def longest(self, rows: int) -> int | None:
        return None

    def embed(self, ids: Tensor) -> list[Any]:
        return [self.backbone.embedding(ids), None]

    def enter(self, layer: int, tokens: list[Any]) -> list[Any]:
        normed, residual = self.blocks[layer].norm.add(tokens[0], tokens[1], self.residual_in_fp32)
        return [residual, normed, *tokens[2:]]

    def normed(self, layer: int, tokens: list[Any]) -> Tensor:
        return tokens[1]

    def leave(self, layer: int, tokens: list[Any]) -> list[Any]:
        (residual, normed, *left), block = tokens, self.blocks[layer]
        span = Span(shared=dict(zip(self.names, left)))
        out, self.carries[layer] = block.mixer(normed, self.carries[layer], span)
        self.names = list(span.shared or ())
        return [*block.feed_forward(residual, out, self.residual_in_fp32), *(span.shared or {}).values()]

    def finish(self, tokens: list[Any], length: int) -> tuple[Tensor, Cache]:
        last = self.backbone.norm_f.add(tokens[0], tokens[1], self.residual_in_fp32)[0][:, -1]
        return last, Cache(self.carries, torch.full((len(last),), length, device="cpu"))
