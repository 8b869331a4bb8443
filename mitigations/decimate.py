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
from rnn_longctx.mitigations.base import REMEDIES, Need, NotApplicable, Plan, Remedy, same_everywhere
from rnn_longctx.models.interface import LanguageModel, SteppedMixer, stepped_mixers
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class Decimate(Remedy):
    """Let the upper layers read the weightiest tokens of a prompt only.

    Attributes:
        base: tokens that layer `first` keeps.
        beta: how much fewer each layer after it keeps, in (0, 1].
        first: the first layer that leaves tokens out, counted from 0; None is the middle layer.
        least: no layer keeps fewer tokens.
    """

    name = "decimate"
    needs = frozenset({Need.RECURRENCE, Need.STEPS, Need.NO_ATTENTION})
    examples = ("decimate:base=20,beta=0.5,first=1,least=3",)
    base: int = 2000
    beta: float = 0.5
    first: int | None = quiet(None)
    least: int = quiet(20)

    def __post_init__(self) -> None:
        if self.base < 1 or self.least < 1:
            raise InputError(f"decimate: base and least are at least 1 token, got {self.base} and {self.least}")
        if not 0 < self.beta <= 1:
            raise InputError(f"decimate: beta must lie in (0, 1], got {self.beta:g}")

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        if model.layer_by_layer() is None:
            kind = type(model.module).__name__
            raise NotApplicable(f"decimate reads layer by layer, which is not written for {kind}")
        layers = len(model.mixers)
        first = layers // 2 if self.first is None else self.first
        if not 0 <= first < layers:
            raise InputError(f"decimate: first={first} is out of range, the model has layers 0 to {layers - 1}")
        keep = [max(self.least, round(self.base * self.beta ** (i - first))) for i in range(first, layers)]
        return Plan(same_everywhere(model), reader=lambda model, ids, segment: read(model, ids, segment, first, keep))


@torch.no_grad()
def read(model: LanguageModel, ids: Tensor, segment: int, first: int, keep: list[int]) -> tuple[Tensor, Any]:
    """Return the logits (B, vocab) after the last of ids (B, T), and the cache; keep[i]: tokens of layer first + i."""
    layers = model.layer_by_layer()
    assert layers is not None
    segment = min(segment, layers.longest(len(ids)) or segment)
    mixers = stepped_mixers(model)

    def scored(i: int, tokens: list[Tensor]) -> list[Tensor]:
        return [*tokens, _score(mixers[i], layers.normed(i, tokens))]

    heaviest: list[Tensor] = []  # what has entered layer `first` so far, and its score (B, k)
    for t in range(0, ids.shape[1], segment):
        tokens = layers.embed(ids[:, t : t + segment].to(model.device))
        for i in range(first):
            tokens = layers.leave(i, layers.enter(i, tokens))
        fresh = scored(first, layers.enter(first, tokens))
        joined = [torch.cat(pair, 1) for pair in zip(heaviest, fresh)] if heaviest else fresh
        heaviest = _heaviest(joined, keep[0])
    tokens = layers.leave(first, heaviest[:-1])
    for i in range(first + 1, len(model.mixers)):
        tokens = _heaviest(scored(i, layers.enter(i, tokens)), keep[i - first])[:-1]
        tokens = layers.leave(i, tokens)
    hidden, cache = layers.finish(tokens, ids.shape[1])
    return model.logits(hidden), cache


def _score(mixer: SteppedMixer, normed: Tensor) -> Tensor:
    """Return ||dt_t||_2 over the heads of a layer, (B, T)."""
    steps = mixer.steps(mixer.in_proj(normed))
    return steps.to(torch.promote_types(steps.dtype, torch.float32)).norm(dim=-1)


def _heaviest(tensors: list[Tensor], k: int) -> list[Tensor]:
    """Return of tensors (B, T, ...), the last of which are scores (B, T), the last token and the k - 1 others of
    largest score, in order; the earlier one where two are alike."""
    score = tensors[-1].clone()
    if score.shape[1] <= k:
        return tensors
    score[:, -1] = float("inf")
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return [t.gather(1, order.view(*order.shape, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:])) for t in tensors]
