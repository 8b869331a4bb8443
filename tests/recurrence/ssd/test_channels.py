"""Numbers that each decay for themselves: stretches side by side give what the walk token by token gives."""

import pytest
import torch

from rnn_longctx.recurrence.ssd import channels, chunked


@pytest.mark.parametrize("length", [1, 2, 3, 16, 100, 129])
def test_the_walk_in_stretches(length):
    decay = torch.rand(2, length, 3, 4, dtype=torch.float64)
    decay[:, length // 2] = 0.0  # forgets all
    added = torch.randn(2, length, 3, 4, dtype=torch.float64)
    start, weight = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, length, 3, 4, dtype=torch.float64)
    results = []
    for states in (channels.walked, channels._Walk.apply):
        leaves = [t.clone().requires_grad_() for t in (decay, added, start)]
        after = states(*leaves)
        results.append((after.detach(), *torch.autograd.grad((after * weight).sum(), leaves)))
    for a_walk, in_stretches in zip(*results):
        torch.testing.assert_close(in_stretches, a_walk, rtol=1e-12, atol=1e-12)


def test_a_piece_of_the_scan(monkeypatch):
    x, B, C = torch.randn(2, 100, 6, 1).double(), torch.randn(2, 100, 2, 4).double(), torch.randn(2, 100, 2, 4).double()
    log_decay, scale = -torch.rand(2, 100, 6, 4).double(), torch.rand(2, 100, 6).double()
    state = torch.randn(2, 6, 1, 4).double()
    expected = chunked.piece(x, log_decay, scale, B, C, state)
    monkeypatch.setattr(chunked, "states", channels._Walk.apply)
    for ours, theirs in zip(chunked.piece(x, log_decay, scale, B, C, state), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
