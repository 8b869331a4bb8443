"""The layout of mamba-ssm, in and out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoint_files import official_config, same, write

from rnn_longctx.data.tokenizers import load_tokenizer
from rnn_longctx.models import checkpoint
from rnn_longctx.models.checkpoint import layouts
from rnn_longctx.models.lm import Mamba2LM

# name: d_model, n_layer, parameters, state elements (the first three as in arXiv 2410.07145)
OFFICIAL = {
    "130m": (768, 24, 128.99e6, 4.8e6),
    "370m": (1024, 48, 368.3e6, 12.9e6),
    "780m": (1536, 48, 780e6, 19.3e6),
    "1.3b": (2048, 48, 1.34e9, 25.8e6),
    "2.7b": (2560, 64, 2.70e9, 43e6),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes_at_full_shape(name, tmp_path):
    d, layers, parameters, states = OFFICIAL[name]
    write(tmp_path / "c", official_config(d, layers))
    header = layouts.read_header(tmp_path / "c")
    assert header.tokenizer == "EleutherAI/gpt-neox-20b" and header.train_length is None
    with torch.device("meta"):
        model = Mamba2LM(header.config)
    inner, heads, conv = 2 * d, 2 * d // 64, 2 * d + 2 * 128
    mixer = {
        "in_proj.weight": (2 * inner + 2 * 128 + heads, d),
        "conv1d.weight": (conv, 1, 4),
        "conv1d.bias": (conv,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (d, inner),
    }
    expected = {"backbone.embedding.weight": (50288, d), "lm_head.weight": (50288, d), "backbone.norm_f.weight": (d,)}
    for i in range(layers):
        expected |= {f"backbone.layers.{i}.mixer.{k}": v for k, v in mixer.items()}
        expected[f"backbone.layers.{i}.norm.weight"] = (d,)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=5e-3)
    elements = header.config.scan_state_elements + header.config.conv_state_elements
    assert elements == pytest.approx(states, rel=0.02)


@pytest.mark.parametrize("how", ["model.safetensors", "pytorch_model.bin", "legacy", "shards"])
def test_official_layout(how, official, tmp_path):
    config, state = official
    directory = write(tmp_path / "mamba2-tiny", config)
    if how == "shards":
        names = sorted(state)
        shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, part in shards.items():
            torch.save({k: state[k] for k in part}, directory / file)
        index = {"weight_map": {k: file for file, part in shards.items() for k in part}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif how == "legacy":
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif how == "model.safetensors":
        write(directory, config, {k: v.clone() for k, v in state.items()})
    else:
        write(directory, config, state, how)
    model = checkpoint.load(directory)
    reference = Mamba2LM(model.config)
    reference.load_state_dict(state)
    assert same(model, reference)
    assert model.name == "mamba2-tiny" and model.train_length is None and not model.training
    assert model.config.vocab_size == 64 and model.lm_head.weight is model.backbone.embedding.weight
    assert all(p.requires_grad for p in model.parameters())
    assert checkpoint.load(directory, train_length=2048).train_length == 2048


SHAPES = {
    "no limit": {},
    "tied not": {"tie_embeddings": False, "residual_in_fp32": False},
    "a limit": {"dt_limit": (0.01, 0.2), "bias": True},
    "half a limit": {"dt_limit": (0.01, math.inf), "conv_bias": False, "d_conv": 3},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_mamba_ssm_is_given(shape, make, tmp_path):
    """Its own keys alone, each weight by its name, and a vocabulary that it does not pad. (Its logits:
    test_adopt_mamba_ssm.py.)"""
    model = make(**shape, vocab_size=263)  # a multiple of nothing
    model.tokenizer, model.train_length, model.provenance = load_tokenizer("bytes"), 300, {"seed": 3}
    checkpoint.save(model, tmp_path / "a", layout="state-spaces", calibration={"norms": [[1.5]]})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config.keys() == official_config(24, 2).keys()
    known = ("layer", "d_state", "d_conv", "expand", "headdim", "ngroups", "bias", "conv_bias", "dt_limit")
    assert config["ssm_cfg"].keys() <= {*known} and config["ssm_cfg"]["layer"] == "Mamba2"
    assert ("dt_limit" in config["ssm_cfg"]) == ("dt_limit" in shape)
    assert config["vocab_size"] % config["pad_vocab_size_multiple"] == 0
    state = torch.load(tmp_path / "a" / "pytorch_model.bin", weights_only=True)
    assert state.keys() == model.state_dict().keys()  # a tied head too, as it asks for, and once in the file
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    tied = state["lm_head.weight"].data_ptr() == state["backbone.embedding.weight"].data_ptr()
    assert tied == model.config.tie_embeddings

    back = checkpoint.load(tmp_path / "a")
    assert same(back, model) and back.config == model.config and back.weights_hash == model.weights_hash
    assert back.tokenizer.name == "bytes" and back.train_length == 300 and back.provenance == {"seed": 3}
    assert back.calibration == {"norms": [[1.5]]}
