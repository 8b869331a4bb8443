"""Decimation (DeciMamba, arXiv 2406.14528): from one layer on, a prompt is read by its weightiest tokens only.

    layer l >= first keeps the k_l = max(least, base * beta^(l - first)) tokens of largest ||dt_t||_2 over its heads

and the layers above see the shorter sequence. A strategy for prompts: losses of tokens that were dropped are not
defined, and what is generated afterwards is read by every layer. The last token is always kept, since the answer hangs
on it. Reads dt of the prompt itself; changes no recurrence. Below `first` the prompt is streamed, and only the tokens
kept so far are held, so that memory does not grow with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import NotApplicable, Plan, Remedy, one_step_a_head, same_everywhere
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.segments import longest
from rnn_longctx.recurrence.span import WHOLE
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@dataclass(frozen=True)
class Decimate(Remedy):
    """base: tokens that layer `first` keeps (counted from 0; the default is the middle layer); beta: how much fewer
    each layer after it keeps, in (0, 1]; least: never fewer."""

    name = "decimate"
    base: int = 2000
    beta: float = 0.5
    first: int | None = quiet(None)
    least: int = quiet(20)

    def __post_init__(self) -> None:
        if self.base < 1 or self.least < 1:
            raise InputError(f"decimate: base and least are at least 1 token, got {self.base} and {self.least}")
        if not 0 < self.beta <= 1:
            raise InputError(f"decimate: beta must lie in (0, 1], got {self.beta:g}")

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        one_step_a_head(model, "decimate")
        own = isinstance(model, Mamba2LM)
        if not own and getattr(model, "attends", True):
            raise NotApplicable(f"decimate drops tokens between layers, which attention in {model.name} needs")
        if not own and (getattr(model, "hybrid", True) or model.mixers[0].library == "mamba_ssm"):
            raise NotApplicable(f"decimate reads layer by layer, which is not written for {type(model.model).__name__}")
        layers = len(model.mixers)
        first = layers // 2 if self.first is None else self.first
        if not 0 <= first < layers:
            raise InputError(f"decimate: first={first} is out of range, the model has layers 0 to {layers - 1}")
        keep = [max(self.least, round(self.base * self.beta ** (i - first))) for i in range(first, layers)]
        how = read if own else read_adopted
        return Plan(same_everywhere(model), reader=lambda model, ids, segment: how(model, ids, segment, first, keep))


@torch.no_grad()
def read(model: Mamba2LM, ids: Tensor, segment: int, first: int, keep: list[int]) -> tuple[Tensor, Cache]:
    """Logits (B, vocab) after the last of ids (B, T), and the cache; keep[i]: tokens of layer first + i."""
    blocks, fp32 = model.layers, model.config.residual_in_fp32
    carries: list = [None] * len(blocks)
    kept: list[Tensor] = []  # residual (B, k, d), output of the layer below, normed, score (B, k)
    for t in range(0, ids.shape[1], segment):
        h, out = model.backbone.embedding(ids[:, t : t + segment].to(model.device)), None
        for i, block in enumerate(blocks[:first]):
            normed, h = block.norm.add(h, out, fp32)
            out, carries[i] = block.mixer(normed, carries[i], WHOLE)
        normed, h = blocks[first].norm.add(h, out, fp32)
        fresh = [h, normed, _score(model.mixers[first], normed)]
        kept = _heaviest([torch.cat(pair, 1) for pair in zip(kept, fresh)] if kept else fresh, keep[0])
    h, normed = kept[:2]
    for i, block in enumerate(blocks[first:], first):
        if i > first:
            normed, h = block.norm.add(h, out, fp32)
            h, normed = _heaviest([h, normed, _score(model.mixers[i], normed)], keep[i - first])[:2]
        out, carries[i] = block.mixer(normed, None, WHOLE)
    last = model.backbone.norm_f.add(h, out, fp32)[0][:, -1]
    return model.logits(last), Cache(carries, torch.full((len(ids),), ids.shape[1], device="cpu"))


@torch.no_grad()
def read_adopted(model: Any, ids: Tensor, segment: int, first: int, keep: list[int]) -> tuple[Tensor, Any]:
    """`read` for transformers' Mamba-2 (`rnn_longctx.adopt`): its blocks one after the other, over one cache of its."""
    from transformers import DynamicCache

    base, cache = model.base, model.new_cache()
    segment = min(segment, longest(model, len(ids)) or segment)
    cache.library = DynamicCache(config=base.config)

    def scored(i: int, h: Tensor) -> list[Tensor]:
        norm = base.layers[i].norm
        return [h, _score(model.mixers[i], norm(h.to(norm.weight.dtype)))]

    kept: list[Tensor] = []  # residual (B, k, d), score (B, k)
    with model.reading():
        for t in range(0, ids.shape[1], segment):
            h = base.embeddings(ids[:, t : t + segment].to(model.device))
            for block in base.layers[:first]:
                h = block(h, cache.library)
            fresh = scored(first, h)
            kept = _heaviest([torch.cat(pair, 1) for pair in zip(kept, fresh)] if kept else fresh, keep[0])
        h = kept[0]
        for i, block in enumerate(base.layers[first:], first):
            if i > first:
                h = _heaviest(scored(i, h), keep[i - first])[0]
            h = block(h, cache.library)
    cache.seen, cache.position = ids.shape[1], torch.full((len(ids),), ids.shape[1], device="cpu")
    return model.logits(base.norm_f(h[:, -1])), cache


def _score(mixer: Any, normed: Tensor) -> Tensor:
    """||dt_t||_2 over the heads of a layer, (B, T)."""
    steps = mixer.steps(mixer.in_proj(normed))
    return steps.to(torch.promote_types(steps.dtype, torch.float32)).norm(dim=-1)


def _heaviest(tensors: list[Tensor], k: int) -> list[Tensor]:
    """Of tensors (B, T, ...), the last of which are scores (B, T): the last token and the k - 1 others of largest
    score, in order; the earlier one where two are alike."""
    score = tensors[-1].clone()
    if score.shape[1] <= k:
        return tensors
    score[:, -1] = float("inf")
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return [t.gather(1, order.view(*order.shape, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:])) for t in tensors]
