"""Adopted models from files, with quantised weights too; what cannot be adopted is one line."""

from __future__ import annotations

import copy
import json
import shutil
import sys

import pytest
import torch
import transformers as hf
from adopted_families import NEAR, POLICIES, VOCAB, logits_of, put, random_ids, streamed
from safetensors.torch import load_file, save_file
from torch import nn

import rnn_longctx
from rnn_longctx import cli
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import active, mitigate
from rnn_longctx.models import checkpoint
from rnn_longctx.models.adopt.adopting import adopt, load_adopted, load_any
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.recurrence.policy import PLAIN


@torch.no_grad()
def test_saved_and_loaded_as_before(model, tmp_path):
    ids = random_ids()
    before = logits_of(model, ids)
    with mitigate(model, "rri:alpha=0.9,beta=0.4"):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, ids), before) and active(again) == ("none", None)


def test_another_librarys_model_is_saved_by_it(model, tmp_path):
    with pytest.raises(InputError, match="a model of another library has its save_pretrained"):
        checkpoint.save(adopt(model), tmp_path / "x")


def test_what_has_no_mixer_is_refused_in_one_line():
    """In everyday words first, then what is supported, then what was looked for and found."""
    words = (
        r"^Sequential has no recurrence that this library knows; adopted are .*mamba2, bamba.*A_log.*found Sequential$"
    )
    for act in (rnn_longctx.adopt, lambda model: mitigate(model, "rri")):
        with pytest.raises(InputError, match=words) as error:
            act(nn.Sequential(nn.Sequential(nn.Linear(2, 2))))
        assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bamba", "jamba"])
def test_a_checkpoint_is_found_and_adopted(build, tmp_path, family):
    theirs = build(family, 256)
    theirs.save_pretrained(tmp_path / "kept")
    ours = load_adopted(tmp_path / "kept", tokenizer="bytes", train_length=64)
    assert ours.train_length == 64 and ours.name == "kept" and ours.tokenizer.name == "bytes"
    assert ours.scan_state_elements > 0 and ours.conv_state_elements > 0
    ids = random_ids()
    torch.testing.assert_close(ours.logits(ours(ids)), logits_of(theirs, ids), **NEAR)
    with pytest.raises(InputError, match="without a tokenizer"):
        load_adopted(tmp_path / "kept")
    build("mamba2", 256).save_pretrained(tmp_path / "own")
    assert load_adopted(tmp_path / "own", tokenizer="bytes") is None  # which `load` reads
    assert isinstance(load_any(tmp_path / "own", tokenizer="bytes"), Mamba2LM)


def test_what_cannot_be_adopted_is_one_line(build, tmp_path, capsys, monkeypatch):
    build("mamba").save_pretrained(tmp_path / "narrow")
    theirs = build("mamba", 256)
    theirs.save_pretrained(tmp_path / "kept")
    hf.GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    weights = load_file(tmp_path / "kept" / "model.safetensors")
    name = "backbone.layers.0.mixer.A_log"
    for folder, tensors in (("lacking", {k: v for k, v in weights.items() if k != name}),
                            ("nan", weights | {name: weights[name] * float("nan")})):  # fmt: skip
        shutil.copytree(tmp_path / "kept", tmp_path / folder)
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    shutil.copytree(tmp_path / "kept", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\0" * 99)

    def line(folder, *words):
        words = ["generate", str(tmp_path / folder), "--prompt", "a", "--tokenizer", "bytes", *words]
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert f"has 256 tokens, the model's vocabulary {VOCAB}" in line("narrow")
    assert f"lacks 1 weight, {name} among them" in line("lacking")
    assert f"{name} is not finite" in line("nan")
    assert "transformers cannot read cut" in line("cut")
    assert "model_type 'gpt2'; supported:" in line("gpt2") and "falcon_h1" in line("gpt2")
    assert "unknown dtype 'int8'" in line("kept", "--dtype", "int8")
    assert "is not available here" in line("kept", "--device", "cuda:99")


@torch.no_grad()
def test_limits_of_dt_of_a_config(build, tmp_path):
    """Beyond float32 they are none; nonsense is refused, and not at the first token."""
    build("bamba", 256).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    plain, ids = load_adopted(tmp_path / "m", tokenizer="bytes"), torch.randint(200, (1, 9))
    config = json.loads(path.read_text())
    for limits in ([0.0, 1e308], [0.0, float("inf")], [0, "Infinity"], None):
        path.write_text(json.dumps(config | {"time_step_limit": limits}))
        try:
            read = load_adopted(tmp_path / "m", tokenizer="bytes")
        except InputError as error:  # what transformers itself does not take
            assert "transformers cannot read m: " in str(error) and limits in ([0, "Infinity"], None)
            continue
        assert {m.dt_limit for m in read.mixers} == {(0.0, float("inf"))}
        assert torch.equal(read(ids), plain(ids))
    for limits in ([0.5, 0.1], [-1.0, 1.0], [0.0, float("nan")], [1e308, 1e308], [0.0], "x"):
        path.write_text(json.dumps(config | {"time_step_limit": limits}))
        with pytest.raises(InputError, match=r"config\.json: time_step_limit: expected two limits|cannot read m: "):
            load_adopted(tmp_path / "m", tokenizer="bytes")
    theirs = build("bamba")
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, 1e308)
    with pytest.raises(InputError, match=r"are beyond float32: \(0.0, inf\) says the same"):
        adopt(theirs)
    for name, value in (("mamba_d_conv", 0), ("mamba_expand", None), ("mamba_n_heads", -1), ("hidden_size", "wide")):
        path.write_text(json.dumps(config | {name: value}))
        with pytest.raises(InputError, match=r"cannot read m: |conv1d\.weight has shape") as caught:
            load_adopted(tmp_path / "m", tokenizer="bytes")
        assert "\n" not in str(caught.value)


class Int8(torch.Tensor):
    """Weights in eight bits, as libraries of quantisation make them: little more than a product is known of them."""

    @staticmethod
    def __new__(cls, packed, scale):
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype, device=packed.device)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self):
        return ["packed", "scale"], None

    def dequantize(self):
        return self.packed * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].dequantize(), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].packed.clone(), args[0].scale.clone())
        raise NotImplementedError(func)


class Packed(nn.Module):
    """A linear layer or an embedding whose weight is of bytes."""

    def __init__(self, module):
        super().__init__()
        packed, scale = _packed(module.weight)
        self.weight = nn.Parameter((packed + 128).to(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias, self.embeds = getattr(module, "bias", None), isinstance(module, nn.Embedding)

    def dequantize(self):
        return (self.weight.to(self.scale.dtype) - 128) * self.scale

    def forward(self, x):
        if self.embeds:
            return nn.functional.embedding(x, self.dequantize())
        assert x.dtype == self.scale.dtype, "activations in a type that no weight is of"
        return nn.functional.linear(x, self.dequantize(), self.bias)


def _packed(weight):
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


def _quantise(model, how):
    """Every linear layer that transformers lets be; returns a copy whose weights are the same numbers in full."""
    wide = copy.deepcopy(model)
    for name, m in list(model.named_modules()):
        if not isinstance(m, nn.Linear | nn.Embedding) or (how != "module" and isinstance(m, nn.Embedding)):
            continue
        if name.endswith("dt_proj"):
            continue  # which transformers multiplies by itself
        if how == "module":
            if name == "lm_head" and "mamba" in model.config.model_type:
                continue  # transformers brings hidden states to the type of these heads' weights
            holder, _, last = name.rpartition(".")
            packed = Packed(m)
            setattr(model.get_submodule(holder), last, packed)
            weight = packed.dequantize()
        elif how == "tensor":
            m.weight = nn.Parameter(Int8(*_packed(m.weight)), requires_grad=False)
            weight = m.weight.dequantize()
        else:
            ao = pytest.importorskip("torchao.quantization")
            ao.quantize_(m, ao.Int8WeightOnlyConfig())
            weight = m.weight.dequantize()
        wide.get_submodule(name).weight = nn.Parameter(weight.detach().clone())
    return wide


@torch.no_grad()
@pytest.mark.parametrize("how", ["tensor", "module", "torchao"])
@pytest.mark.parametrize("family", ["mamba2", "bamba", "mamba"])
def test_quantised_weights(build, family, how):
    model, ids = build(family), random_ids()
    wide = _quantise(model, how)
    before, adopted = logits_of(model, ids), adopt(model)
    assert (before - logits_of(wide, ids)).abs().max() < 1e-3 and adopted.dtype == torch.float32
    assert adopted.device.type == "cpu" and sum(p.numel() for p in adopted.parameters()) > 0
    torch.testing.assert_close(streamed(adopted, ids, [7, 1, 12])[0], before, **NEAR)
    for policy in (POLICIES["gates"], POLICIES["window"]):
        put(adopted, policy)
        put(adopt(wide), policy)
        changed = logits_of(wide, ids)
        assert (changed - before).abs().max() > 1e-3
        torch.testing.assert_close(logits_of(model, ids), changed, rtol=0, atol=1e-3)
        torch.testing.assert_close(streamed(adopted, ids, [9, 1, 10])[0], changed, rtol=0, atol=1e-3)
    put(adopted, PLAIN)
    assert torch.equal(logits_of(model, ids), before) and adopted(ids[:, :0]).dtype == torch.float32
    model.generate(ids, max_new_tokens=3)

    again = copy.deepcopy(model)
    assert adopt(again).weights_hash == adopted.weights_hash != adopt(wide).weights_hash
    linear = adopt(again).mixers[-1].module.out_proj
    for part in ("packed", "qdata"):
        if hasattr(linear.weight, part):
            getattr(linear.weight, part)[0, 0] ^= 1  # a bit of one number
    if how == "module":
        linear.weight[0, 0] ^= 1
    assert adopt(again).weights_hash != adopted.weights_hash
