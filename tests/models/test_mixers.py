"""Every mixer keeps the contract: what a new file in rnn_longctx/models/mixers is held to."""

from __future__ import annotations

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.testing import mixers as contract

# Small parameters, so that windows and chunks end within a test's stream; a mixer that is not named here has its own.
SMALL = {
    "mamba2": "mamba2:d_state=8,headdim=8,ngroups=2",
    "gla": "gla:heads=2",
    "sliding-window": "sliding-window:window=7,heads=2",
}
MIXED = ["mamba2:d_state=4,headdim=8", "sliding-window:window=5,heads=2", "gla:heads=2"]


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", list(MIXERS))
def test_the_contract(name, check, seed):
    check(SMALL.get(name, name), seed)


@torch.no_grad()
def test_layers_of_several_kinds(tmp_path):
    model = LM(ModelConfig(MIXED, d_model=16, n_layer=4, vocab_size=20, mlp=1.5)).eval()
    assert [type(layer.mixer).name for layer in model.layers] == ["mamba2", "sliding-window", "gla", "mamba2"]
    assert [type(mixer).name for mixer in model.mixers] == ["mamba2", "gla", "mamba2"]
    assert model.attends and all(layer.mlp is not None for layer in model.layers)
    assert set(model.state_size().fixed) == {"scan", "conv", "attention"}
    checkpoint.save(model, tmp_path / "mixed")
    loaded = checkpoint.load(tmp_path / "mixed")
    assert loaded.config == model.config and loaded.weights_hash == model.weights_hash
    ids = torch.randint(20, (2, 30))
    cache, expected = Cache(), model(ids)
    out = torch.cat([loaded(part, cache) for part in ids.split([11, 19], 1)], 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="is for models of Mamba-2 alone"):
        checkpoint.save(model, tmp_path / "other", layout="transformers")


def test_a_flat_config_is_a_model_of_mamba2_layers():
    flat = Mamba2Config(d_model=32, n_layer=2, d_state=8, headdim=8)
    torch.manual_seed(3)
    a = LM(flat)
    torch.manual_seed(3)
    b = LM(ModelConfig("mamba2:d_state=8,headdim=8", d_model=32, n_layer=2))
    ids = torch.randint(256, (1, 9))
    assert torch.equal(a(ids), b(ids)) and list(a.state_dict()) == list(b.state_dict())
    assert a.state_size().fixed == {"scan": flat.scan_state_elements, "conv": flat.conv_state_elements}
    assert model_config({"d_model": 32, "n_layer": 1}) == Mamba2Config(d_model=32, n_layer=1)
    assert model_config({"mixer": "gla", "n_layer": 1}) == ModelConfig("gla", n_layer=1)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"mixer": "mambo2"}, "unknown mixer 'mambo2'.*mamba2"),
        ({"mixer": "gla:head=2"}, "gla has no parameter 'head'.*heads"),
        ({"mixer": "gla:heads=5"}, "channels do not divide into 5 heads"),
        ({"mixer": []}, "expected at least one"),
        ({"mixer": "gla", "d_state": 4}, 'unknown key "d_state"'),
        ({"mixer": "sliding-window:window=1"}, "a window of at least 2 tokens"),
        ({"mixer": "gla", "mlp": -1.0}, "mlp: expected"),
        ({"d_modl": 4}, 'unknown key "d_modl".*d_model'),
    ],
)
def test_a_config_that_is_none(data, message):
    with pytest.raises(InputError, match=message):
        model_config(data)
