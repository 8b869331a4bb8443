"""Attention that takes over heads of a transformers layer: the mixers of `rnn_longctx.models.mixers` without their
projections, and what may stand in a retrofitted layer by name.

    block-sparse     as the mixer, but that a chosen block's tokens are weighed by attention alone, so that a choice of
                     all blocks is the full attention it takes over: the gate learns from the teacher (distillation)
    two-stage        as the mixer; what mixes the two stages begins with the fine one almost alone
    longnet          as the mixer
    mamba2           `rnn_longctx.models.retrofit.recurrences`, and gated-deltanet
    full             heads that stay as they were, in a layer of which others are taken over

A part has no weights of keys and queries of its own. What is new begins from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.mixers.block_sparse import BlockSparse, BlockSparseConfig
from rnn_longctx.models.mixers.full_attention import FullAttention, FullAttentionConfig
from rnn_longctx.models.mixers.longnet import LongNet, LongNetConfig
from rnn_longctx.models.mixers.two_stage import TwoStage, TwoStageConfig
from rnn_longctx.models.retrofit.heads import COS, SIN, Heads, OfHeads, turned_by
from rnn_longctx.models.retrofit.recurrences import GatedDeltaPart, Mamba2Part, RecurrentConfig, RecurrentPart
from rnn_longctx.models.sparse import Call
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.span import Span
from rnn_longctx.spec import canonical, parse

FULL = "full"
FINE = 4.0  # two-stage: sigmoid(FINE) of the fine stage is read at first, and sigmoid(-FINE) of the coarse one


class AttentionPart(OfHeads):
    """Attention over heads of a layer. Its output is not projected."""

    out_proj: Any

    def make_projections(self, heads: Heads) -> None:
        self.take(heads)
        self.out_proj = nn.Identity()

    def turn(self, q: Tensor, k: Tensor, places: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        assert span.shared is not None
        cos, sin = span.shared[COS], span.shared[SIN]
        return turned_by(q, cos, sin), turned_by(k, cos, sin)

    def projected(self, u: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        return self.shared(span)


class BlockSparsePart(AttentionPart, BlockSparse):
    """Block-sparse attention over heads of a layer."""

    def read(self, call: Call, queries: slice) -> Tensor:
        return self.attended(call, queries, self.chosen(call, queries))


class TwoStagePart(AttentionPart, TwoStage):
    """Two-stage attention over heads of a layer."""

    def __init__(self, config: TwoStageConfig, heads: Any):
        super().__init__(config, heads)
        self.mix = nn.Linear(heads.d_model, 2 * config.heads)
        with torch.no_grad():
            self.mix.weight.zero_()
            self.mix.bias.copy_(torch.tensor([-FINE, FINE]).repeat_interleave(config.heads))


class LongNetPart(AttentionPart, LongNet):
    """Dilated attention over heads of a layer. What it keeps does not grow, so that keys are kept head by head."""

    def projected(self, u: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.shared(span)
        return q, self.by_head(k, 2), self.by_head(v, 2)


class FullPart(AttentionPart, FullAttention):
    """Full attention over heads of a layer. Keys are kept as they were turned, and head by head."""

    @property
    def rotary(self) -> bool:
        return False  # (turned already)

    @property
    def kv_heads(self) -> int:
        return len(self.of_heads.queries)

    def by_head(self, x: Tensor, dim: int) -> Tensor:
        return x.index_select(dim, torch.tensor(self.of_heads.which, device=x.device))

    def projected(self, u: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.shared(span)
        q, k = self.turn(q, k, k, span)
        return q, self.by_head(k, 2), self.by_head(v, 2)

    def state_size(self) -> StateSize:
        return StateSize(per_token=2 * self.kv_heads * self.head_dim)


@dataclass(frozen=True)
class Kind:
    """What may take heads over: its settings, and what makes a part of them and the heads."""

    settings: type[Any]
    make: Callable[[Any, Heads], Any]


def _attention(config: type[Any], part: type[Any]) -> Kind:
    """Return the kind of a mixer: its settings are those of its config, but for what the model's own heads say, and for
    ablations (its quiet ones)."""
    types = get_type_hints(config)
    taken = [f for f in fields(config) if f.name not in ("heads", "positions") and not f.metadata.get("quiet")]
    own: list[Any] = [(f.name, types[f.name], f) for f in taken]
    settings = make_dataclass(f"{config.__name__}OfHeads", own, frozen=True)

    def make(given: Any, heads: Heads) -> Any:
        values = {f.name: getattr(given, f.name) for f in fields(given)}
        return part(config(heads=len(heads.queries), **values), heads)

    return Kind(settings, make)


KINDS: dict[str, Kind] = {
    "block-sparse": _attention(BlockSparseConfig, BlockSparsePart),
    "two-stage": _attention(TwoStageConfig, TwoStagePart),
    "longnet": _attention(LongNetConfig, LongNetPart),
    "mamba2": Kind(RecurrentConfig, Mamba2Part),
    "gated-deltanet": Kind(RecurrentConfig, GatedDeltaPart),
}


def settings_of(text: str) -> Any:
    """Return the settings of a mixer that takes heads over. Raises InputError for an unknown one, or for settings that
    it has not or refuses."""
    kinds: dict[str, type[Any]] = {name: kind.settings for name, kind in KINDS.items()}
    settings, name = parse(text, kinds, "mixer to retrofit"), _name(text)
    with torch.device("meta"):
        try:
            KINDS[name].make(settings, Heads((0,), (0,), (0,), 2, 2, 1e-6))
        except InputError as error:
            raise InputError(f"mixer to retrofit {text!r}: {str(error).removeprefix(f'{name}: ')}") from None
    return settings


def checked(text: str) -> str:
    """Return the canonical text of a mixer that takes heads over. Raises InputError as `settings_of` does."""
    return canonical(_name(text), settings_of(text))


def make_part(text: str, heads: Heads) -> Any:
    """Return the part that a text names, or full attention, of heads of a layer, its new weights drawn."""
    if text == FULL:
        shape: Any = heads
        return FullPart(FullAttentionConfig(heads=len(heads.queries)), shape)
    return KINDS[_name(text)].make(settings_of(text), heads)


def _name(text: str) -> str:
    return text.partition(":")[0].strip()


def tokens_read(part: Any, length: int) -> int | None:
    """Return of how many tokens all queries of a context of `length` tokens read keys and values, of one head, or None
    for a recurrence, which reads none. (What scores blocks, and a coarse stage, is not counted.)"""
    if isinstance(part, RecurrentPart):
        return None
    if (pairs := part.pairs(length)) is not None:
        return pairs // part.config.heads
    block, window, total = part.config.block, part.config.window, 0
    for number in range(-(-length // block)):  # of the block that a query is in
        queries = min(block, length - number * block)
        near = min(number, window // block - 1) * block
        chosen = min(max(0, number - window // block + 1), part.sinks + part.config.top) * block
        total += queries * (near + chosen) + queries * (queries + 1) // 2
    return total
