"""Dilated attention over the ranks of a process group, each with a contiguous shard of one document.

A segment inside a shard needs no other rank. One that began on an earlier rank is, to the rank that goes on with it,
what a stream holds of a segment that an earlier call began: the taken keys and values before its first token. So each
rank is sent those, of each pattern, from the ranks of that segment before it, every head's own shift: of n tokens there
n / r rows, and nothing from ranks after it, which it may not read. Then it reads its own queries as one rank does
(`dilated`), with the causal mask by global position, patterns merged by their denominators.

All patterns travel in one all-to-all, in which a rank sends to those after it: an all-gather inside every segment's
ranks, without what the mask would hide, and without a process group for each. Backwards the gradients of those keys and
values travel the other way, and are added on the rank that has the tokens (a reduce-scatter). What a stream holds after
the last shard, its rank hands to all.

Everybody works out from the shards' lengths alone what is sent where.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError
from rnn_longctx.models.flash import Pattern
from rnn_longctx.models.mixers.dilated import Held, moved, taken_before
from rnn_longctx.recurrence.shard import Shard


@dataclass(frozen=True)
class Piece:
    """What one rank sends to another of a pattern.

    Attributes:
        number: of the pattern.
        pattern: the pattern.
        end: the position before which the receiver holds it: where its shard begins.
        columns: where in the (B, H, M, D) that it holds the rows stand.
    """

    number: int
    pattern: Pattern
    end: int
    columns: slice

    def shape(self, rows: int, heads: int, channels: int) -> tuple[int, ...]:
        return rows, heads, self.columns.stop - self.columns.start, channels


@dataclass(frozen=True, eq=False)
class Cut:
    """Where the shards of a call stand in their document: rank i's from position places[i] up to places[i + 1]."""

    patterns: tuple[Pattern, ...]
    places: list[int]
    rank: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, shard: Shard, start: int, patterns: tuple[Pattern, ...]) -> Cut:
        """Return the cut of a call that begins at position `start`.

        Raises:
            InputError: more ranks than the call has of the shortest segments.
        """
        places = [start]
        for length in shard.lengths:
            places.append(places[-1] + length)
        refuse_many(patterns, len(shard.lengths), start, shard.total)
        return cls(patterns, places, shard.rank, shard.group)

    @property
    def here(self) -> int:
        """The position of this rank's first token."""
        return self.places[self.rank]

    @property
    def ranks(self) -> range:
        return range(len(self.places) - 1)

    def pieces(self, source: int, target: int) -> list[Piece]:
        """Return what a rank sends to another."""
        if source >= target:
            return []
        end, held = self.places[target], self.places[source : source + 2]
        pieces = [Piece(i, p, end, columns(p, end, held[0], held[1])) for i, p in enumerate(self.patterns)]
        return [piece for piece in pieces if piece.columns.start < piece.columns.stop]

    @property
    def apart(self) -> bool:
        """Whether no rank needs anything of another's."""
        return not any(self.pieces(i, j) for j in self.ranks for i in range(j))

    def rows_received(self, rank: int) -> int:
        """Return how many keys a head of a rank is sent."""
        return sum(p.columns.stop - p.columns.start for i in self.ranks for p in self.pieces(i, rank))


def refuse_many(patterns: tuple[Pattern, ...], ranks: int, start: int, length: int) -> None:
    """Raise InputError if `length` tokens from position `start` on have fewer of the shortest segments than ranks."""
    shortest = patterns[0].segment
    segments = (start + length - 1) // shortest - start // shortest + 1
    if ranks > segments:
        raise InputError(
            f"longnet: {counted(length, 'token')} in {counted(segments, 'segment')} of {shortest} are read by at most "
            f"as many ranks, got {ranks}: use fewer, or a longer text"
        )


def columns(pattern: Pattern, end: int, first: int, last: int) -> slice:
    """Return in which columns of what is held before the position `end` tokens from `first` up to before `last` <= end
    stand, of whatever head; some heads may have none of those in the outer ones."""
    first = max(first, end // pattern.segment * pattern.segment)
    if first >= last:
        return slice(0, 0)
    left = max(0, pattern.memory - 1 - (end - 1 - first) // pattern.dilation)
    return slice(left, max(left, pattern.memory - (end - last) // pattern.dilation))


def held_here(k: Tensor, v: Tensor, held: Held, cut: Cut) -> Held:
    """Return what is held of each pattern before this rank's first token, of keys and values (B, T, H, D) of all ranks
    and of what was held before the first of them. Collective, and so is its gradient."""
    sent = [] if cut.apart else _Sent.apply(k, v, cut)
    after: Held = []
    for i, (pattern, pair) in enumerate(zip(cut.patterns, held, strict=True)):
        both = []
        for j, tensor in enumerate(pair):
            parts = [sent[2 * i + j]] if len(sent) else []
            if cut.here // pattern.segment * pattern.segment < cut.places[0] or not parts:  # the call began within it
                parts.append(moved(tensor.to(k.dtype), pattern, cut.places[0], cut.here))
            both.append(sum(parts[1:], parts[0]))
        after.append((both[0], both[1]))
    return after


class _Sent(torch.autograd.Function):
    """Keys and values (B, H, M, D) of each pattern, of this call's tokens before this rank's first; zero where that is
    none."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, cut: Cut) -> tuple[Tensor, ...]:
        rows, _, heads, channels = k.shape
        ctx.cut, ctx.like = cut, (k.shape, k.dtype, k.device)
        out = [[_rows(x, piece, cut) for piece in cut.pieces(cut.rank, j) for x in (k, v)] for j in cut.ranks]
        into = [[piece for piece in cut.pieces(i, cut.rank) for _ in (k, v)] for i in cut.ranks]
        shapes = [[piece.shape(rows, heads, channels) for piece in pieces] for pieces in into]
        held = [k.new_zeros(rows, heads, p.memory, channels) for p in cut.patterns for _ in (k, v)]
        for pieces, tensors in zip(into, _exchanged(out, shapes, k, cut)):
            for n, (piece, tensor) in enumerate(zip(pieces, tensors)):
                held[2 * piece.number + n % 2][:, :, piece.columns] += tensor
        return tuple(held)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cut, (shape, dtype, device) = ctx.cut, ctx.like
        rows, _, heads, channels = shape
        out = [
            [gradients[2 * piece.number + n][:, :, piece.columns] for piece in cut.pieces(i, cut.rank) for n in (0, 1)]
            for i in cut.ranks
        ]
        back = [[piece for piece in cut.pieces(cut.rank, j) for _ in (0, 1)] for j in cut.ranks]
        shapes = [[piece.shape(rows, heads, channels) for piece in pieces] for pieces in back]
        received = _exchanged(out, shapes, gradients[0], cut)
        if not any(back):
            return None, None, None
        grads = [torch.zeros(shape, dtype=dtype, device=device) for _ in (0, 1)]
        for pieces, tensors in zip(back, received):
            for n, (piece, tensor) in enumerate(zip(pieces, tensors)):
                place, head, own = _places(piece, heads, cut, device)
                tensor = tensor.masked_fill(~own[..., None], 0)
                for grad, of_row in zip(grads[n % 2], tensor):
                    grad.index_put_((place, head), of_row, accumulate=True)
        return *grads, None


def _places(piece: Piece, heads: int, cut: Cut, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return which token of this rank's (H, C) each head sends, its head (H, 1), and where (H, C) there is one."""
    position = taken_before(piece.pattern, heads, piece.end, device)[:, piece.columns]
    first = piece.end // piece.pattern.segment * piece.pattern.segment
    begin, end = cut.places[cut.rank : cut.rank + 2]
    own = (position >= max(begin, first)) & (position < end)
    return (position - begin).clamp(0, end - begin - 1), torch.arange(heads, device=device)[:, None], own


def _rows(x: Tensor, piece: Piece, cut: Cut) -> Tensor:
    """Return the rows (B, H, C, D) of a piece from x (B, T, H, D); zero where a head has none."""
    place, head, own = _places(piece, x.shape[2], cut, x.device)
    return x[:, place, head].masked_fill(~own[..., None], 0)


def _exchanged(
    out: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], like: Tensor, cut: Cut
) -> list[list[Tensor]]:
    """Return the tensors of given shapes that each rank sends to this one, which sends it `out`."""
    sent = [torch.cat([like.new_empty(0), *(t.flatten() for t in tensors)]) for tensors in out]
    sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
    totals = list(map(sum, sizes))
    received = like.new_empty(sum(totals))
    dist.all_to_all_single(received, torch.cat(sent), totals, [len(t) for t in sent], group=cut.group)
    pieces = []
    for flat, of_rank, lengths in zip(received.split(totals), shapes, sizes):
        pieces.append([t.view(shape) for t, shape in zip(flat.split(lengths), of_rank)])
    return pieces


def with_last_held(y: Tensor, held: Held, cut: Cut) -> tuple[Tensor, Held]:
    """Return y as it is, and on every rank what the last one holds after its shard. Collective, and so is its gradient,
    which is the sum of what all ranks do with it, whether or not this one uses it."""
    tensors = [tensor for pair in held for tensor in pair]
    end = cut.places[-1]
    seen = [columns(p, end, end // p.segment * p.segment, end) for p in cut.patterns for _ in (0, 1)]
    if all(c.start == c.stop for c in seen):  # all segments end with the call
        tensors = [torch.zeros_like(tensor) for tensor in tensors]
    else:
        y, *tensors = _Last.apply(y, cut, seen, *tensors)
    return y, list(zip(tensors[::2], tensors[1::2]))


class _Last(torch.autograd.Function):
    """y as it is, and of each tensor the given columns, as the last rank has them; zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, cut: Cut, seen: list[slice], *held: Tensor) -> tuple[Tensor, ...]:
        ctx.cut, ctx.seen, ctx.shapes = cut, seen, [t.shape for t in held]
        flat = torch.cat([t[:, :, c].flatten() for t, c in zip(held, seen)])
        dist.broadcast(flat, _last(cut), cut.group)
        return y.view_as(y), *_filled(flat, seen, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, *d_held = gradients
        flat = torch.cat([t[:, :, c].flatten() for t, c in zip(d_held, ctx.seen)])
        dist.reduce(flat, _last(ctx.cut), group=ctx.cut.group)
        if ctx.cut.rank != ctx.cut.ranks[-1]:
            return dy, None, None, *[None] * len(d_held)
        return dy, None, None, *_filled(flat, ctx.seen, ctx.shapes)


def _filled(flat: Tensor, seen: list[slice], shapes: list[torch.Size]) -> list[Tensor]:
    whole = [flat.new_zeros(shape) for shape in shapes]
    places = [tensor[:, :, c] for tensor, c in zip(whole, seen)]
    for place, values in zip(places, flat.split([place.numel() for place in places])):
        place.copy_(values.view(place.shape))
    return whole


def _last(cut: Cut) -> int:
    """Return the number among all processes of the last rank."""
    return cut.ranks[-1] if cut.group is None else dist.get_global_rank(cut.group, cut.ranks[-1])
