"""What queries read of a window and of blocks that were chosen for each of them, in one softmax
(`rnn_longctx.models.sparse`).

Keys and values are not gathered for every query: those of 4 blocks of 16 tokens are 32 times as many numbers as the
query and its output for each block are. Pairs of a query and a block are sorted by blocks, and cut into tiles: so many
slots for queries of one block, a block with many of them in several tiles. A tile's keys meet its queries in one
product. What a query reads in its tiles and in its window is put together by the logarithms of sums of exponentials:

    z = logsumexp over the window and over every chosen block of the scores s_i + bias
    y = sum of exp(s_i + bias - z) v_i

which is the softmax over all of them, exactly, and so are its gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.models.attention import weighed

AT_ONCE = 1 << 20  # numbers of keys, or of values, that are gathered at once; on a GPU, where starting kernels takes
AT_ONCE_ON_GPU = 1 << 24  # longer than they do, more


@dataclass(frozen=True, eq=False)
class Choice:
    """The blocks that queries read beyond their window: first the sinks, then the chosen, the best first.

    Attributes:
        index: (B, H, t, K), of blocks as a call lists them.
        taken: (B, H, t, K) bool, whether there is such a block.
        scores: (B, H, t, K), with gradients, of the chosen; 0 of the sinks and where there is none.
        sinks: how many of the K are sinks.
    """

    index: Tensor
    taken: Tensor
    scores: Tensor
    sinks: int


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of tokens, in the keys and values that they are of.

    Attributes:
        keys, values: (B, N, K, D).
        first: (B, M), the place in them of each block's first token.
        size: the tokens of a block.
        shared: (H,), which of the K heads each head of queries reads.
    """

    keys: Tensor
    values: Tensor
    first: Tensor
    size: int
    shared: Tensor

    def places(self, numbers: Tensor, lists: tuple[int, int, int]) -> Tensor:
        """Return the places (n, b), in keys (B * N * K), of the tokens of blocks; numbers: (n,), of all B * H * M."""
        row, head, number = torch.unravel_index(numbers, lists)
        place = (row * self.keys.shape[1] + self.first[row, number])[:, None]
        place = place + torch.arange(self.size, device=place.device)
        return place * self.keys.shape[2] + self.shared[head][:, None]

    def of(self, x: Tensor, places: Tensor) -> Tensor:
        """Return (n, b, D), the keys or values x at places (n, b)."""
        if x.is_contiguous():
            return x.flatten(0, 2).index_select(0, places.flatten()).unflatten(0, places.shape)
        return x[torch.unravel_index(places, x.shape[:3])]  # (of a room for more, which `flatten` would copy)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Sorted pairs of a block and a query, cut into tiles: so many slots for queries of one block, some left empty, and
    all of the last tile.

    Attributes:
        block: (tiles,), each one's block.
        slot: (pairs,), where each pair stands in the slots (tiles * size).
        size: slots of a tile, about as many as a block has queries.
    """

    block: Tensor
    slot: Tensor
    size: int

    @classmethod
    def of(cls, block: Tensor, most: int) -> Tiles:
        """block: (pairs,), in order, one at least; most: slots of a tile at most."""
        distinct, which, counts = block.unique_consecutive(return_inverse=True, return_counts=True)
        size = min(most, -(-len(block) // len(distinct)))
        tiles = (counts + size - 1) // size
        rank = torch.arange(len(block), device=block.device) - (counts.cumsum(0) - counts)[which]
        block = torch.cat([distinct.repeat_interleave(tiles), distinct[-1:]])
        return cls(block, ((tiles.cumsum(0) - tiles) * size)[which] + rank, size)

    def filled(self, x: Tensor, empty: float) -> Tensor:
        """Return (tiles, size), each pair's x in its slot, and `empty` in empty ones."""
        slots = x.new_full((len(self.block) * self.size,), empty).index_copy(0, self.slot, x)
        return slots.unflatten(0, (-1, self.size))


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
    q: Tensor, blocks: Blocks, choice: Choice, bias: Tensor | None, near: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Return what queries (B, t, H, D) read of the blocks of a choice, (B, H, t, D), each token by its share in one
    softmax over these blocks and what else is read; and the logarithms (B, H, t) of that softmax's denominators.

    Args:
        bias: (B, H, t, K), on the scores of a block's tokens, or None.
        near: (B, H, t), the logarithms of the sum of exponentials of what else is read.
        most: slots of a tile at most.
    """
    rows, heads, length, room = shape = choice.index.shape
    lists = rows, heads, blocks.first.shape[1]  # each head's blocks are its own
    pairs = choice.taken.flatten().nonzero()[:, 0]
    if not len(pairs):
        return q.new_zeros((*shape[:3], q.shape[3]), dtype=blocks.values.dtype), near
    query = pairs // room  # of the queries (B * H * t)
    block, order = (query // length * lists[2] + choice.index.flatten()[pairs]).sort()
    pairs, query = pairs[order], query[order]
    tiles = Tiles.of(block, most)
    # where each pair stands, those that are not taken in an empty slot
    slots = tiles.slot.new_full((choice.index.numel(),), len(tiles.block) * tiles.size - 1)
    slots = slots.index_copy(0, pairs, tiles.slot)
    queries = q.transpose(1, 2).flatten(0, 2).index_select(0, tiles.filled(query, 0).flatten())
    queries = queries.unflatten(0, (-1, tiles.size))
    place = blocks.places(tiles.block, lists)
    each = max(1, (AT_ONCE_ON_GPU if q.is_cuda else AT_ONCE) // (blocks.size * q.shape[3]))
    cuts = [slice(n, n + each) for n in range(0, len(place), each)]
    scores = torch.cat([queries[some] @ blocks.of(blocks.keys, place[some]).mT for some in cuts])  # (tiles, size, b)
    scores = scores.to(near.dtype) / math.sqrt(q.shape[3])
    if bias is not None:
        scores = scores + tiles.filled(bias.flatten()[pairs], 0)[..., None]
    empty = tiles.filled(torch.zeros_like(pairs, dtype=torch.bool), True)
    log_sums = scores.logsumexp(2).masked_fill(empty, -math.inf).flatten()[slots]
    total = torch.cat([near[..., None], log_sums.unflatten(0, shape)], 3).logsumexp(3)
    shares = (scores - tiles.filled(total.flatten()[query], math.inf)[..., None]).exp().to(blocks.values.dtype)
    y = torch.cat([shares[some] @ blocks.of(blocks.values, place[some]) for some in cuts])  # (tiles, size, D)
    return y.flatten(0, 1).index_select(0, slots).unflatten(0, shape).sum(3), total
