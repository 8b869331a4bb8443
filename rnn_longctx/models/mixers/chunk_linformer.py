"""Linformer (arXiv 2006.04768): keys and values are projected along the sequence, n of them to k, and softmax attention
reads the k.

    y = softmax(q (E K)^T / sqrt(d)) F V       E, F (k, n): of a fixed length n, every token mixed into every row

That is `Linformer`, a layer for classification: no token of it can be kept from those after it. For language stands

    chunk-linformer     a token reads the tokens of its own chunk of c, up to itself, exactly, and of every chunk that
                        was completed before it the k keys E K_j and values F V_j; all in one softmax, E, F (k, c)

a form of this project's own, chunk by chunk causal. Chunks are counted from where a document begins. Queries and keys
are turned by their places (arXiv 2104.09864), keys before they are projected: what is read hangs on distances alone.
What a layer keeps grows with the text: 2 k d_model numbers for every c tokens, k / c of what full attention keeps,
beside the last c - 1 tokens; and its time grows with the square of the length, k / c as fast.

Rows that all stand at one place of a document are read by the kernels of `rnn_longctx.models.flash`. Others, with
padding, with documents that begin inside a call, or of unequal lengths, take the plain path of this file, where scores
and masks of QUERIES queries at a time are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.attention import CausalAttention, softmax
from rnn_longctx.models.block_keys import picked
from rnn_longctx.models.chunk_keys import ChunkKeys, ChunkPlaces
from rnn_longctx.models.flash import At, Call, Pattern, Stretches, one_softmax, readable
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixers import MIXERS, NO_MIXERS
from rnn_longctx.models.room import extended, newest
from rnn_longctx.models.rotary import turned
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.rows import row_counts
from rnn_longctx.recurrence.span import Span
from rnn_longctx.spec import tuned

QUERIES = 256  # whose scores are held at once


def projection(rank: int, length: int) -> nn.Parameter:
    """Return (rank, length) weights of a sum over `length` tokens, which is about as large as one of them."""
    return nn.Parameter(torch.randn(rank, length) * length**-0.5)


class Linformer(nn.Module):
    """The layer of the paper, for classification: it is no mixer of a language model.

    Args:
        length: n, the tokens of every sequence.
        rank: k.
        causal: refused where it is asked for.
    Raises:
        InputError: a causal form, which this one does not have, or sizes that do not fit.
    """

    def __init__(self, d_model: int, heads: int, length: int, rank: int, causal: bool = False):
        super().__init__()
        if causal:
            raise InputError(NO_MIXERS["linformer"])
        if min(heads, length, rank) < 1 or d_model % heads:
            raise InputError(
                f"linformer: expected heads that divide d_model, a length and a rank, each at least 1, got heads = "
                f"{heads}, d_model = {d_model}, length = {length}, rank = {rank}"
            )
        self.heads, self.length = heads, length
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.key_proj, self.value_proj = projection(rank, length), projection(rank, length)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return as much as x (B, n, d_model). mask: (B, n) bool, False where a token is padding, which no token reads;
        None: nowhere. Raises InputError for sequences of another length."""
        if x.shape[1] != self.length:
            raise InputError(
                f"linformer reads sequences of {self.length} tokens, padded where they are shorter, got {x.shape[1]}"
            )
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, n, H, D)
        if mask is not None:
            k, v = (t * mask[..., None, None] for t in (k, v))
        k, v = (torch.einsum("rn,bnhd->brhd", p, t) for p, t in ((self.key_proj, k), (self.value_proj, v)))
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.device)
        return self.out_proj(softmax(q, k, v, everything).flatten(2))


@dataclass(frozen=True)
class ChunkLinformerConfig:
    """The shape of a layer.

    Attributes:
        chunk: c, tokens of a chunk.
        rank: k, the keys and values that are left of one.
    """

    chunk: int = tuned(64, over=(8, 16, 32, 64, 128, 256))
    rank: int = tuned(8, over=(1, 2, 4, 8, 16, 32))
    heads: int = 4

    def __post_init__(self) -> None:
        if self.chunk < 2 or self.heads < 1 or not 1 <= self.rank <= self.chunk:
            raise InputError(
                "chunk-linformer: expected a chunk of at least 2 tokens, a rank from 1 to the chunk and at least 1 "
                f"head, got chunk = {self.chunk}, rank = {self.rank}, heads = {self.heads}"
            )


@dataclass(frozen=True, eq=False)
class _Readable:
    """What a call may read: keys and values (B, S + T, H, D) of tokens, (B, W + E, k, H, D) of chunks."""

    keys: Tensor
    values: Tensor
    chunk_keys: Tensor
    chunk_values: Tensor


def _left(weight: Tensor, tokens: Tensor) -> Tensor:
    """Return (B, E, k, H, D), what weights (k, c) leave of the tokens (B, E, c, H, D) of chunks."""
    return torch.einsum("rc,bechd->berhd", weight, tokens).to(tokens.dtype)


@dataclass(frozen=True)
class _ChunksAt(At):
    """What is read of a call by flash attention: beside its own chunk, which is the pattern, what is left of others.

    All queries read all chunks that the carry has completed. Those of the call are read by halves: of every two
    stretches of n of its chunks, n = 1, 2, 4, ..., the second reads the first. So every pair of a query and a key is
    there once, no call of a kernel needs a mask, and the calls are as many as the chunks have binary digits.

    Attributes:
        start: the tokens that the carry holds of the call's first chunk.
        rank: k.
        chunks: W, those that the carry has completed.
    """

    rank: int
    chunks: int

    def calls(self, q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], views: bool = False) -> Iterator[Call]:
        """Yield the calls of a kernel. held: keys and values (B, H, M, D) of the first chunk, (B, (W + E) k, H, D) of
        completed ones."""
        yield from super().calls(q, k, v, held, views)
        for tokens, left in self._earlier():
            of_each = (tokens, q), (left, held[2]), (left, held[3])
            queries, keys, values = (some.view(x) if views else some.sequences(x) for some, x in of_each)
            yield Call(tokens, queries, keys, values, False)

    def _earlier(self) -> Iterator[tuple[Stretches, Stretches]]:
        """Yield stretches of queries and of what is left of chunks, each of which the queries beside it read."""
        if self.chunks:
            left = self.chunks * self.rank
            yield Stretches(0, 1, self.length, self.length), Stretches(0, 1, left, left)
        size, end, n = self.patterns[0].segment, self.start + self.length, 1
        while (half := n * size) < end:
            whole, rest = divmod(end, 2 * half)
            for first, count, tokens in ((0, whole, half), (whole, 1, rest - half)):
                if count and tokens > 0:
                    queries = Stretches((2 * first + 1) * half - self.start, count, tokens, 2 * half)
                    left = (self.chunks + 2 * first * n) * self.rank
                    yield queries, Stretches(left, count, n * self.rank, 2 * n * self.rank)
            n *= 2


@MIXERS.register
class ChunkLinformer(CausalAttention):
    """A layer of attention over a chunk and what is left of the chunks before it."""

    name = "chunk-linformer"
    Config: ClassVar[Any] = ChunkLinformerConfig
    examples = ("chunk-linformer:chunk=7,rank=3,heads=2",)  # (chunks end within a test's stream)

    def __init__(self, config: ChunkLinformerConfig, model: Shape):
        super().__init__(config, model)
        self.key_proj, self.value_proj = (projection(config.rank, config.chunk) for _ in range(2))  # E, F

    def forward(self, u: Tensor, carry: ChunkKeys | None, span: Span) -> tuple[Tensor, ChunkKeys]:  # type: ignore[override]
        carry = self.new_carry(len(u)) if carry is None else carry
        q, k, v = self.projected(u, span)  # (B, T, H, D)
        one_place = span.mask is None and span.reset is None and carry.alike and readable(q)
        if one_place:
            counts = torch.arange(1, u.shape[1] + 1, device=u.device) + int(carry.position[0])
        else:
            counts, _ = row_counts(carry.position, u.shape[1], mask=span.mask, reset=span.reset)
        q, k = turned(q, counts - 1), turned(k, counts - 1)
        k, v = extended(carry.keys, k), extended(carry.values, v)  # (B, S + T, H, D)
        if one_place:
            y, carry = self._of_one_place(q, k, v, carry)
        else:
            y, carry = self._of_any_rows(q, k, v, carry, ChunkPlaces.find(counts, carry, span.reset), counts)
        return self.out_proj(y.flatten(2)), carry

    def _of_one_place(self, q: Tensor, k: Tensor, v: Tensor, carry: ChunkKeys) -> tuple[Tensor, ChunkKeys]:
        """Return what queries (B, T, H, D) read of keys and values (B, S + T, H, D), in rows that all go on at one
        place, and the carry after it."""
        size, length = self.config.chunk, q.shape[1]
        before, held = carry.keys.shape[1], int(carry.held[0])
        first, ended = before - held, (held + length) // size
        whole = (x[:, first : first + ended * size].unflatten(1, (ended, size)) for x in (k, v))
        new = (_left(weight, x) for weight, x in zip((self.key_proj, self.value_proj), whole))
        chunk_keys, chunk_values = map(extended, (carry.chunk_keys, carry.chunk_values), new)
        own = (k[:, first:before].transpose(1, 2), v[:, first:before].transpose(1, 2))
        left = (chunk_keys.flatten(1, 2), chunk_values.flatten(1, 2))
        at = _ChunksAt((Pattern(size, 1),), held, length, self.config.rank, carry.chunk_keys.shape[1])
        y = one_softmax(q, k[:, before:], v[:, before:], [own, left], at)
        after = ChunkKeys(
            size,
            newest(k, size - 1),
            newest(v, size - 1),
            chunk_keys,
            chunk_values,
            held=(carry.held + length) % size,
            chunks=carry.chunks + ended,
            position=carry.position + length,
        )
        return y, after

    def _of_any_rows(
        self, q: Tensor, k: Tensor, v: Tensor, carry: ChunkKeys, places: ChunkPlaces, counts: Tensor
    ) -> tuple[Tensor, ChunkKeys]:
        """Return the same of any rows. counts: (B, T), tokens of its document read up to and with each."""
        new_keys, new_values = (self._projected(p, x, places) for p, x in ((self.key_proj, k), (self.value_proj, v)))
        chunk_keys, chunk_values = extended(carry.chunk_keys, new_keys), extended(carry.chunk_values, new_values)
        source = _Readable(k, v, chunk_keys, chunk_values)
        y = torch.cat(list(self._read(q, source, places)), 1)
        return y, self._carry_after(source, places, counts)

    def _projected(self, weight: Tensor, x: Tensor, places: ChunkPlaces) -> Tensor:
        """Return (B, E, k, H, D), what is left of the chunks that a call completes, from x (B, S + T, H, D): of their
        tokens that are seen."""
        last, begin = places.completed()  # (B, E)
        index = last[..., None] + torch.arange(1 - self.config.chunk, 1, device="cpu")  # (B, E, c)
        seen = (index >= begin[..., None]).to(x.device)
        tokens = picked(x, index.clamp(min=0).flatten(1)).unflatten(1, index.shape[1:])  # (B, E, c, H, D)
        return _left(weight, tokens * seen[..., None, None])

    def _read(self, q: Tensor, source: _Readable, places: ChunkPlaces) -> Iterator[Tensor]:
        """Yield what QUERIES queries at a time read."""
        before, length = places.before, q.shape[1]
        for t in range(0, length, QUERIES):
            queries = slice(t, min(t + QUERIES, length))
            near = slice(max(0, before + t - (self.config.chunk - 1)), before + queries.stop)
            token = torch.arange(t, queries.stop, device="cpu")[:, None]
            place = torch.arange(near.start, near.stop, device="cpu")
            own = (place >= places.begin[:, queries, None]) & (place <= before + token)  # (B, t, near)
            # what no row has completed by then is left out
            known = places.chunks + int((places.ends[:, places.chunks :] < queries.stop).sum(1).max())
            earlier = places.ends[:, None, :known] < token
            completed = earlier & (places.of[:, None, :known] == places.document[:, queries, None])  # (B, t, known)
            seen = torch.cat([completed.repeat_interleave(self.config.rank, 2), own], 2).to(q.device)
            keys = torch.cat([source.chunk_keys[:, :known].flatten(1, 2), source.keys[:, near]], 1)
            values = torch.cat([source.chunk_values[:, :known].flatten(1, 2), source.values[:, near]], 1)
            yield softmax(q[:, queries], keys, values, seen[:, None])

    def _carry_after(self, source: _Readable, places: ChunkPlaces, counts: Tensor) -> ChunkKeys:
        size, length = self.config.chunk, counts.shape[1]
        chunk_keys, chunk_values = source.chunk_keys, source.chunk_values
        kept = (places.ends < length) & (places.of == places.document[:, -1:])  # (B, W + E)
        chunks, position = kept.sum(1), counts[:, -1].clone()
        if not bool(kept.all()):
            index = (~kept).long().argsort(dim=1, stable=True)[:, : int(chunks.max())]
            chunk_keys, chunk_values = picked(chunk_keys, index), picked(chunk_values, index)
        keys, values = (newest(t, size - 1) for t in (source.keys, source.values))
        held = torch.where(position % size == 0, 0, places.before + length - places.begin[:, -1])
        return ChunkKeys(size, keys, values, chunk_keys, chunk_values, held, chunks, position)

    def pairs(self, length: int) -> int:
        """Return the pairs of a query and a key: of its own chunk, and `rank` of each chunk before."""
        c = self.config
        chunks, rest = divmod(length, c.chunk)
        near = chunks * c.chunk * (c.chunk + 1) // 2 + rest * (rest + 1) // 2
        return c.heads * (near + c.rank * (c.chunk * chunks * (chunks - 1) // 2 + rest * chunks))

    def operations(self, length: int) -> int:
        attended = super().operations(length)
        assert attended is not None
        c = self.config
        return attended + 4 * self.in_proj.in_features * c.rank * (
            length // c.chunk * c.chunk
        )  # keys' and values' maps

    def state_size(self) -> StateSize:
        numbers = 2 * self.in_proj.in_features
        chunk = self.config.chunk
        return StateSize(windows={chunk - 1: numbers}, chunks={chunk: numbers * self.config.rank})

    def new_carry(self, rows: int) -> ChunkKeys:  # type: ignore[override]
        weight, c = self.in_proj.weight, self.config
        keys = weight.new_zeros(rows, 0, c.heads, self.in_proj.in_features // c.heads)
        chunks = weight.new_zeros(rows, 0, c.rank, *keys.shape[2:])
        nothing = torch.zeros(rows, dtype=torch.int64, device="cpu")
        return ChunkKeys(c.chunk, keys, keys.clone(), chunks, chunks.clone(), nothing, nothing.clone(), nothing.clone())
