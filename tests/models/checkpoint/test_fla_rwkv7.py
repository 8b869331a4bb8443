"""RWKV-7 in fla's format, in and out, whose layers are two of ours each. That fla computes the same:
test_fla_itself.py."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import refused
from safetensors.torch import load_file, save_file

from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM

MIXERS = ["rwkv7:headdim=4,rank_w=2,rank_a=3,rank_v=5,rank_g=6", "rwkv7-ffn:expand=1.5"]
# The names and shapes of a layer's tensors in models that fla 0.6 has saved, of hidden_size 16 and the settings above.
LAYER = {
    "attn_norm.weight": (16,), "attn_norm.bias": (16,), "ffn_norm.weight": (16,), "ffn_norm.bias": (16,),
    "attn.x_r": (1, 1, 16), "attn.x_w": (1, 1, 16), "attn.x_k": (1, 1, 16), "attn.x_v": (1, 1, 16),
    "attn.x_a": (1, 1, 16), "attn.x_g": (1, 1, 16), "attn.k_k": (16,), "attn.k_a": (16,), "attn.r_k": (4, 4),
    "attn.r_proj.weight": (16, 16), "attn.k_proj.weight": (16, 16), "attn.v_proj.weight": (16, 16),
    "attn.o_proj.weight": (16, 16), "attn.g_norm.weight": (16,), "attn.g_norm.bias": (16,),
    "attn.w_lora.lora.0.weight": (2, 16), "attn.w_lora.lora.2.weight": (16, 2), "attn.w_lora.lora.2.bias": (16,),
    "attn.a_lora.lora.0.weight": (3, 16), "attn.a_lora.lora.2.weight": (16, 3), "attn.a_lora.lora.2.bias": (16,),
    "attn.v_lora.lora.0.weight": (5, 16), "attn.v_lora.lora.2.weight": (16, 5), "attn.v_lora.lora.2.bias": (16,),
    "attn.g_lora.lora.0.weight": (6, 16), "attn.g_lora.lora.2.weight": (16, 6),
    "ffn.x_k": (16,), "ffn.key.weight": (24, 16), "ffn.value.weight": (16, 24),
}  # fmt: skip
AROUND = {"model.embeddings.weight": (31, 16), "model.norm.weight": (16,), "model.norm.bias": (16,)}


@torch.no_grad()
def model_of(mixers=MIXERS, **shape) -> LM:
    shape = {"d_model": 16, "n_layer": 6, "vocab_size": 31, "tie_embeddings": False, "norm": "layer", **shape}
    model = LM(ModelConfig(mixers, **shape)).eval()
    for p in model.parameters():
        p += 0.2 * torch.randn_like(p)
    return model


@torch.no_grad()
def logits(model: LM) -> torch.Tensor:
    return model.logits(model(torch.arange(20)[None] % 31))


def edited(folder, tensors=None, **keys):
    """The checkpoint with its tensors put through a function, and keys of its config changed."""
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    if tensors is not None:
        save_file({k: t.contiguous() for k, t in tensors(load_file(file)).items()}, file, {"format": "pt"})
    return folder


@pytest.fixture
def saved(tmp_path):
    model = model_of()
    checkpoint.save(model, tmp_path / "m", layout="fla")
    return model, tmp_path / "m"


@pytest.mark.parametrize("tie", [False, True])
def test_out_and_in(tie, tmp_path):
    model = model_of(tie_embeddings=tie)
    checkpoint.save(model, tmp_path / "m", layout="fla")
    loaded = checkpoint.load(tmp_path / "m")
    assert loaded.weights_hash == model.weights_hash and loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))
    checkpoint.save(loaded, tmp_path / "ours")
    assert checkpoint.load(tmp_path / "ours").weights_hash == model.weights_hash


def test_the_names_are_theirs(saved):
    layers = {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in LAYER.items()}
    expected = {name: shape for name, shape in layers.items() if "layers.0.attn.v_lora" not in name}
    tensors = load_file(saved[1] / "model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == expected | AROUND | {"lm_head.weight": (31, 16)}


def test_the_norm_after_the_embedding_is_put_into_it(saved):
    model, folder = saved
    weight, bias, table = torch.randn(16), torch.randn(16), torch.randn(31, 16) * 1e-3  # (so that eps counts)

    def with_norm(tensors):
        norm = {"model.layers.0.pre_norm.weight": weight, "model.layers.0.pre_norm.bias": bias}
        return tensors | norm | {"model.embeddings.weight": table}

    loaded = checkpoint.load(edited(folder, with_norm, norm_first=True))
    with torch.no_grad():
        model.backbone.embedding.weight.copy_(F.layer_norm(table, (16,), weight, bias, 1e-5))
    assert torch.equal(logits(loaded), logits(model))


def test_what_says_the_same_is_read(saved):
    """Norms without biases, mixes of the first version in one tensor, sizes that follow from others."""
    model, folder = saved

    def older(tensors):
        for i in range(3):
            name = f"model.layers.{i}.attn"
            tensors[f"{name}.x_x"] = torch.cat([tensors.pop(f"{name}.x_{c}")[0] for c in "rwkvag"])
        return {k: t for k, t in tensors.items() if not k.endswith("norm.bias") or ".attn.g_norm." in k}

    with torch.no_grad():
        for norm in [*(block.norm for block in model.layers), model.backbone.norm_f]:
            norm.bias.zero_()
    loaded = checkpoint.load(edited(folder, older, norm_bias=False, head_dim=None, num_heads=4, value_dim=[16] * 3))
    assert torch.equal(logits(loaded), logits(model))
    wide = model_of(["rwkv7:headdim=32", "rwkv7-ffn:expand=4"], d_model=64, n_layer=2)
    checkpoint.save(wide, folder / "wide", layout="fla")
    unsaid = {f"{which}_low_rank_dim": None for which in ("decay", "a", "v", "gate")}
    loaded = checkpoint.load(edited(folder / "wide", intermediate_size=None, hidden_ratio=4, head_dim=32, **unsaid))
    assert torch.equal(logits(loaded), logits(wide))


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported, only 'sqrelu'"),
        ({"value_dim": [16, 32, 16]}, "value_dim"),
        ({"value_dim": 32}, "value_dim 32 is not supported, only hidden_size, 16"),
        ({"norm_first": True, "tie_word_embeddings": True}, "tie_word_embeddings with norm_first"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "attn"),
        ({"head_dim": 5}, "no multiple of headdim"),
        ({"decay_low_rank_dim": 0}, "rank_w"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(keys, word, saved):
    refused(edited(saved[1], **keys), "config.json", word)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(MIXERS, 16, 6), "cannot hold norm 'rms': its rwkv7 has 'layer'"),
        (ModelConfig(MIXERS, 16, 5, norm="layer"), "cannot hold 5 layers of rwkv7 and rwkv7-ffn in turns"),
        (ModelConfig(MIXERS, 16, 6, mlp=1, norm="layer"), "cannot hold mlp 1"),
        (ModelConfig(MIXERS[0], 16, 6, mlp=1, norm="layer"), "rwkv7 in turns with rwkv7-ffn"),
    ],
)
def test_what_fla_does_not_compute_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        checkpoint.check_layout(config, "fla")
