"""Every damaged or foreign checkpoint is one clear line."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from checkpoint_files import edit, refused, same, write
from safetensors.torch import load_file

from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.checkpoint.layouts import LAYOUTS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ssm_cfg": {}}, ["Mamba1", "supported"]),
        ({"ssm_cfg": {"layer": "Mamba1"}}, ["Mamba1", "supported"]),
        ({"attn_layer_idx": [9, 18]}, ["attention", "[9, 18]", "supported"]),
        ({"d_intermediate": 512}, ["d_intermediate", "512"]),
        ({"rms_norm": False}, ["rms_norm", "False"]),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, ["norm_before_gate"]),
        ({"ssm_cfg": {"layer": "Mamba2", "d_sate": 8}}, ["d_sate", 'did you mean "d_state"']),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_ssm": 8}}, ["d_ssm", "48"]),
        ({"d_model": "wide"}, ["d_model", "int", "wide"]),
        ({"pad_vocab_size_multiple": 0}, ["pad_vocab_size_multiple"]),
    ],
)
def test_official_configs_that_are_refused(change, words, official, tmp_path):
    config, state = official
    refused(write(tmp_path / "c", config | change, state, "pytorch_model.bin"), "config.json", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ["'llama'", "supported", "transformers Mamba2,"]),
        ({"model_type": "mamba"}, ["'mamba'", "supported"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"num_heads": 7}, ["num_heads", "7", "6"]),
        ({"time_step_limit": [0.0]}, ["dt_limit"]),
    ],
)
def test_transformers_configs_that_are_refused(change, words, make, tmp_path):
    checkpoint.save(make(), tmp_path / "a", layout="transformers")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    refused(write(tmp_path / "a", config | change), "config.json", *words)


NONSENSE = {
    "d_conv": [0, -1, 2**40, 2.5, "many", None, math.nan, 1e308],
    "expand": [0, -2, 2**40, "two", None, math.inf],
    "n_layer": [0, 10**9, None],
    "headdim": [0, -8, 7, None],
    "norm_eps": [-1e-5, math.nan, math.inf, 1e308, "small", None],
    "dt_limit": [[0.0], None, "none", [0.5, 0.1], [-1.0, 1.0], [math.nan, 1.0], [0.0, math.nan], [0.0, None],
                 [1e308, math.inf], [math.inf, math.inf], [0.0, 0.0], [0.0, {"__float__": "NaN"}], [0.0, [1]]],
    "A_init": [[1.0, 1e308], [0.0, 1.0], [2.0, 1.0], [math.nan, 1.0]],
}  # fmt: skip
THEIRS = {"d_conv": "conv_kernel", "n_layer": "num_hidden_layers", "headdim": "head_dim", "expand": "expand",
          "norm_eps": "layer_norm_epsilon", "dt_limit": "time_step_limit"}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values])
def test_numbers_of_a_config_that_are_nonsense_are_refused(name, value, make, tmp_path):
    """At load, in every layout, and not at the first token. json writes NaN and Infinity as bare words."""
    model = make()
    for layout in LAYOUTS:
        checkpoint.save(model, tmp_path / layout, layout=layout)
        config = json.loads((tmp_path / layout / "config.json").read_text())
        if layout == "transformers":
            if name not in THEIRS:
                continue
            config[THEIRS[name]] = value
        elif layout == "rnn-longctx":
            config["model"][name] = value
        elif name in config["ssm_cfg"] or name == "dt_limit":
            config["ssm_cfg"][name] = value
        else:
            continue
        refused(write(tmp_path / layout, config), "config.json", name)


@pytest.mark.parametrize("high", [math.inf, 1e308, 1e39, "Infinity", "inf", {"__float__": "Infinity"}, 10**300])
def test_an_upper_limit_beyond_float32_is_none(high, make, tmp_path):
    model = make()
    for layout in LAYOUTS:
        checkpoint.save(model, tmp_path / layout, layout=layout)
        config = json.loads((tmp_path / layout / "config.json").read_text())
        if isinstance(high, dict) and layout != "transformers":
            continue
        where = {"transformers": config, "rnn-longctx": config.get("model"), "state-spaces": config.get("ssm_cfg")}
        where[layout]["time_step_limit" if layout == "transformers" else "dt_limit"] = [0.0, high]
        read = checkpoint.load(write(tmp_path / layout, config))
        assert read.config.dt_limit == (0.0, math.inf) and same(read, model)


OTHERS = {
    "adapter": ({"adapter_config.json": '{"base_model_name_or_path": "owner/big"}', "adapter_model.safetensors": ""},
                "holds a PEFT adapter of owner/big without its model (adapter_config.json): python -c \"import peft; "
                "peft.AutoPeftModelForCausalLM.from_pretrained('{0}').merge_and_unload().save_pretrained('OUT')\""),
    "GGUF": ({"m-q4.gguf": ""}, "holds a GGUF model (m-q4.gguf): python -c \"import transformers; transformers."
             "AutoModelForCausalLM.from_pretrained('{0}', gguf_file='m-q4.gguf').save_pretrained('OUT')\""),
    "Lightning": ({"epoch=1-step=9.ckpt": ""}, "holds a Lightning checkpoint (epoch=1-step=9.ckpt): python -c "
                  "\"import torch; w = torch.load('{0}/epoch=1-step=9.ckpt', map_location='cpu')['state_dict']; "),
    "DeepSpeed": ({"zero_to_fp32.py": "", "latest": "", "global_step9/mp_rank_00_model_states.pt": ""},
                  "holds a DeepSpeed checkpoint (zero_to_fp32.py): python {0}/zero_to_fp32.py {0} pytorch_model.bin"),
    "FSDP": ({"pytorch_model_fsdp_0/__0_0.distcp": "", "pytorch_model_fsdp_0/.metadata": ""},
             "holds a part of a distributed checkpoint of PyTorch (FSDP) (__0_0.distcp): python -m torch.distributed."
             "checkpoint.format_utils dcp_to_torch {0}/pytorch_model_fsdp_0 pytorch_model.bin joins all parts"),
    "safetensors": ({"weights.safetensors": ""}, "holds weights without a config.json, which says their shape"),
    "TensorFlow": ({"tf_model.h5": ""}, "holds a TensorFlow checkpoint (tf_model.h5): transformers 4 reads it"),
    "Flax": ({"flax_model.msgpack": ""}, "holds a Flax checkpoint (flax_model.msgpack): transformers 4 reads it"),
    "optimizer": ({"optimizer.pt": "", "scheduler.pt": ""}, "holds an optimizer's state and no model"),
    "ONNX": ({"model.onnx": "", "tokenizer.json": ""}, "holds an ONNX export (model.onnx): name the checkpoint that"),
    "tokenizer": ({"tokenizer.json": ""}, "holds a tokenizer and no model (tokenizer.json): it goes to --tokenizer"),
    "a run": ({"model/config.json": "", "last/config.json": "", "log.csv": ""},
              "holds no config.json, but folders that do: name one of last, model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_a_folder_holds_instead_is_said_with_the_line_that_helps(kind, make, tmp_path):
    held, said = OTHERS[kind]
    folder = tmp_path / "m"
    for name, text in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    said = said.format(folder)
    assert refused(folder).startswith(f"{folder} {said}")
    (file,) = [folder / name for name in held][:1]
    if file.suffix in (".gguf", ".ckpt", ".onnx", ".h5"):
        assert refused(file).startswith(f"{file} is {said.removeprefix('holds ')[:40]}")
    if kind != "a run":  # a config.json alone does not make it a checkpoint
        checkpoint.save(make(), tmp_path / "whole")
        write(folder, (tmp_path / "whole" / "config.json").read_text())
        refused(folder, "holds config.json but no weights", f"it {said[:60]}")


def test_what_save_refuses(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        checkpoint.save(make(), tmp_path / "file")
    with pytest.raises(InputError, match="layout 'transformer'; did you mean \"transformers\""):
        checkpoint.save(make(), tmp_path / "a", layout="transformer")
    with pytest.raises(InputError, match=r"'state-spaces' cannot hold norm_eps 0\.001: mamba-ssm's is 1e-05"):
        checkpoint.save(make(norm_eps=1e-3), tmp_path / "a", layout="state-spaces")
    with pytest.raises(InputError, match='did you mean "float32"'):
        checkpoint.save(make(), tmp_path / "a", dtype="float23")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_arguments_that_are_refused(own):
    refused(own, "unknown dtype 'bfloat'; did you mean \"bfloat16\"", dtype="bfloat")
    refused(own, "device 'cuda:77'", device="cuda:77")
    refused(own, "device 'gpu'", device="gpu")
    refused(own, "train_length", "0", train_length=0)


def test_half_of_a_checkpoint(own, tmp_path):
    (own / "config.json").rename(tmp_path / "config.json")
    refused(own, "model.safetensors but no config.json")
    (own / "model.safetensors").unlink()
    (own / "other").write_text("")
    refused(own, "no config.json")
    (tmp_path / "config.json").rename(own / "config.json")
    refused(own, "no weights", "model.safetensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"d_model": 24,', ["JSON"]),
        ("", ["JSON"]),
        ("[1, 2]", ["JSON object", "list"]),
        ('{"hidden": 3}', ["no known layout", "hidden", "supported"]),
        ("{}", ["no known layout"]),
        ('{"format": "rnn-longctx"}', ["model"]),
        ('{"format": "rnn-longctx", "model": {"d_modle": 24}}', ["d_modle", 'did you mean "d_model"']),
        ('{"format": "rnn-longctx", "model": {"d_model": 24}, "train_length": 0}', ["train_length", "0"]),
    ],
)
def test_broken_configs(text, words, own):
    refused(write(own, text), "config.json", *words)


def test_broken_calibration(own):
    (own / "calibration.json").write_text("{")
    refused(own, "calibration.json", "JSON")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_cut_short(name, part, official, tmp_path):
    config, state = official
    directory = write(tmp_path / "a", config, {k: v.clone() for k, v in state.items()}, name)
    data = (directory / name).read_bytes()
    (directory / name).write_bytes(data[: int(part * len(data))])
    refused(directory, name, "damaged")


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(how, official, tmp_path):
    config, state = official
    evil = {**state, "backbone.embedding.weight": Malicious(tmp_path / "ran")}
    directory = write(tmp_path / "a", config)
    if how == "torch":
        torch.save(evil, directory / "pytorch_model.bin")
    else:
        with (directory / "pytorch_model.bin").open("wb") as file:
            pickle.dump({"a": Malicious(tmp_path / "ran")}, file, protocol=2)
    refused(directory, "pytorch_model.bin", "nothing in it was run", "system")  # says what it asked for
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))  # it would have
    assert (tmp_path / "ran").exists()


def test_a_pickle_of_something_else(official, tmp_path):
    config, state = official
    refused(write(tmp_path / "a", config, [1, 2], "pytorch_model.bin"), "table of tensors", "list")
    refused(write(tmp_path / "a", config, {"model": state}, "pytorch_model.bin"), "table of tensors")


def test_weights_that_do_not_fit(own):
    in_proj = load_file(own / "model.safetensors")["backbone.layers.1.mixer.in_proj.weight"]
    wrong = {"backbone.layers.1.mixer.in_proj.weight": in_proj[:-1].clone()}
    given, expected = str(tuple(in_proj[:-1].shape)), str(tuple(in_proj.shape))
    refused(edit(own, **wrong), "backbone.layers.1.mixer.in_proj.weight", given, expected)
    edit(own, **{"backbone.layers.1.mixer.in_proj.weight": in_proj})
    checkpoint.load(own)
    refused(edit(own, extra=torch.ones(1)), "unexpected extra")
    gone = {f"backbone.layers.0.mixer.{k}": None for k in ("A_log", "D", "dt_bias", "conv1d.bias", "norm.weight")}
    refused(edit(own, extra=None, **gone), "missing backbone.layers.0.mixer.A_log", "and 2 more")


def test_head_and_embedding(official, make, tmp_path):
    config, state = official
    state = {k: v.clone() for k, v in state.items()}
    state["lm_head.weight"][0, 0] += 1
    refused(write(tmp_path / "a", config, state), "lm_head.weight", "ties")
    del state["lm_head.weight"]
    assert checkpoint.load(write(tmp_path / "a", config, state)).config.tie_embeddings
    refused(write(tmp_path / "a", config | {"tie_embeddings": False}, state), "missing lm_head.weight")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(value, dtype, own):
    name = "backbone.layers.1.mixer.out_proj.weight"
    tensor = load_file(own / "model.safetensors")[name].to(dtype)
    tensor[3, 5] = value
    refused(edit(own, **{name: tensor}), name, "NaN or infinity")


def test_weights_that_are_not_floating_point(own):
    name = "backbone.norm_f.weight"
    refused(edit(own, **{name: torch.ones(24, dtype=torch.int8)}), name, "int8", "float32")
