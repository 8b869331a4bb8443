"""Which blocks a query may read: found without a look at each block, and the same as by one."""

from __future__ import annotations

import random

import pytest
import torch

from rnn_longctx.models.block_keys import BlockKeys, BlockPlaces
from rnn_longctx.recurrence.rows import row_counts

SIZE = 4


def carry_of(read, held=None):
    """The carry of rows that have read so many tokens, of which they hold the last ones."""
    read = torch.tensor(read)
    held = read if held is None else torch.minimum(read, torch.tensor(held))
    blocks = torch.minimum(read // SIZE, ((held - read % SIZE) // SIZE).clamp(min=0))
    keys, summaries = torch.zeros(len(read), int(held.max()), 1, 2), torch.zeros(len(read), int(blocks.max()), 1, 2)
    return BlockKeys(SIZE, keys, keys, keys[:, :0], summaries, held, blocks, read)


def places_of(carry, length, mask=None, reset=None):
    counts, _ = row_counts(carry.position, length, mask=mask, reset=reset)
    return BlockPlaces.find(counts, carry, reset, 1)


def calls():
    rows = [random.randrange(60) for _ in range(3)]
    starts = torch.tensor([[0], [random.randrange(1, 30)], [0]])
    reset = torch.rand(3, 30) < 0.1
    return {
        "alike": places_of(carry_of([21, 21, 21]), 30),
        "unequal": places_of(carry_of(rows), 30),
        "cropped": places_of(carry_of(rows, [random.randrange(1, 60) for _ in rows]), 30),
        "padded": places_of(carry_of([0, 0, 0]), 30, mask=torch.arange(30) >= starts),
        "documents": places_of(carry_of(rows), 30, reset=reset),
        "all but one alike": places_of(carry_of([21, 21, 21]), 30, reset=reset & (starts > 0)),
    }


@pytest.mark.parametrize("by", [1, 3])
@pytest.mark.parametrize("least", [0, 2])
@pytest.mark.parametrize("call", ["alike", "unequal", "cropped", "padded", "documents", "all but one alike"])
def test_readable_blocks_are_those_of_the_definition(call, by, least):
    places = calls()[call]
    marks = sorted(random.sample(range(1, 30), 3))
    for start, stop in zip([0, *marks], [*marks, 30]):
        queries, known = slice(start, stop), places.known(stop)
        of, number = places.of[:, None, :known], places.blocks[:, None, :known]
        document, own = places.document[:, queries, None], places.number[:, queries, None]
        allowed = (of == document) & (of >= 0) & (number >= least) & (number <= own - by)
        free = places.free(queries, by, least)
        assert allowed[..., free].all()
        scores, seen = places.readable(torch.ones(3, 2, stop - start, known), queries, by, least, -1.0)
        assert torch.equal(scores, allowed[:, None].expand_as(scores).float() * 2 - 1)
        assert seen is None if free.start < free.stop else torch.equal(seen, allowed)
        index, there = places.first_blocks(queries, by, 2)
        first = (of == document) & (of >= 0) & (number < 2) & (number <= own - by)
        chosen = torch.zeros(3, stop - start, known + 1, dtype=torch.bool)
        chosen.scatter_(2, index.where(there, known), True)
        assert torch.equal(chosen[..., :known], first)


def test_of_one_document_all_but_the_last_blocks_are_read_by_all():
    """So that no mask is made for the others."""
    places = places_of(carry_of([401, 401]), 30)
    assert places.free(slice(0, 10), 1) == slice(0, 401 // SIZE)
    assert places.free(slice(19, 30), 3, 2) == slice(2, (401 + 19) // SIZE - 2)
