"""fla's format, in and out. That fla itself computes the same of it: tests/models/checkpoint/test_fla_itself.py."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import refused
from safetensors.torch import load_file, save_file

from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.adopt.adopting import load_adopted
from rnn_longctx.models.checkpoint.fla import TYPES
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

SMALL = {  # a mixer with settings that are not its defaults
    "gla": "gla:heads=2,expand_k=1,expand_v=1.5",
    "retnet": "retnet:heads=2,expand_k=0.5,expand_v=1",
    "hgrn2": "hgrn2:heads=2",
    "mamba1": "mamba1:d_state=3,d_conv=3,expand=1,dt_rank=5",
    "mamba3": "mamba3:d_state=6,expand=1,headdim=4,ngroups=2,rope_fraction=1",
    "gated-deltanet": "gated-deltanet:heads=2,head_dim=4,expand_v=1.5,v_heads=4,d_conv=3,neg_eigval=true",
    "kda": "kda:heads=2,head_dim=4,expand_v=1.5,v_heads=4,lower_bound=-4.5",
    "deltanet": "deltanet:heads=2,expand_k=0.5,gated=true",
}
# The names and shapes of a layer's tensors in models that fla 0.6 has saved, of hidden_size 16 and the settings above.
LAYER = {
    "gla": {
        "attn.q_proj.weight": (16, 16), "attn.k_proj.weight": (16, 16), "attn.v_proj.weight": (24, 16),
        "attn.g_proj.weight": (24, 16), "attn.gk_proj.0.weight": (16, 16), "attn.gk_proj.1.weight": (16, 16),
        "attn.gk_proj.1.bias": (16,), "attn.g_norm_swish_gate.weight": (12,), "attn.o_proj.weight": (16, 24),
    },
    "retnet": {
        "attn.q_proj.weight": (8, 16), "attn.k_proj.weight": (8, 16), "attn.v_proj.weight": (16, 16),
        "attn.g_proj.weight": (16, 16), "attn.g_norm_swish_gate.weight": (8,), "attn.o_proj.weight": (16, 16),
    },
    "hgrn2": {
        "attn.q_proj.weight": (16, 16), "attn.f_proj.weight": (16, 16), "attn.i_proj.weight": (16, 16),
        "attn.g_norm.weight": (16,), "attn.o_proj.weight": (16, 16),
    },
    "mamba1": {
        "mixer.in_proj.weight": (32, 16), "mixer.conv1d.weight": (16, 1, 3), "mixer.conv1d.bias": (16,),
        "mixer.x_proj.weight": (11, 16), "mixer.dt_proj.weight": (16, 5), "mixer.dt_proj.bias": (16,),
        "mixer.A_log": (16, 3), "mixer.D": (16,), "mixer.out_proj.weight": (16, 16), "norm.weight": (16,),
    },
    "mamba3": {
        "mixer.in_proj.weight": (71, 16), "mixer.dt_bias": (4,), "mixer.B_bias": (4, 1, 6), "mixer.C_bias": (4, 1, 6),
        "mixer.B_norm.weight": (6,), "mixer.C_norm.weight": (6,), "mixer.D": (4,), "mixer.out_proj.weight": (16, 16),
        "norm.weight": (16,),
    },
    "gated-deltanet": {
        "attn.q_proj.weight": (8, 16), "attn.k_proj.weight": (8, 16), "attn.v_proj.weight": (24, 16),
        "attn.q_conv1d.weight": (8, 1, 3), "attn.k_conv1d.weight": (8, 1, 3), "attn.v_conv1d.weight": (24, 1, 3),
        "attn.a_proj.weight": (4, 16), "attn.b_proj.weight": (4, 16), "attn.g_proj.weight": (24, 16),
        "attn.A_log": (4,), "attn.dt_bias": (4,), "attn.o_norm.weight": (6,), "attn.o_proj.weight": (16, 24),
    },
    "kda": {
        "attn.q_proj.weight": (8, 16), "attn.k_proj.weight": (8, 16), "attn.v_proj.weight": (24, 16),
        "attn.q_conv1d.weight": (8, 1, 4), "attn.k_conv1d.weight": (8, 1, 4), "attn.v_conv1d.weight": (24, 1, 4),
        "attn.f_proj.0.weight": (6, 16), "attn.f_proj.1.weight": (16, 6), "attn.b_proj.weight": (4, 16),
        "attn.g_proj.0.weight": (6, 16), "attn.g_proj.1.weight": (24, 6), "attn.g_proj.1.bias": (24,),
        "attn.A_log": (4,), "attn.dt_bias": (16,), "attn.o_norm.weight": (6,), "attn.o_proj.weight": (16, 24),
    },
    "deltanet": {
        "attn.q_proj.weight": (8, 16), "attn.k_proj.weight": (8, 16), "attn.v_proj.weight": (16, 16),
        "attn.q_conv1d.weight": (8, 1, 4), "attn.k_conv1d.weight": (8, 1, 4), "attn.v_conv1d.weight": (16, 1, 4),
        "attn.b_proj.weight": (2, 16), "attn.g_proj.weight": (16, 16),
        "attn.o_norm.weight": (8,), "attn.o_proj.weight": (16, 16),
    },
}  # fmt: skip
MLP = {
    "attn_norm.weight": (16,), "mlp_norm.weight": (16,), "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24),
}  # fmt: skip


def model_of(mixer: str, **shape) -> LM:
    mlp = 0.0 if mixer.startswith("mamba") else 1.5
    config = {"d_model": 16, "n_layer": 3, "vocab_size": 31, "mlp": mlp, "tie_embeddings": False, **shape}
    model = LM(ModelConfig(mixer, **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for layer, block in enumerate(model.layers):  # in their order, as fla's are
            if getattr(block.mixer, "bound", None) is not None:
                block.mixer.bound.copy_((layer - 1) * 2 + torch.rand(16))
    model.train_length = 77
    return model


def logits(model: LM) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.arange(20)[None] % 31))


def test_every_type_is_tried():
    alone = {kind.mixers for kind in TYPES.values()} - {("rwkv7", "rwkv7-ffn")}  # (test_fla_rwkv7.py)
    assert alone == {(mixer,) for mixer in SMALL} and set(SMALL) == set(LAYER)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("mixer", SMALL)
def test_out_and_in(mixer, tie, tmp_path):
    model = model_of(SMALL[mixer], tie_embeddings=tie)
    checkpoint.save(model, tmp_path / "theirs", layout="fla")
    assert load_adopted(tmp_path / "theirs") is None  # (transformers has a Mamba of the same model_type)
    loaded = checkpoint.load(tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert loaded.train_length == 77 and loaded.config.d_model == 16 and loaded.tied == tie
    again = tmp_path / "again"
    checkpoint.save(loaded, again, layout="fla")
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "theirs/config.json").read_text())
    checkpoint.save(loaded, tmp_path / "ours")
    assert checkpoint.load(tmp_path / "ours").weights_hash == loaded.weights_hash


@pytest.mark.parametrize("mixer", SMALL)
def test_the_names_are_theirs(mixer, tmp_path):
    checkpoint.save(model_of(SMALL[mixer]), tmp_path / "m", layout="fla")
    bare, around = mixer in ("mamba1", "mamba3"), {"lm_head.weight": (31, 16)}
    prefix = "backbone" if bare else "model"
    around |= {f"{prefix}.embeddings.weight": (31, 16), f"{prefix}.norm{'_f' if bare else ''}.weight": (16,)}
    if mixer == "hgrn2":
        around["model.lower_bounds"] = (3, 16)
    layer = LAYER[mixer] | ({} if bare else MLP)
    expected = around | {f"{prefix}.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / "m" / "model.safetensors").items()} == expected


def changed(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(
    ("mixer", "keys"),
    [
        ("gla", {"use_short_conv": True}),
        ("gla", {"feature_map": "relu"}),
        ("gla", {"num_kv_heads": 1}),
        ("gla", {"clamp_min": -2.0}),
        ("gla", {"attn": {"layers": [1], "num_heads": 2}}),
        ("gla", {"hidden_act": "powlu"}),
        ("gla", {"attnres_block_size": 2}),
        ("gla", {"hidden_size": None}),
        ("gla", {"num_heads": 7}),
        ("gla", {"num_heads": "two"}),
        ("retnet", {"use_output_gate": False}),
        ("retnet", {"elementwise_affine": False}),
        ("hgrn2", {"expand_ratio": 5}),
        ("mamba", {"use_bias": True}),
        ("mamba", {"expand": 1.5}),
        ("mamba3", {"is_mimo": True}),
        ("mamba3", {"is_outproj_norm": True}),
        ("mamba3", {"A_floor": 1e-3}),
        ("gated_deltanet", {"use_gate": False}),
        ("gated_deltanet", {"output_gate_activation": "sigmoid"}),
        ("gated_deltanet", {"num_v_heads": 3}),
        ("gated_deltanet", {"use_short_conv": False}),
        ("kda", {"lower_bound": 1.0}),
        ("delta_net", {"qk_norm": "sum"}),
        ("delta_net", {"use_beta": False}),
    ],
)
def test_what_our_model_does_not_compute_is_refused(mixer, keys, tmp_path):
    kind = TYPES[mixer].mixer
    checkpoint.save(model_of(SMALL[kind]), tmp_path / "m", layout="fla")
    word = {"num_heads": "heads", "num_v_heads": "v_heads"}.get(*keys, *keys)
    refused(changed(tmp_path / "m", **keys), "config.json", word)


def test_what_says_the_same_is_read(tmp_path):
    model = model_of(SMALL["gla"])
    checkpoint.save(model, tmp_path / "m", layout="fla")
    loaded = checkpoint.load(changed(tmp_path / "m", num_kv_heads=2, fuse_norm=False, attn_mode="fused_chunk"))
    assert torch.equal(logits(loaded), logits(model))
    config = model_of(SMALL["gla"], d_model=128, mlp=4).config  # 2/3 of 4 * 128 is 341: 512
    checkpoint.save(LM(config), tmp_path / "wide", layout="fla")
    assert checkpoint.load(changed(tmp_path / "wide", intermediate_size=None, hidden_ratio=4)).config.mlp == 4


def test_bounds_of_layers_are_those_of_the_softmax(tmp_path):
    checkpoint.save(model_of("hgrn2:heads=2", n_layer=4), tmp_path / "m", layout="fla")
    shares = load_file(tmp_path / "m" / "model.safetensors")["model.lower_bounds"].double().softmax(0)
    expected = shares.cumsum(0) - shares[0]
    loaded = checkpoint.load(tmp_path / "m")
    assert loaded.layers[0].mixer.bound is None
    for layer in (1, 2, 3):
        bound = loaded.layers[layer].mixer.bound.double().sigmoid()
        torch.testing.assert_close(bound, expected[layer], rtol=0, atol=1e-6)


def test_models_without_bounds_or_with_one_layer(tmp_path):
    for i, (text, layers) in enumerate([("hgrn2:heads=2,lower_bound=false", 1), ("hgrn2:heads=2", 1)]):
        model = model_of(text, n_layer=layers)
        checkpoint.save(model, tmp_path / str(i), layout="fla")
        bounds = load_file(tmp_path / str(i) / "model.safetensors").get("model.lower_bounds")
        assert (bounds is None) == (i == 0) and (bounds is None or bounds.shape == (1, 16))
        assert torch.equal(logits(checkpoint.load(tmp_path / str(i))), logits(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Mamba2Config(d_model=16, n_layer=1, headdim=8), "layers are all alike, of one of gla"),
        (ModelConfig("full-attention:heads=2", 16, 2), "layers are all alike, of one of gla"),
        (ModelConfig(["gla:heads=2", "retnet:heads=2"], 16, 2, mlp=1), "layers are all alike"),
        (ModelConfig("gla:heads=2", 16, 2), "cannot hold mlp 0: all layers of its gla have one"),
        (ModelConfig("mamba1", 16, 2, mlp=2), "cannot hold mlp 2: all layers of its mamba have none"),
        (ModelConfig("gla:heads=2,rank=4", 16, 2, mlp=2), "cannot hold rank 4: fla's is 16"),
        (ModelConfig("gla:heads=2", 16, 2, mlp=2, norm="layer"), "cannot hold norm 'layer': its gla has 'rms'"),
    ],
)
def test_what_fla_does_not_compute_is_refused(config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        checkpoint.check_layout(config, "fla")
    with pytest.raises(InputError, match=message):
        checkpoint.save(LM(config), tmp_path / "m", layout="fla")


def test_bounds_that_left_their_order_are_refused(tmp_path):
    model = model_of("hgrn2:heads=2")
    with torch.no_grad():
        model.layers[2].mixer.bound[3] = model.layers[1].mixer.bound[3] - 0.1
    with pytest.raises(InputError, match="lower bounds that are not above those before, as of layer 2"):
        checkpoint.save(model, tmp_path / "m", layout="fla")


def test_wrong_tensors_are_named(tmp_path):
    checkpoint.save(model_of(SMALL["gla"]), tmp_path / "m", layout="fla")
    refused(changed(tmp_path / "m", num_hidden_layers=2), "unexpected model.layers.2.attn.g_norm_swish_gate.weight")
    checkpoint.save(model_of(SMALL["gated-deltanet"]), tmp_path / "d", layout="fla")
    refused(changed(tmp_path / "d", num_v_heads=2), "config.json expects")
    changed(tmp_path / "d", num_v_heads=4)
    weights = load_file(tmp_path / "d" / "model.safetensors")
    del weights["model.layers.1.attn.v_conv1d.weight"]
    save_file(weights, tmp_path / "d" / "model.safetensors")
    refused(tmp_path / "d", "missing backbone.layers.1.mixer.conv1d.weight", "unexpected", "k_conv1d")
