"""The same random weights in transformers' Mamba2ForCausalLM and here give the same logits."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from adopted_families import cached
from transformers import Mamba2Config as TheirConfig
from transformers import Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache

CASES = {
    "one group": {"n_groups": 1},
    "two groups": {"n_groups": 2},
    "dt limited": {"n_groups": 2, "time_step_limit": (0.05, 0.3)},
    "biases": {"n_groups": 1, "use_bias": True},
    "no conv bias, tied": {"n_groups": 1, "use_conv_bias": False, "tie_word_embeddings": True},
    "short conv, big eps": {"n_groups": 4, "conv_kernel": 3, "layer_norm_epsilon": 1e-2},
}
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def pair(request, randomise, tmp_path):
    """(theirs, ours), float32, by way of a file that transformers wrote."""
    if request.param["n_groups"] > 1 and "group_size" not in signature(MambaRMSNormGated).parameters:
        pytest.skip("this transformers takes the norm over all groups together")
    shape = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "vocab_size": 97}
    config = TheirConfig(**shape, num_hidden_layers=3, chunk_size=16, **request.param)
    theirs = randomise(Mamba2ForCausalLM(config)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    return theirs, checkpoint.load(tmp_path / "hf")


@torch.no_grad()
def _theirs(model, ids):
    logits = model(ids, use_cache=False).logits
    assert logits.std() > 0.1  # not a comparison of zeros
    return logits


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 37, 101])
def test_one_pass(pair, length):
    theirs, ours = pair
    ids = torch.randint(97, (2, length))
    torch.testing.assert_close(ours.logits(ours(ids)), _theirs(theirs, ids), **TOLERANCE)


@torch.no_grad()
def test_chunked_prefill_and_steps_against_their_full_forward(pair):
    theirs, ours = pair
    ids = torch.randint(97, (2, 75))
    expected = _theirs(theirs, ids)
    cache, parts = ours.new_cache(), []
    for part in ids.split([1, 31, 2, 20, *[1] * 21], 1):
        parts.append(ours.logits(ours(part, cache)))
    torch.testing.assert_close(torch.cat(parts, 1), expected, **TOLERANCE)
    assert cache.position.tolist() == [75, 75]

    # and their cached steps follow ours (they ignore time_step_limit when decoding)
    if theirs.config.time_step_limit[1] == float("inf"):
        _, state = cached(theirs, ids[:, :40])
        cache = Cache()
        ours(ids[:, :40], cache)
        for t in range(40, 45):
            expected, state = cached(theirs, ids[:, t : t + 1], state)
            step = ours.logits(ours(ids[:, t : t + 1], cache))
            torch.testing.assert_close(step, expected, **TOLERANCE)


@torch.no_grad()
def test_left_padding(pair):
    theirs, ours = pair
    if theirs.config.use_bias:
        pytest.skip("theirs lets the projection's bias at padding into the convolution of the first tokens")
    ids = torch.randint(97, (2, 29))
    mask = torch.ones(2, 29, dtype=torch.bool)
    mask[1, :11] = False
    expected = theirs(ids, attention_mask=mask.long(), use_cache=False).logits
    torch.testing.assert_close(ours.logits(ours(ids, mask=mask))[mask], expected[mask], **TOLERANCE)


@torch.no_grad()
def test_what_we_save_they_load(pair, tmp_path):
    theirs, ours = pair
    checkpoint.save(ours, tmp_path / "saved", layout="transformers")
    again, report = Mamba2ForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(97, (2, 33))
    torch.testing.assert_close(again.eval()(ids).logits, _theirs(theirs, ids), **TOLERANCE)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())
    for key in ("num_heads", "head_dim", "n_groups", "expand", "state_size", "use_bias", "tie_word_embeddings"):
        assert getattr(again.config, key) == getattr(theirs.config, key)
    assert tuple(again.config.time_step_limit) == tuple(theirs.config.time_step_limit)

    back = checkpoint.load(tmp_path / "saved")
    assert back.config == ours.config and back.weights_hash == ours.weights_hash


def test_their_defaults_are_ours():
    """Fields that a config.json of transformers leaves out."""
    from rnn_longctx.models.checkpoint.layouts import _TRANSFORMERS

    theirs = TheirConfig()
    for key, default in _TRANSFORMERS.values():
        value = getattr(theirs, key)
        assert (tuple(value) if isinstance(value, (list, tuple)) else value) == default, key
    assert theirs.num_heads == 128


def test_bf16_keeps_what_makes_the_decays_in_float32(pair, tmp_path):
    _, ours = pair
    checkpoint.save(ours, tmp_path / "own")
    half = checkpoint.load(tmp_path / "own", dtype="bfloat16")
    ids = torch.randint(97, (2, 40))
    with torch.no_grad():
        difference = (half.logits(half(ids)) - ours.logits(ours(ids))).abs().mean()
        scale = ours.logits(ours(ids)).std()
    assert 0 < difference < 0.05 * scale
