"""Models of equal size: what is counted is what a model has, and the width of the MLP, or else d_model, makes it so."""

from __future__ import annotations

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.eval.compare.equal import STEP, equalised, flops, parameters, state
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM


def model(mixer: str, d_model: int = 32, mlp: float = 2.0, n_layer: int = 2) -> ModelConfig:
    return ModelConfig(mixer, d_model=d_model, n_layer=n_layer, mlp=mlp)


def made(config: ModelConfig) -> int:
    return sum(p.numel() for p in LM(config).parameters())


@pytest.mark.parametrize("mixer", ["gla:heads=2", "mamba2:headdim=16,d_state=8", "sliding-window:window=8,heads=2"])
def test_parameters_are_those_of_the_model(mixer):
    d_model, layers = 16 * int(torch.randint(1, 4, ())), int(torch.randint(1, 4, ()))
    config = model(mixer, d_model, mlp=1.5, n_layer=layers)
    assert parameters(config) == made(config)
    mlps = layers * (3 * d_model * round(1.5 * d_model) + d_model)  # three matrices and a norm
    assert parameters(config) - parameters(model(mixer, d_model, 0, layers)) == mlps


def test_the_first_is_the_measure_and_widths_of_mlps_are_found():
    mlp = 2 + float(torch.rand(()))
    written = {
        "mamba2": model("mamba2:headdim=16,d_state=16", mlp=mlp),
        "gla": model("gla:heads=2", mlp=1),
        "wide": model("sliding-window:window=8,heads=2", mlp=6),
    }
    sized = equalised(written)
    target = made(written["mamba2"])
    assert sized["mamba2"] == written["mamba2"]
    for name, config in sized.items():
        assert abs(made(config) - target) <= 0.02 * target
        assert (config.mixer, config.d_model) == (written[name].mixer, 32)
    assert sized["gla"].mlp > 1 and sized["wide"].mlp < 6


def test_widths_are_even_where_that_is_near_enough():
    written = [model("mamba2:headdim=32,d_state=64", 192, n_layer=4), model("gla:heads=4", 192, n_layer=4)]
    sized = equalised(dict(zip("ab", written)))["b"]
    assert (width := round(192 * sized.mlp)) % STEP == 0 and width == pytest.approx(192 * sized.mlp)
    assert abs(parameters(sized) - parameters(written[0])) <= 0.01 * parameters(written[0])


def test_without_an_mlp_the_model_is_widened():
    written = {
        "first": model("gla:heads=2", d_model=128, mlp=0),
        "other": model("sliding-window:window=8,heads=1", d_model=96, mlp=0),
    }
    sized = equalised(written)
    target = made(written["first"])
    assert abs(made(sized["other"]) - target) <= 0.02 * target
    assert sized["other"].d_model > 96 and sized["other"].mlp == 0


def test_a_mixer_that_is_too_large_is_narrowed():
    written = {"first": model("gla:heads=2", mlp=0), "large": model("mamba2:headdim=4,d_state=64", 48, 2)}
    assert parameters(model("mamba2:headdim=4,d_state=64", 48, 1 / 4)) > 1.02 * parameters(written["first"])
    sized = equalised(written)
    target = made(written["first"])
    assert abs(made(sized["large"]) - target) <= 0.02 * target and sized["large"].d_model < 48


def test_what_cannot_be_is_said_with_the_nearest():
    written = {"first": model("gla:heads=2", d_model=32, mlp=1), "stiff": model("sliding-window:heads=16", 64, 0)}
    with pytest.raises(InputError, match=r"stiff cannot have [\d,]+ parameters within 2%: the nearest is .*MLP"):
        equalised(written)


def test_operations_are_those_of_the_products():
    d, layers, mlp, length = 16 * int(torch.randint(1, 4, ())), int(torch.randint(1, 3, ())), 1.5, 40
    per_layer = 4 * d * d + 2 * length * d + 3 * d * round(mlp * d)  # projections, scores and their sums, the MLP
    config = model("full-attention:heads=2,positions=none", d, mlp, layers)
    assert flops(config, length) == 2 * (layers * per_layer + 256 * d)


def test_operations_of_dilated_attention():
    """A segment of 8 tokens, and every other token of 32, all pairs of them."""
    config = model("longnet:heads=2,segments=8/32,dilations=1/2", 16, 0, 1)
    pairs = 32 * 8 + 32 // 2 * 16
    assert flops(config, 32) == (32 * 2 * (4 * 16 * 16 + 256 * 16) + 4 * 16 * pairs) / 32


@pytest.mark.parametrize("kind", ["flops", "state"])
def test_equal_operations_and_states(kind):
    written = {
        "mamba2": model("mamba2:headdim=16,d_state=16", 64),
        "gla": model("gla:heads=2", 32, mlp=1),
        "wide": model("sliding-window:window=16,heads=2", 128, mlp=1),
        "none": model("gla:heads=1,expand_k=1", 48, mlp=0),
    }
    count, within = {"flops": (flops, 0.02), "state": (state, 0.05)}[kind]
    sized = equalised(written, kind, 48)
    assert sized["mamba2"] == written["mamba2"]
    target = count(written["mamba2"], 48)
    for name, config in sized.items():
        assert abs(count(config, 48) - target) <= within * target
        assert kind == "flops" or config.mlp == written[name].mlp


SPARSE = ["block-sparse:heads=2,block=8,window=16,top=2", "two-stage:heads=2,block=8,window=16,top=2"]


@pytest.mark.parametrize("mixer", ["kda:heads=2,head_dim=16", "mamba2:headdim=16,d_state=16", *SPARSE])
def test_operations_hang_on_no_draw(mixer):
    assert len({flops(model(mixer), 128) for _ in range(4)}) == 1
    more = flops(model(mixer, mlp=2 + 1 / 32), 128) - flops(model(mixer), 128)
    assert more == 2 * 2 * 3 * 32, "a channel more of two MLPs"


def test_a_state_is_what_a_row_keeps():
    config = model("full-attention:heads=2", 32, n_layer=3)
    assert state(config, 50) == 50 * 3 * 2 * 32 == LM(config).state_size().total(50)
