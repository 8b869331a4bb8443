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

How it is read: `rnn_longctx.models.block_reads`. Of blocks with equal scores any may be chosen.
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
from rnn_longctx.models.attention import Attention
from rnn_longctx.models.block_choice import largest
from rnn_longctx.models.block_keys import BlockKeys, BlockPlaces, picked
from rnn_longctx.models.block_reads import Blocks, Choice, read_blocks, read_window
from rnn_longctx.models.room import extended, newest
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.rows import row_counts
from rnn_longctx.recurrence.span import WHOLE, Span

QUERIES = 256  # at least, whose scores are held at once
SCORES = 1 << 20  # that are held at once, of more queries where they are few: a CPU has room for them in its cache
SCORES_OF_GPU = 1 << 26  # 256 MiB: with fewer, starting the kernels would take longer than they do
TOGETHER = 8192  # queries that read at once: the more, the more of them meet a block
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

    def parts(self, queries: slice) -> Iterator[slice]:
        """Yield so many of the queries at a time as have their scores held."""
        each = self.q.shape[0] * self.q.shape[2] * max(1, self.summaries.shape[1])
        return parts(queries, max(QUERIES, (SCORES_OF_GPU if self.q.is_cuda else SCORES) // each))


def parts(queries: slice, most: int) -> Iterator[slice]:
    """Yield `most` of the queries at a time."""
    for t in range(queries.start, queries.stop, most):
        yield slice(t, min(t + most, queries.stop))


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
    def near(self) -> int:
        """How many blocks the window has, a token's own among them."""
        return self.config.window // self.config.block

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
        y = torch.cat([self.read(call, queries) for queries in parts(slice(0, u.shape[1]), TOGETHER)], 1)
        return self.out_proj(y.flatten(2)), after

    def kept(self, u: Tensor, carry: BlockKeys | None = None, span: Span = WHOLE) -> Kept:
        """Return which blocks the layer reads for each token, beyond its window, where `forward` is called so."""
        call, _ = self._call(u, carry, span)
        choice = self.chosen(call, slice(0, u.shape[1]))
        numbers = F.pad(call.places.blocks, (0, 1)).to(u.device)  # (an index of none needs one to point to)
        numbers = picked(numbers, choice.index.flatten(1)).unflatten(1, choice.index.shape[1:])
        none = (0, self.sinks + self.config.top - numbers.shape[3])
        return Kept(F.pad(numbers.where(choice.taken, -1), none, value=-1), F.pad(choice.scores, none))

    def block_scores(
        self, u: Tensor, carry: BlockKeys | None = None, span: Span = WHOLE, queries: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the scores (B, H, t, M) of every completed block of a row for every token, or those of a slice, with
        gradients, and (B, t, M) bool, which of them the token chooses from. Blocks stand in the order in which they
        were completed: of one document that begins with the call, block n is the n-th. A distillation of the choice
        begins here."""
        call, _ = self._call(u, carry, span)
        some = slice(0, u.shape[1]) if queries is None else queries
        return self.call_scores(call, some), call.places.earlier(some, self.near, u.device, self.sinks)

    def call_scores(self, call: Call, queries: slice) -> Tensor:
        """Return the scores (B, H, t, m) of the blocks that are complete once the last of the queries is read."""
        return self.scores(call.content[:, queries], call.summaries[:, : call.places.known(queries.stop)])

    def chosen(self, call: Call, queries: slice) -> Choice:
        """Return the blocks that queries read beyond their window."""
        best = [self.best(call, some, self.call_scores(call, some)) for some in call.parts(queries)]
        return self.choice(call, queries, best)

    def best(self, call: Call, queries: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores (B, H, t, n) of the blocks that are chosen, with gradients, the best first, and which they
        are, as a call lists them; -inf where there are no more. n: `top`, or all blocks where they are fewer. scores:
        `call_scores`, which are used up."""
        scores, _ = call.places.readable(scores, queries, self.near, self.sinks, -math.inf)
        values, index = largest(scores.detach(), min(self.config.top, scores.shape[3]))
        if scores.requires_grad:
            values = scores.gather(3, index)
        return values, index

    def choice(self, call: Call, queries: slice, best: list[tuple[Tensor, Tensor]]) -> Choice:
        """Return the blocks that queries read beyond their window; best: `best` of all these queries."""
        most = max(index.shape[3] for _, index in best)  # (later queries have more blocks to choose from)
        scores = torch.cat([F.pad(x, (0, most - x.shape[3]), value=-math.inf) for x, _ in best], 2)
        index = torch.cat([F.pad(x, (0, most - x.shape[3])) for _, x in best], 2)
        taken = scores.detach() > -math.inf
        scores = scores.masked_fill(~taken, 0)
        if self.sinks:
            first, there = call.places.first_blocks(queries, self.near, self.sinks)  # (B, t, sinks)
            first, there = (x.to(index.device)[:, None].expand(-1, index.shape[1], -1, -1) for x in (first, there))
            index, taken = torch.cat([first, index], 3), torch.cat([there, taken], 3)
            scores = F.pad(scores, (self.sinks, 0))
        return Choice(index, taken, scores, self.sinks)

    def attended(self, call: Call, queries: slice, choice: Choice, bias: Tensor | None = None) -> Tensor:
        """Return (B, t, H, D), what queries read of their window and of the blocks of a choice; bias: (B, H, t, K), on
        the scores of a block's tokens."""
        places, window, device = call.places, self.config.window, call.u.device
        near = slice(max(0, places.before + queries.start - (window - 1)), places.before + queries.stop)
        begin = places.begin[:, queries].to(device) - near.start
        q = call.q[:, queries]
        keys, values = (self.by_head(x[:, near], 2) for x in (call.keys, call.values))
        y, log_sum = read_window(q, keys, values, begin, window)
        shared = self.by_head(torch.arange(self.kv_heads), 0).to(device)
        blocks = Blocks(call.keys, call.values, places.first.to(device), self.config.block, shared)
        y_blocks, total = read_blocks(q, blocks, choice, bias, log_sum, TILE)
        y = (log_sum - total).exp()[..., None] * y + y_blocks
        return y.to(call.values.dtype).transpose(1, 2)

    def _call(self, u: Tensor, carry: BlockKeys | None, span: Span) -> tuple[Call, BlockKeys]:
        """Return what a call reads, and the carry after it."""
        carry = self.new_carry(len(u)) if carry is None else carry
        size, length = carry.size, u.shape[1]
        q, k, v = self.projected(u, span)
        counts, _ = row_counts(carry.position, length, mask=span.mask, reset=span.reset)
        places = BlockPlaces.find(counts, carry, span.reset, self.near)
        recent, content = torch.cat([carry.recent.to(k.dtype), k], 1), q
        if self.rotary:
            q, k = self.turn(q, k, counts - 1, span)
        keys, values = extended(carry.keys, k), extended(carry.values, v)
        end = places.ends.clamp(max=length - 1)
        index = end[..., None] + torch.arange(1 - size, 1, device="cpu")  # (B, E, b), from the call's first token on
        of_keys, of_values = (
            picked(x, (x.shape[1] - length + index).clamp(min=0).flatten(1)).unflatten(1, index.shape[1:])
            for x in (recent, values)
        )
        new = self.summary(of_keys, of_values).to(k.dtype)
        summaries = extended(carry.summaries, new)
        call = Call(u, content, q, keys, values, summaries, places)
        own = (places.of == places.document[:, -1:]) & (places.of >= 0)  # (B, W + E)
        blocks = own.sum(1)
        if not bool(own.all()):
            summaries = picked(summaries, (~own).long().argsort(dim=1, stable=True)[:, : int(blocks.max())])
        last = int(places.held.max())
        return call, BlockKeys(
            size,
            newest(keys, last),
            newest(values, last),
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
