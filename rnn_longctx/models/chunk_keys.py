"""What chunk-linformer keeps of a stream (`rnn_longctx.models.mixers.chunk_linformer`), and where its tokens and chunks
stand in a call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.models.block_keys import picked, within
from rnn_longctx.models.carries import carry
from rnn_longctx.recurrence.carry import ON_CPU


def _level(carries: list[ChunkKeys]) -> list[ChunkKeys]:
    """Return carries as wide as the widest; what is added is not read."""
    tokens, chunks = (max(sizes) for sizes in zip(*((c.keys.shape[1], c.chunk_keys.shape[1]) for c in carries)))

    def widened(c: ChunkKeys) -> ChunkKeys:
        before, behind = (0, 0) * 2 + (tokens - c.keys.shape[1], 0), (0, 0) * 3 + (0, chunks - c.chunk_keys.shape[1])
        keys, values = (F.pad(t, before) for t in (c.keys, c.values))
        chunk_keys, chunk_values = (F.pad(t, behind) for t in (c.chunk_keys, c.chunk_values))
        return replace(c, keys=keys, values=values, chunk_keys=chunk_keys, chunk_values=chunk_values)

    return [widened(c) for c in carries]


@carry(level=_level)
@dataclass
class ChunkKeys:
    """The carry: the last c - 1 tokens at most, and what is left of completed chunks.

    Attributes:
        size: c.
        keys, values: (B, S, H, D), the newest token at the right end; keys as they were turned.
        chunk_keys, chunk_values: (B, W, k, H, D), the oldest chunk at the left end.
        held: (B,) int64 on the CPU, how many tokens, at the right end, are of the unfinished chunk.
        chunks: (B,) int64 on the CPU, how many chunks, at the left end, are of the row's document.
        position: (B,) int64 on the CPU, tokens of its document that a row has read.
    """

    size: int
    keys: Tensor
    values: Tensor
    chunk_keys: Tensor
    chunk_values: Tensor
    held: Tensor = field(metadata=ON_CPU)
    chunks: Tensor = field(metadata=ON_CPU)
    position: Tensor = field(metadata=ON_CPU)

    @property
    def alike(self) -> bool:
        """Whether there are rows, all go on at one place, and they read all tokens of the unfinished chunk and as many
        chunks as are here."""
        place, chunks = self.position[:1], self.chunk_keys.shape[1]
        whole = (self.held == place % self.size) & (self.chunks == chunks)
        return len(place) > 0 and bool(((self.position == place) & whole).all())

    def cropped(self, tokens: int) -> ChunkKeys:
        """Return the carry with the last `tokens` tokens alone: of chunks with those that lie within them as a whole. A
        chunk that is completed later is projected of the tokens that are left of it."""
        first = max(0, self.keys.shape[1] - tokens)
        chunks, index = within(tokens, self.chunks, self.position, self.size, self.chunk_keys.shape[1])
        return replace(
            self,
            keys=self.keys[:, first:],
            values=self.values[:, first:],
            chunk_keys=picked(self.chunk_keys, index),
            chunk_values=picked(self.chunk_values, index),
            held=self.held.clamp(max=tokens),
            chunks=chunks,
        )


@dataclass(frozen=True, eq=False)
class ChunkPlaces:
    """Where the tokens and chunks of a call stand, all on the CPU. The carry's S tokens stand before the call's T, and
    its W chunks before the E that a row completes at most.

    Attributes:
        before: S.
        begin: (B, T) the place where a token's chunk begins, or what is left of it; the carry's first token is at 0.
        document: (B, T) which of the call's documents a token belongs to; the carry's is 0.
        ends: (B, W + E) the last token of every chunk, from 0 at the call's first on: -1 in the carry; T is of none.
        of: (B, W + E) the document of every chunk.
        chunks: W.
    """

    before: int
    begin: Tensor
    document: Tensor
    ends: Tensor
    of: Tensor
    chunks: int

    @classmethod
    def find(cls, counts: Tensor, carry: ChunkKeys, reset: Tensor | None) -> ChunkPlaces:
        """counts: (B, T), tokens of its document read up to and with each; 0 at padding."""
        before, chunks, length = carry.keys.shape[1], carry.chunk_keys.shape[1], counts.shape[1]
        token = torch.arange(length, device="cpu")
        offset, real = (counts - 1) % carry.size, counts > 0
        begin = torch.where(offset <= token, before + token - offset, before - carry.held[:, None])
        begin = torch.where(real, begin, before + token)  # padding sees itself
        document = torch.zeros_like(counts) if reset is None else reset.cpu().long().cumsum(1)
        last = real & (offset == carry.size - 1)
        ends = torch.where(last, token, length).sort(1).values[:, : int(last.sum(1).max())]
        of_carry = torch.where(torch.arange(chunks, device="cpu") < carry.chunks[:, None], -1, length)
        of = torch.cat([torch.zeros_like(of_carry), document.gather(1, ends.clamp(max=length - 1))], 1)
        return cls(before, begin, document, torch.cat([of_carry, ends], 1), of, chunks)

    def completed(self) -> tuple[Tensor, Tensor]:
        """Return the places (B, E) of the last tokens of the chunks that the call completes, and of what is left of
        their first ones."""
        end = self.ends[:, self.chunks :].clamp(max=self.begin.shape[1] - 1)
        return self.before + end, self.begin.gather(1, end)
