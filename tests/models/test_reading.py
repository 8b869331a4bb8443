"""A hook around a model's reading: it sees every call, may read otherwise, and is gone after its block."""

import pytest
import torch

from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


@torch.no_grad()
def test_a_hook_stands_around_reading():
    lm, ids = LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8)).double(), torch.randint(256, (2, 30))
    plain, weights, calls = lm(ids), lm.weights_hash, []

    def in_halves(read, ids, cache, *more):
        calls.append(ids.shape[1])
        return torch.cat([read(half, cache, *more) for half in ids.split(7, 1)], 1)

    with lm.reading_with(in_halves):
        torch.testing.assert_close(lm(ids), plain)
        assert [hidden.shape[1] for hidden in lm.stream(ids, segment=20)] == [20, 10] and calls == [30, 20, 10]
        assert lm.weights_hash == weights, "a hook is no part of what a model computes"
        with lm.reading_with(lambda read, ids, *more: read(ids.flip(1), *more)):
            assert torch.equal(lm(ids.flip(1)), plain) and len(calls) == 3
        lm(ids)
    assert torch.equal(lm(ids), plain) and len(calls) == 4
    with pytest.raises(RuntimeError), lm.reading_with(in_halves):
        raise RuntimeError
    assert lm.reading_hook is None
