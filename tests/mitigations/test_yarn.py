"""YaRN against transformers' parameters, and as a remedy on models of full attention."""

import math
import random

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import _compute_yarn_parameters

import rnn_longctx
from rnn_longctx.eval.run import evaluate
from rnn_longctx.mitigations import NotApplicable, mitigate
from rnn_longctx.models.attention import softmax
from rnn_longctx.models.rotary import BASE, Yarn
from rnn_longctx.models.saved_state import policies_hash
from rnn_longctx.recurrence.span import WHOLE
from rnn_longctx.testing.remedies import TRAIN_LENGTH, model_of

HEADS, LENGTH = 2, 80


def theirs(size, factor, train_length):
    """Return transformers' rates (D / 2) and its factor on cosines and sines."""
    rope = {"rope_type": "yarn", "rope_theta": BASE, "factor": factor}
    rope["original_max_position_embeddings"] = train_length
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, head_dim=size, rope_parameters=rope)
    return _compute_yarn_parameters(config, torch.device("cpu"))


@pytest.mark.parametrize("size, train_length", [(128, 4096), (64, 2048), (40, 512), (16, 32), (16, 8)])
def test_rates_and_gain_are_those_of_transformers(size, train_length):
    factor = random.choice([1.5, 4.0, 32.0])
    expected, gain = theirs(size, factor, train_length)
    plain = BASE ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    scaling = Yarn(factor, train_length)
    assert torch.allclose(scaling.rates(plain), expected.double(), rtol=1e-5) and math.isclose(scaling.gain, gain)
    assert torch.equal(scaling.rates(plain)[0], plain[0]) and math.isclose(scaling.rates(plain)[-1], plain[-1] / factor)


def test_a_layer_reads_with_the_scaled_positions():
    """The layer against softmax attention turned by transformers' rates, as complex numbers."""
    model = model_of(f"full-attention:heads={HEADS}")
    mixer = model.layers[0].mixer
    u = torch.randn(1, LENGTH, model.d_model, dtype=torch.float64)
    q, k, v = mixer.projected(u, WHOLE)
    rates, gain = theirs(q.shape[-1], 4.0, TRAIN_LENGTH)

    def turn(x):
        half = x.shape[-1] // 2
        angles = torch.arange(LENGTH, dtype=torch.float64)[:, None, None] * rates.double()
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.full_like(angles, gain), angles)
        return torch.cat([z.real, z.imag], -1)

    expected = mixer.out_proj(softmax(turn(q), turn(k), v).flatten(2))
    with mitigate(model, "yarn:factor=4"):
        scaled, _ = mixer(u, None, WHOLE)
    plain, _ = mixer(u, None, WHOLE)
    assert torch.allclose(scaled, expected, atol=1e-5)  # (their rates are float32)
    assert (plain - expected).abs().max() > 1e-3


def test_the_factor_follows_the_length():
    model = model_of("full-attention:heads=2")
    for target, factor in ((TRAIN_LENGTH * 5, 5.0), (TRAIN_LENGTH * 3 // 2, 1.5)):
        with mitigate(model, "yarn", target_length=target):
            assert [layer.yarn for layer in model.rotary] == [Yarn(factor, TRAIN_LENGTH)] * 2
    with mitigate(model, "yarn", target_length=TRAIN_LENGTH):
        assert [layer.yarn for layer in model.rotary] == [None, None]


def test_what_was_read_under_it_is_not_gone_on_from_without_it():
    model = model_of("full-attention:heads=2")
    plain, weights = policies_hash(model), model.weights_hash
    with mitigate(model, "yarn:factor=2"):
        scaled = policies_hash(model)
        assert model.weights_hash == weights, "a remedy is no part of what the model is"
    assert policies_hash(model) == plain != scaled and model.weights_hash == weights


def test_who_cannot_be_scaled_says_why():
    for text in ("full-attention:heads=2,positions=none", "sliding-window:heads=2,window=16", "chunk-linformer:heads=2",
                 "mamba2:headdim=16"):  # fmt: skip
        with pytest.raises(NotApplicable, match="yarn scales the rotary positions of full attention"):
            mitigate(model_of(text), "yarn:factor=2")
    with pytest.raises(NotApplicable, match="give target_length, or factor=4"):
        mitigate(model_of("full-attention:heads=2"), "yarn")
    with pytest.raises(rnn_longctx.InputError, match=r"factor must be at least 1, got 0\.5"):
        mitigate(model_of("full-attention:heads=2"), "yarn:factor=0.5")


def test_layers_of_full_attention_beside_others(tmp_path):
    """A hybrid: its attention is scaled, its recurrence is as it was; an evaluation takes the factor of each length."""
    model = model_of(["mamba2:headdim=16", "full-attention:heads=2"]).float()
    with mitigate(model, "yarn", target_length=4 * TRAIN_LENGTH):
        assert [layer.yarn for layer in model.rotary] == [Yarn(4.0, TRAIN_LENGTH)]
    lengths = [TRAIN_LENGTH, 4 * TRAIN_LENGTH]
    frame = evaluate(model, lengths, ["lm:slices=1,tokens=0"], ["none", "yarn"], text=["builtin"], out=str(tmp_path))
    losses = frame[frame["metric"] == "nats_per_token"].pivot(index="length", columns="mitigation", values="value")
    assert losses["yarn"][lengths[0]] == losses["none"][lengths[0]]
    assert losses["yarn"][lengths[1]] != losses["none"][lengths[1]]
