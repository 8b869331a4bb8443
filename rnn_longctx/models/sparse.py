"""Softmax attention over few blocks of what was read: what the mixers block-sparse and two-stage share.

A document is cut, from its first token on, into blocks of b tokens. Each head of a token reads

    the window      its own block up to itself, and the window / b - 1 blocks before that one;
    the sinks       the first blocks of the document;
    the chosen      of all other completed blocks those whose scores for this token are largest, `top` of them or as
                    many as there are

in one softmax, in which a block may have a bias. Scores are of a token and not of a block of queries: these would
choose for their first token by what their last one asks. They compare a query with a summary of a block, which is made
when the block is complete. Scoring so grows with the square of the length, b times more slowly than full attention
does; what is read of the tokens themselves is as much at any length.

Blocks are not masked but gathered: pairs of a query and a block that it reads are sorted by blocks, and a block meets
its queries in one product. Of blocks with equal scores any may be chosen.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.attention import Attention, weighed
from rnn_longctx.models.block_keys import BlockKeys, BlockPlaces, picked
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.rows import row_counts
from rnn_longctx.recurrence.span import WHOLE, Span

QUERIES = 512  # whose scores are held at once
TILE = 64  # queries at most that meet a block in one product


@dataclass(frozen=True, eq=False)
class Call:
    """What a call reads.

    Attributes:
        u: (B, T, d_model).
        content: (B, T, H, D), queries before they are turned, as blocks are scored by; q: as tokens are.
        keys, values: (B, S + T, K, D), of K heads that those of queries may share; keys as they are turned.
        summaries: (B, W + E, K, F).
    """

    u: Tensor
    content: Tensor
    q: Tensor
    keys: Tensor
    values: Tensor
    summaries: Tensor
    places: BlockPlaces

    def parts(self) -> Iterator[slice]:
        """Yield QUERIES queries at a time."""
        for t in range(0, self.q.shape[1], QUERIES):
            yield slice(t, min(t + QUERIES, self.q.shape[1]))


@dataclass(frozen=True, eq=False)
class Choice:
    """The blocks that queries read beyond their window: first the sinks, then the chosen, the best first.

    Attributes:
        index: (B, H, t, K), of blocks as a call lists them.
        taken: (B, H, t, K) bool, whether there is such a block.
        scores: (B, H, t, K), with gradients, of the chosen; 0 of the sinks.
        sinks: how many of the K are sinks.
    """

    index: Tensor
    taken: Tensor
    scores: Tensor
    sinks: int


@dataclass(frozen=True, eq=False)
class Kept:
    """The blocks that queries read beyond their window, as an explanation.

    Attributes:
        blocks: (B, H, T, sinks + top) int64, which block of its document each is: block n holds its tokens from n * b
            on. The sinks come first, then the chosen, the best first. -1: there are no more.
        scores: (B, H, T, sinks + top), float32 or more, of the chosen blocks; 0 of the sinks and where there is none.
    """

    blocks: Tensor
    scores: Tensor


class SparseAttention(Attention):
    """A layer of attention over a window and few blocks. A subclass says what a block's summary is, how queries score
    it, and what a token makes of what it reads; its config has `block`, `window` and `top`."""

    @property
    def rotary(self) -> bool:
        return self.config.positions == "rope"

    @property
    def head_numbers(self) -> Sequence[int]:
        """What the heads are called, in order."""
        return range(self.config.heads)

    @property
    def sinks(self) -> int:
        """How many blocks, the first ones of a document, are read whatever their scores are."""
        return 0

    @property
    @abstractmethod
    def features(self) -> int:
        """F, the numbers a head of a block's summary."""

    @abstractmethod
    def summary(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return (B, E, K, F) of blocks' keys, before they are turned, and values (B, E, b, K, D)."""

    @abstractmethod
    def scores(self, queries: Tensor, summaries: Tensor) -> Tensor:
        """Return (B, H, t, m), at least float32, of queries (B, t, H, D) that are not turned and summaries
        (B, m, K, F)."""

    @abstractmethod
    def read(self, call: Call, queries: slice) -> Tensor:
        """Return (B, t, H, D)."""

    def forward(self, u: Tensor, carry: BlockKeys | None, span: Span) -> tuple[Tensor, BlockKeys]:
        call, after = self._call(u, carry, span)
        y = torch.cat([self.read(call, queries) for queries in call.parts()], 1)
        return self.out_proj(y.flatten(2)), after

    def kept(self, u: Tensor, carry: BlockKeys | None = None, span: Span = WHOLE) -> Kept:
        """Return which blocks the layer reads for each token, beyond its window, where `forward` is called so."""
        call, _ = self._call(u, carry, span)
        room, blocks, scores = self.sinks + self.config.top, [], []
        for queries in call.parts():
            choice = self.choice(call, queries, self.call_scores(call, queries))
            index = choice.index
            numbers = picked(call.places.blocks.to(u.device), index.flatten(1)).unflatten(1, index.shape[1:])
            less = (0, room - index.shape[3])
            blocks.append(F.pad(numbers.where(choice.taken, -1), less, value=-1))
            scores.append(F.pad(choice.scores.masked_fill(~choice.taken, 0), less))
        return Kept(torch.cat(blocks, 2), torch.cat(scores, 2))

    def block_scores(
        self, u: Tensor, carry: BlockKeys | None = None, span: Span = WHOLE, queries: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the scores (B, H, t, M) of every completed block of a row for every token, or those of a slice, with
        gradients, and (B, t, M) bool, which of them the token chooses from. Blocks stand in the order in which they
        were completed: of one document that begins with the call, block n is the n-th. A distillation of the choice
        begins here."""
        call, _ = self._call(u, carry, span)
        some = slice(0, u.shape[1]) if queries is None else queries
        return self.call_scores(call, some), self._candidates(call, some)[0]

    def call_scores(self, call: Call, queries: slice) -> Tensor:
        """Return the scores (B, H, t, m) of the blocks that are complete once the last of the queries is read."""
        return self.scores(call.content[:, queries], call.summaries[:, : call.places.known(queries.stop)])

    def choice(self, call: Call, queries: slice, scores: Tensor) -> Choice:
        """Return the blocks that queries read beyond their window; scores: `call_scores` of them."""
        candidates, sinks = self._candidates(call, queries)
        heads, known = scores.shape[1], scores.shape[3]
        best = scores.detach().masked_fill(~candidates[:, None], -math.inf).topk(min(self.config.top, known))
        order = -torch.arange(known, device=scores.device, dtype=scores.dtype)
        first = order.where(sinks, -math.inf).topk(min(self.sinks, known))
        first_index, first_values = (x[:, None].expand(-1, heads, -1, -1) for x in (first.indices, first.values))
        return Choice(
            torch.cat([first_index, best.indices], 3),
            torch.cat([first_values, best.values], 3) > -math.inf,
            torch.cat([torch.zeros_like(first_values), scores.gather(3, best.indices)], 3),
            first_values.shape[3],
        )

    def _candidates(self, call: Call, queries: slice) -> tuple[Tensor, Tensor]:
        """Return two (B, t, m) bool: which blocks are chosen from, and which are sinks, both outside the window."""
        known = call.places.known(queries.stop)
        outside = call.places.earlier(queries, self.config.window // self.config.block, call.u.device)
        first = (call.places.blocks[:, None, :known] < self.sinks).to(call.u.device)
        return outside & ~first, outside & first

    def attended(self, call: Call, queries: slice, choice: Choice, bias: Tensor | None = None) -> Tensor:
        """Return (B, t, H, D), what queries read of their window and of the blocks of a choice; bias: (B, H, t, K), on
        the scores of a block's tokens."""
        places, window = call.places, self.config.window
        near = slice(max(0, places.before + queries.start - (window - 1)), places.before + queries.stop)
        begin = places.begin[:, queries].to(call.u.device) - near.start
        q = call.q[:, queries]
        keys, values = (self.by_head(x[:, near], 2) for x in (call.keys, call.values))
        y, log_sum = read_window(q, keys, values, begin, window)
        first, shared = places.first.to(call.u.device), self.by_head(torch.arange(self.kv_heads), 0)
        y_blocks, log_sums = read_blocks(q, call.keys, call.values, first, self.config.block, choice, shared)
        if bias is not None:
            log_sums = log_sums + bias
        weights = torch.cat([log_sum[..., None], log_sums], 3).softmax(3)  # (B, H, t, 1 + K)
        y = weights[..., :1] * y + (weights[..., 1:, None] * y_blocks).sum(3)
        return y.to(call.values.dtype).transpose(1, 2)

    def _call(self, u: Tensor, carry: BlockKeys | None, span: Span) -> tuple[Call, BlockKeys]:
        """Return what a call reads, and the carry after it."""
        carry = self.new_carry(len(u)) if carry is None else carry
        size, length = carry.size, u.shape[1]
        q, k, v = self.projected(u, span)
        counts, _ = row_counts(carry.position, length, mask=span.mask, reset=span.reset)
        places = BlockPlaces.find(counts, carry, span.reset, self.config.window // size)
        recent, content = torch.cat([carry.recent.to(k.dtype), k], 1), q
        if self.rotary:
            q, k = self.turn(q, k, counts - 1, span)
        keys = torch.cat([carry.keys.to(k.dtype), k], 1)
        values = torch.cat([carry.values.to(v.dtype), v], 1)
        end = places.ends.clamp(max=length - 1)
        index = end[..., None] + torch.arange(1 - size, 1, device="cpu")  # (B, E, b), from the call's first token on
        of_keys, of_values = (
            picked(x, (x.shape[1] - length + index).clamp(min=0).flatten(1)).unflatten(1, index.shape[1:])
            for x in (recent, values)
        )
        new = self.summary(of_keys, of_values).to(k.dtype)
        summaries = torch.cat([carry.summaries.to(k.dtype), new], 1)
        call = Call(u, content, q, keys, values, summaries, places)
        own = (places.of == places.document[:, -1:]) & (places.of >= 0)  # (B, W + E)
        blocks = own.sum(1)
        if not bool(own.all()):
            summaries = picked(summaries, (~own).long().argsort(dim=1, stable=True)[:, : int(blocks.max())])
        last = slice(max(0, keys.shape[1] - int(places.held.max())), None)
        return call, BlockKeys(
            size,
            keys[:, last].contiguous(),
            values[:, last].contiguous(),
            recent[:, max(0, recent.shape[1] - (size - 1)) :].contiguous(),
            summaries,
            places.held,
            blocks,
            counts[:, -1].clone(),
        )

    def state_size(self) -> StateSize:
        numbers, block = self.kv_heads * self.head_dim, self.config.block
        return StateSize(
            per_token=2 * numbers, windows={block - 1: numbers}, chunks={block: self.kv_heads * self.features}
        )

    def new_carry(self, rows: int) -> BlockKeys:
        keys = self.like.new_zeros(rows, 0, self.kv_heads, self.head_dim)
        summaries = keys.new_zeros(rows, 0, self.kv_heads, self.features)
        none = torch.zeros(rows, dtype=torch.int64, device="cpu")
        return BlockKeys(
            self.config.block, keys, keys.clone(), keys.clone(), summaries, none, none.clone(), none.clone()
        )


def read_window(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return what queries (B, t, H, D) read of keys and values (B, n + t, H, D) of the n tokens before, fewer than
    `window`, and of their own: from the place `begin` (B, t) on up to themselves. Outputs (B, H, t, D), and the
    logarithms (B, H, t) of the softmax's denominators."""
    length, memory = q.shape[1], window - 1
    chunk = min(length, window)
    width, before, behind = memory + chunk, memory + length - k.shape[1], -length % chunk
    queries = F.pad(q.transpose(1, 2), (0, 0, 0, behind)).unflatten(2, (-1, chunk))  # (B, H, chunks, chunk, D)
    keys, values = (F.pad(x.transpose(1, 2), (0, 0, before, behind)).unfold(2, width, chunk) for x in (k, v))
    places = torch.arange(width, device=q.device)  # in the keys (B, H, chunks, D, width) of a chunk
    first = begin + before - torch.arange(length, device=q.device) // chunk * chunk
    first = F.pad(first, (0, behind)).unflatten(1, (-1, chunk))[:, None, ..., None]  # (B, 1, chunks, chunk, 1)
    seen = (places >= first) & (places <= places[memory:, None])
    y, log_sum = weighed(queries, keys, values.mT, seen)
    return y.flatten(2, 3)[:, :, :length], log_sum.flatten(2, 3)[:, :, :length]


def read_blocks(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, size: int, choice: Choice, shared: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what queries (B, t, H, D) read of each block of a choice by itself: outputs (B, H, t, K, D), and the
    logarithms (B, H, t, K) of the softmax's denominators, -inf where there is no block.

    k, v: (B, N, K, D); first: (B, M), the place in them of each block's first token; shared: (H,) on the CPU, which
    of their K heads each head of queries reads.
    """
    rows, heads, length, _ = shape = choice.index.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs = q.new_zeros(choice.index.numel(), q.shape[3], dtype=v.dtype)
    log_sums = torch.full((choice.index.numel(),), -math.inf, dtype=wide, device=q.device)
    pairs = choice.taken.flatten().nonzero()[:, 0]
    if len(pairs):
        row, head, query, _ = torch.unravel_index(pairs, shape)
        lists = rows, heads, first.shape[1]  # each head's blocks are its own
        block, order = ((row * heads + head) * lists[2] + choice.index.flatten()[pairs]).sort()
        pairs, source = pairs[order], ((row * length + query) * heads + head)[order]
        tiles = Tiles.of(block)
        queries = q.flatten(0, 2).index_select(0, tiles.filled(source)).unflatten(0, (-1, tiles.size))
        row, head, number = torch.unravel_index(tiles.block, lists)
        place = (row * k.shape[1] + first[row, number])[:, None] + torch.arange(size, device=q.device)
        place = (place * k.shape[2] + shared.to(q.device)[head][:, None]).flatten()  # of the keys (B * N * K)
        keys, values = (x.flatten(0, 2).index_select(0, place).unflatten(0, (-1, size)) for x in (k, v))
        y, log_sum = weighed(queries, keys.mT, values)  # (tiles, slots, D)
        outputs = outputs.index_copy(0, pairs, y.flatten(0, 1).index_select(0, tiles.slot))
        log_sums = log_sums.index_copy(0, pairs, log_sum.flatten().index_select(0, tiles.slot))
    return outputs.unflatten(0, shape), log_sums.unflatten(0, shape)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Sorted pairs of a block and a query, cut into tiles: so many slots for queries of one block, some left empty.

    Attributes:
        block: (tiles,), each one's block.
        slot: (pairs,), where each pair stands in the slots (tiles * size).
        size: slots of a tile, about as many as a block has queries.
    """

    block: Tensor
    slot: Tensor
    size: int

    @classmethod
    def of(cls, block: Tensor) -> Tiles:
        """block: (pairs,), in order."""
        distinct, which, counts = block.unique_consecutive(return_inverse=True, return_counts=True)
        size = min(TILE, -(-len(block) // len(distinct)))
        tiles = (counts + size - 1) // size
        rank = torch.arange(len(block), device=block.device) - (counts.cumsum(0) - counts)[which]
        return cls(distinct.repeat_interleave(tiles), ((tiles.cumsum(0) - tiles) * size)[which] + rank, size)

    def filled(self, x: Tensor) -> Tensor:
        """Return (tiles * size,), each pair's x in its slot, and 0 in empty ones."""
        return x.new_zeros(len(self.block) * self.size).index_copy(0, self.slot, x)


def pooled(x: Tensor, weights: Tensor) -> Tensor:
    """Return (B, E, H, D), the blocks' means of x (B, E, b, H, D), each token by its weight (B, E, b, H)."""
    return torch.einsum("bech,bechd->behd", weights, x)


def pooling_weights(keys: Tensor, query: Tensor) -> Tensor:
    """Return the weights (B, E, b, H) of a block's tokens in its summary: softmax over the block of their keys
    (B, E, b, H, D) against a learned query (H, D); a mean where that is zero."""
    return (torch.einsum("bechd,hd->bech", keys, query) / math.sqrt(keys.shape[4])).softmax(2)


@contextmanager
def in_float32(x: Tensor) -> Iterator[torch.dtype]:
    """Let products be in the type that is yielded, at least float32: rounded as autocast rounds them, many blocks would
    have equal scores."""
    with torch.autocast(x.device.type, enabled=False):
        yield torch.promote_types(x.dtype, torch.float32)


def too_few_blocks(name: str, config: Any, length: int) -> str | None:
    """Return a line that says that `length` tokens have fewer blocks to choose from than a config says are chosen, so
    that all of them are read; None where there are as many."""
    sinks = getattr(config, "sinks", 0)
    blocks = max(0, (length - 1) // config.block + 1 - config.window // config.block - sinks)
    if blocks >= config.top:
        return None
    beside = "the window and the sinks" if sinks else "the window"
    return (
        f"{name}: top = {config.top} is more than the blocks of {config.block} that {length} tokens have beside "
        f"{beside}, {blocks}: everything is read"
    )


def check_blocks(name: str, config: Any) -> None:
    """Raise InputError for sizes that are none."""
    if config.block < 2 or config.top < 1 or config.heads < 1:
        raise InputError(
            f"{name}: expected blocks of at least 2 tokens, at least 1 chosen block and at least 1 head, got block = "
            f"{config.block}, top = {config.top}, heads = {config.heads}"
        )
    if config.window < config.block or config.window % config.block:
        raise InputError(
            f"{name}: expected a window of a multiple of the block, such as {2 * config.block}, got window = "
            f"{config.window} and block = {config.block}"
        )
