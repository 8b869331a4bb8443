"""What attention over chosen blocks keeps of a stream (`rnn_longctx.models.sparse`), and where its tokens and blocks
stand in a call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.models.carries import carry
from rnn_longctx.recurrence.carry import ON_CPU


def _level(carries: list[BlockKeys]) -> list[BlockKeys]:
    """Return carries as wide as the widest; what is added is not read."""

    def widened(x: list[Tensor], before: bool) -> list[Tensor]:
        width = max(t.shape[1] for t in x)
        return [F.pad(t, (0, 0, 0, 0, *((width - t.shape[1], 0) if before else (0, width - t.shape[1])))) for t in x]

    keys, values, recent = (widened([getattr(c, n) for c in carries], True) for n in ("keys", "values", "recent"))
    summaries = widened([c.summaries for c in carries], False)
    return [
        replace(c, keys=k, values=v, recent=r, summaries=s)
        for c, k, v, r, s in zip(carries, keys, values, recent, summaries, strict=True)
    ]


@carry(level=_level)
@dataclass
class BlockKeys:
    """The carry: the tokens of the document, and summaries of its completed blocks.

    Attributes:
        size: b.
        keys, values: (B, S, H, D), the newest token at the right end; keys as they were turned.
        recent: (B, R, H, D), the last b - 1 keys at most, before they were turned: a block is summarised of those.
        summaries: (B, W, H, F), the oldest block at the left end.
        held: (B,) int64 on the CPU, how many tokens, at the right end, are of the row's document.
        blocks: (B,) int64 on the CPU, how many summaries, at the left end, are: of the last completed blocks.
        position: (B,) int64 on the CPU, tokens of its document that a row has read.
    """

    size: int
    keys: Tensor
    values: Tensor
    recent: Tensor
    summaries: Tensor
    held: Tensor = field(metadata=ON_CPU)
    blocks: Tensor = field(metadata=ON_CPU)
    position: Tensor = field(metadata=ON_CPU)

    def cropped(self, tokens: int) -> BlockKeys:
        """Return the carry with the last `tokens` tokens alone: of blocks with those that lie within them as a whole.
        Blocks begin where they did, and one of which a token is forgotten is read in the window alone."""
        first = max(0, self.keys.shape[1] - tokens)
        blocks, index = within(tokens, self.blocks, self.position, self.size, self.summaries.shape[1])
        return replace(
            self,
            keys=self.keys[:, first:],
            values=self.values[:, first:],
            summaries=picked(self.summaries, index),
            held=self.held.clamp(max=tokens),
            blocks=blocks,
        )


@dataclass(frozen=True, eq=False)
class BlockPlaces:
    """Where the tokens and blocks of a call stand, all on the CPU. The carry's S tokens stand before the call's T, and
    its W blocks before the E that a row completes at most.

    Attributes:
        before: S.
        document: (B, T), which of the call's documents a token belongs to; the carry's is 0, padding is of -2.
        number: (B, T), which block of its document it is in.
        begin: (B, T), the place where its window begins, or what is left of it; the carry's first token is at 0.
        held: (B,), how many tokens of the last document are held after the call.
        ends: (B, E), the place in the call where a block ends; T is of none.
        of: (B, W + E), the document of each block; -1: there is none, or a token of it is forgotten.
        blocks: (B, W + E), which block of its document it is.
        first: (B, W + E), the place of its first token.
    """

    before: int
    document: Tensor
    number: Tensor
    begin: Tensor
    held: Tensor
    ends: Tensor
    of: Tensor
    blocks: Tensor
    first: Tensor

    @classmethod
    def find(cls, counts: Tensor, carry: BlockKeys, reset: Tensor | None, window: int) -> BlockPlaces:
        """counts: (B, T), tokens of its document read up to and with each; 0 at padding. window: in blocks."""
        size, before, length = carry.size, carry.keys.shape[1], counts.shape[1]
        token, real = torch.arange(length, device="cpu"), counts > 0
        document = torch.zeros_like(counts) if reset is None else reset.cpu().long().cumsum(1)
        document = document.where(real, -2)
        number = (counts - 1) // size
        forgotten = (before - carry.held)[:, None]  # what stands before is not read on
        begin = before + token - (counts - 1) + (number - window + 1).clamp(min=0) * size
        begin = torch.where(document == 0, begin.maximum(forgotten), begin)
        begin = torch.where(real, begin, before + token)  # padding sees itself
        held = torch.where(document[:, -1] == 0, carry.held + real.sum(1), counts[:, -1])
        last = real & (counts % size == 0)
        ends = torch.where(last, token, length).sort(1).values[:, : int(last.sum(1).max())]
        end = ends.clamp(max=length - 1)
        first = before + end - size + 1
        of = document.gather(1, end)
        of = of.where((ends < length) & ((of > 0) | (first >= forgotten)), -1)
        older = torch.arange(carry.summaries.shape[1], device="cpu")
        blocks = (carry.position // size - carry.blocks)[:, None] + older
        of_carry = torch.zeros_like(blocks).where(older < carry.blocks[:, None], -1)
        first_of_carry = (before - carry.position)[:, None] + blocks * size
        of, first = torch.cat([of_carry, of], 1), torch.cat([first_of_carry, first], 1)
        blocks = torch.cat([blocks, number.gather(1, end)], 1)
        return cls(before, document, number, begin, held, ends, of, blocks, first)

    def known(self, stop: int) -> int:
        """Return how many blocks, the first ones, may be read by tokens before `stop`."""
        return self.of.shape[1] - self.ends.shape[1] + int((self.ends < stop).sum(1).max())

    @cached_property
    def run(self) -> slice:
        """The blocks, in a row, that are of the one document that a row reads in this call, whichever the row; none
        where a row reads several."""
        document = self.document[:, :1]
        own = ((self.of == document) & (self.document == document).all(1, keepdim=True)).all(0)
        if not bool(own.any()):
            return slice(0, 0)
        first = int(own.long().argmax())
        return slice(first, first + int(own[first:].long().cumprod(0).sum()))

    def free(self, queries: slice, by: int, least: int = 0) -> slice:
        """Return which of the `known` blocks, in a row, all queries may read; blocks: as `earlier` says. (A document's
        blocks follow each other in the list: a row's first says which the others are.)"""
        if self.run.start == self.run.stop:
            return self.run
        older = self.blocks[:, self.run.start]
        first = self.run.start + max(0, int((least - older).max()))
        stop = self.run.start + int((self.number[:, queries.start] - by - older).min()) + 1
        return slice(first, max(first, min(stop, self.run.stop, self.known(queries.stop))))

    def readable(
        self, scores: Tensor, queries: slice, by: int, least: int, otherwise: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return scores (B, H, t, m) of the `known` blocks, in place, with `otherwise` where a query may not read a
        block; and (B, t, m) bool, which it may, or None where there is a block that all of them may. Blocks: as
        `earlier` says."""
        free = self.free(queries, by, least)
        if free.start == free.stop:
            seen = self.earlier(queries, by, scores.device, least)
            return scores.masked_fill_(~seen[:, None], otherwise), seen
        for side in (slice(0, free.start), slice(free.stop, scores.shape[3])):
            if side.start < side.stop:
                seen = self.earlier(queries, by, scores.device, least, side)
                scores[..., side].masked_fill_(~seen[:, None], otherwise)
        return scores, None

    def earlier(
        self, queries: slice, by: int, device: torch.device, least: int = 0, some: slice | None = None
    ) -> Tensor:
        """Return (B, t, m) bool: which of the `known` blocks, or of some, are of a query's document, at least `by`
        blocks before its own, and not among the first `least`."""
        some = slice(0, self.known(queries.stop)) if some is None else some
        of, blocks = (x[:, None, some].to(device) for x in (self.of, self.blocks))
        document, number = (x[:, queries, None].to(device) for x in (self.document, self.number))
        return (of == document) & (blocks <= number - by) & (blocks >= least)

    def first_blocks(self, queries: slice, by: int, count: int) -> tuple[Tensor, Tensor]:
        """Return for each query the first blocks 0 to count - 1 of its document, at least `by` blocks before its own:
        their places (B, t, count) in the list of blocks, and bool (B, t, count), whether they are there."""
        row, column = ((self.of >= 0) & (self.blocks < count)).nonzero(as_tuple=True)
        table = torch.full((len(self.of), int(self.document.max().clamp(min=0)) + 1, count), -1, device="cpu")
        table[row, self.of[row, column], self.blocks[row, column]] = column
        index = picked(table, self.document[:, queries].clamp(min=0))
        numbers = torch.arange(count, device="cpu")
        there = (numbers <= self.number[:, queries, None] - by) & (self.document[:, queries, None] >= 0) & (index >= 0)
        return index.clamp(min=0), there


def within(tokens: int, blocks: Tensor, position: Tensor, size: int, width: int) -> tuple[Tensor, Tensor]:
    """Return how many of each row's last completed blocks (B,) lie within its last `tokens` tokens as a whole, and
    where those stand (B, n) among the `width` that are held; behind a row's own stand others.

    Args:
        blocks: (B,) how many are held of each row, at the left end.
        position: (B,) tokens that each row has read.
        size: tokens of a block.
    """
    kept = torch.minimum(blocks, ((tokens - position % size) // size).clamp(min=0))
    index = (blocks - kept)[:, None] + torch.arange(int(kept.max()), device="cpu")
    return kept, index.clamp(max=max(0, width - 1))


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Return (B, n, ...), the rows' items at index (B, n) of x (B, m, ...)."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index.to(x.device)]
