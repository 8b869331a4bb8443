"""The best of many scores by groups are those that topk finds."""

from __future__ import annotations

import random

import pytest
import torch

from rnn_longctx.models import block_choice
from rnn_longctx.models.block_choice import largest


@pytest.mark.parametrize("top", [0, 1, 3, 8])
def test_the_largest_are_those_of_topk(top, monkeypatch):
    """Wherever they stand: in one group, in the numbers that fill none, or where most are minus infinity."""
    monkeypatch.setattr(block_choice, "FEWEST", 2)
    for columns in (top, 8 * 2 * max(top, 1) - 1, 8 * 2 * max(top, 1), random.randrange(150, 400)):
        scores = torch.randn(2, 3, 5, columns)
        scores[1] += torch.arange(columns) // random.randrange(1, 9)
        scores[0, 0, :, columns // 3 :] = -torch.inf
        values, index = largest(scores, top)
        wanted = scores.topk(top)
        assert torch.equal(values, wanted.values)
        assert torch.equal(scores.gather(-1, index), values)
        real = wanted.values > -torch.inf
        assert torch.equal(index[real], wanted.indices[real])


@torch.no_grad()
def test_groups_are_taken_where_there_are_many(monkeypatch):
    """topk then sees a number a group, and the members of the best."""
    seen, topk = [], torch.Tensor.topk

    def counted(self, *args, **kwargs):
        seen.append(self.shape[-1])
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", counted)
    largest(torch.randn(1, 6144), 4)
    assert seen == [6144 // block_choice.GROUP, 4 * block_choice.GROUP]
    largest(torch.randn(1, 1000), 4)
    assert seen[2:] == [1000]
