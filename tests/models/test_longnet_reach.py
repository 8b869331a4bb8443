"""How far back information travels through layers of LongNet, and the warning beyond its longest segment."""

from __future__ import annotations

import warnings

import pytest
import torch
from longnets import SETTINGS, WIDTH, model_of, multiplicities, spec

from rnn_longctx.models.mixers.longnet import LongNetConfig
from rnn_longctx.recurrence.span import WHOLE, Span

pytestmark = pytest.mark.filterwarnings("ignore:longnet. more is read")


def reachable(config: LongNetConfig, layers: int, length: int) -> torch.Tensor:
    """(layers, length): how far back the first token is from which a path through the layers leads to each."""
    step = (multiplicities(config, length).sum(0) > 0) | torch.eye(length, dtype=torch.bool)
    paths, rows = torch.eye(length, dtype=torch.bool), []
    for _ in range(layers):
        paths = (step.double() @ paths.double()) > 0
        rows.append(torch.arange(length) - paths.int().argmax(1))
    return torch.stack(rows)


def reach(config: LongNetConfig, layers: int, length: int) -> torch.Tensor:
    """The same, traced back from each token by `read_by`."""
    rows = []
    tokens = torch.eye(length, dtype=torch.bool)
    for _ in range(layers):
        tokens = torch.stack([config.read_by(row) for row in tokens])
        rows.append(torch.arange(length) - tokens.int().argmax(1))
    return torch.stack(rows)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_how_far_back_information_travels(setting):
    config = LongNetConfig(*setting)
    for length in (1, 37, 100):
        assert torch.equal(reach(config, 4, length), reachable(config, 4, length))
    far = reach(config, 6, 200)
    assert (far <= torch.arange(200) % config.barrier).all()
    assert (far[1:] >= far[:-1]).all()
    overlapping = LongNetConfig(1, "4/6", "1/1")  # a short segment lies across the end of a long one
    assert overlapping.barrier is None and torch.equal(reach(overlapping, 3, 50), reachable(overlapping, 3, 50))
    assert reach(overlapping, 3, 50)[2].max() > 6


def test_information_travels_as_far_as_read_by_says():
    model = model_of(spec(2, "3/12/24", "1/3/6"), layers=2)
    u = torch.randn(1, 30, WIDTH, dtype=torch.float64)

    def read(u: torch.Tensor) -> torch.Tensor:
        for block in model.layers:
            u = u + block.mixer(block.norm(u), None, WHOLE)[0]
        return u.sum((0, 2))

    sizes = torch.autograd.functional.jacobian(read, u)[:, 0].abs().sum(-1)  # (T, T), of outputs by inputs
    far = torch.arange(30) - (sizes > 0).int().argmax(1)
    assert torch.equal(far, reach(LongNetConfig(2, "3/12/24", "1/3/6"), 2, 30)[1])


def test_a_call_beyond_the_longest_segment_warns():
    mixer = model_of(spec(2, "4/8", "1/2")).layers[0].mixer
    u = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="than the longest segment holds, 8 tokens"):
        mixer(u, None, WHOLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, carry = mixer(u[:, :8], None, WHOLE)
    with pytest.warns(RuntimeWarning, match="8 tokens"):  # of a stream, where it gets there
        _, carry = mixer(u[:, 8:], carry, WHOLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixer(u, carry, WHOLE)  # and once
        model_of(spec(1, "4/6", "1/1")).layers[0].mixer(u, None, WHOLE)
        mixer(u, None, Span(reset=torch.arange(9)[None] == 4))  # documents may be shorter
