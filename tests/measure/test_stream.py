"""Losses over a stream: the same numbers however it is cut, and from a position on."""

import pytest
import torch

from rnn_longctx.measure.stream import stream_losses, stream_targets, tail_loss
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

CONFIG = Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8)


def model_and_ids():
    torch.set_num_threads(1)
    return Mamba2LM(CONFIG).double(), torch.randint(256, (3, 102))


@pytest.mark.parametrize("segment", [7, 101, None])
@pytest.mark.parametrize("since", [0, 50, 100])
@torch.no_grad()
def test_losses_from_a_position_on(segment, since):
    lm, ids = model_and_ids()
    expected = lm.losses(lm(ids[:, :-1]), ids[:, 1:])
    position = since
    for first, losses in stream_losses(lm, ids, segment=segment, since=since):
        assert first == position and losses.shape[1] >= 1
        torch.testing.assert_close(losses, expected[:, first : first + losses.shape[1]], rtol=1e-9, atol=1e-9)
        position += losses.shape[1]
    assert position == 101


@torch.no_grad()
def test_a_stream_goes_on_from_a_cache():
    lm, ids = model_and_ids()
    expected, cache, begun = lm.losses(lm(ids[:, :-1]), ids[:, 1:]), lm.new_cache(), 40
    lm(ids[:, :begun], cache)
    for first, losses in stream_losses(lm, ids[:, begun:], cache=cache, segment=13):
        end = begun + first + losses.shape[1]
        assert cache.position.tolist() == [end] * 3, "moved on by the time that the losses are there"
        torch.testing.assert_close(losses, expected[:, begun + first : end], rtol=1e-9, atol=1e-9)
    assert cache.position.tolist() == [101] * 3


@torch.no_grad()
def test_targets_are_the_tokens_after():
    lm, ids = model_and_ids()
    parts = list(stream_targets(lm, ids, segment=20))
    assert [first for first, _, _ in parts] == [0, 20, 40, 60, 80, 100]
    assert torch.equal(torch.cat([targets for _, _, targets in parts], 1), ids[:, 1:])
    torch.testing.assert_close(torch.cat([hidden for _, hidden, _ in parts], 1), lm(ids[:, :-1]), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_tail_loss_is_of_the_second_half():
    lm, ids = model_and_ids()
    expected = lm.losses(lm(ids[:, :-1]), ids[:, 1:])[:, 50:].mean(1)
    for segment in (7, 101, None):
        assert tail_loss(lm, ids, segment).numpy() == pytest.approx(expected.double().numpy(), rel=1e-9)
