"""Three layouts in and out; what is refused: test_checkpoint_refused.py."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import official_config, refused, same, write
from safetensors.torch import load_file, save_file

from rnn_longctx.data.tokenizers import load_tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.checkpoint import layouts, locate
from rnn_longctx.models.checkpoint.locate import DEMOS, name_of
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

# --- transformers (logits: test_parity_transformers.py)


def test_transformers_shards(make, tmp_path):
    from transformers import Mamba2ForCausalLM

    model = make(tie_embeddings=False)
    checkpoint.save(model, tmp_path / "one", layout="transformers")
    theirs = Mamba2ForCausalLM.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    many = checkpoint.load(tmp_path / "many")
    assert same(many, model) and many.weights_hash == checkpoint.load(tmp_path / "one").weights_hash

    shards[1].unlink()
    refused(tmp_path / "many", "missing shard", shards[1].name)
    index = tmp_path / "many" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../one/model.safetensors"}}))
    refused(tmp_path / "many", "weight_map")
    index.write_text("{")
    refused(tmp_path / "many", index.name, "JSON")


def test_transformers_shards_of_bins(make, tmp_path):
    model = make()
    checkpoint.save(model, tmp_path / "a", layout="transformers")
    state = load_file(tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "model.safetensors").unlink()
    names = sorted(state)
    files = {n: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, n in enumerate(names)}
    for file in set(files.values()):
        torch.save({n: state[n] for n in names if files[n] == file}, tmp_path / "a" / file)
    (tmp_path / "a" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert same(checkpoint.load(tmp_path / "a"), model)


# --- our own


def test_round_trip_in_every_layout(make, tmp_path):
    model = make(dt_limit=(0.01, math.inf), A_init=(0.001, 1.0), tie_embeddings=False, vocab_size=256)
    model.tokenizer, model.train_length = load_tokenizer("bytes"), 256
    provenance = {"text": ["a"], "loss": float("nan"), "path": Path("x"), "steps": 3}
    checkpoint.save(model, tmp_path / "a", provenance=provenance, calibration={"norms": [[1.5]]})
    config = json.loads((tmp_path / "a" / "config.json").read_text(), parse_constant=pytest.fail)
    assert config["format"] == "rnn-longctx" and config["provenance"]["text"] == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]  # nothing left aside

    a = checkpoint.load(tmp_path / "a")
    assert same(a, model) and a.config == model.config and a.name == "a"
    assert a.train_length == 256 and a.tokenizer.name == "bytes" and a.calibration == {"norms": [[1.5]]}
    assert a.provenance == {"text": ["a"], "loss": "nan", "path": "x", "steps": 3}
    checkpoint.save(a, tmp_path / "b", layout="transformers")
    b = checkpoint.load(tmp_path / "b", train_length=99)
    assert same(b, model) and b.weights_hash == a.weights_hash and b.calibration is None
    assert b.train_length == 99 and b.tokenizer.name == "bytes" and b.provenance == a.provenance
    assert checkpoint.load(tmp_path / "b").train_length == 256
    checkpoint.save(b, tmp_path / "c", layout="state-spaces")
    c = checkpoint.load(tmp_path / "c")
    assert same(c, model) and c.weights_hash == a.weights_hash and c.train_length == 99
    assert c.tokenizer.name == "bytes" and c.provenance == a.provenance
    checkpoint.save(c, tmp_path / "d")
    assert checkpoint.load(str(tmp_path / "d") + "/").weights_hash == a.weights_hash


@pytest.mark.parametrize("before", layouts.LAYOUTS)
@pytest.mark.parametrize("after", layouts.LAYOUTS)
def test_one_layout_over_another(before, after, make, tmp_path):
    old, new = make(), make()
    old.train_length, new.train_length = 100, None
    checkpoint.save(old, tmp_path / "a", layout=before, calibration={"norms": []})
    held = checkpoint.load(tmp_path / "a")
    checkpoint.save(new, tmp_path / "a", layout=after)
    checkpoint.save(new, tmp_path / "b", layout=after)
    found = checkpoint.load(tmp_path / "a")
    assert same(found, new) and found.train_length is None and found.calibration is None
    assert same(held, old), "a mapped file that was replaced is still whole"
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}


def test_hash_is_of_the_weights_as_they_are(own, make, tmp_path):
    model = checkpoint.load(own)
    first = model.weights_hash
    assert len(first) == 16 and int(first, 16) >= 0
    rounded = checkpoint.load(own, dtype="bfloat16")
    assert rounded.weights_hash not in (first, checkpoint.load(own, dtype="float64").weights_hash)
    checkpoint.save(model, tmp_path / "half", dtype=torch.bfloat16)
    assert checkpoint.load(tmp_path / "half").weights_hash != first
    assert checkpoint.load(tmp_path / "half", dtype="bfloat16").weights_hash == rounded.weights_hash
    state = load_file(own / "model.safetensors")
    bits = state["backbone.layers.1.mixer.D"].view(torch.int32)
    bits[3] ^= 1
    save_file(state, own / "model.safetensors")
    assert checkpoint.load(own).weights_hash != first


def test_hash_is_of_what_the_model_computes_too(own):
    config = json.loads((own / "config.json").read_text())
    hashes = {checkpoint.load(own).weights_hash}
    for change in ({"norm_eps": 1e-6}, {"dt_limit": [0.0, 0.5]}, {"residual_in_fp32": False}):
        write(own, config | {"model": config["model"] | change})
        hashes.add(checkpoint.load(own).weights_hash)
    assert len(hashes) == 4
    write(own, config | {"model": config["model"] | {"A_init": [2.0, 3.0]}})  # only an initialisation reads it
    first = min(hashes & {checkpoint.load(own).weights_hash})
    write(own, config)
    assert checkpoint.load(own).weights_hash == first


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32", torch.float64])
def test_dtypes(dtype, own, tmp_path):
    name = str(dtype).removeprefix("torch.")
    full, model = checkpoint.load(own), checkpoint.load(own, dtype=dtype)
    checkpoint.save(full, tmp_path / "saved", dtype=dtype)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    checkpoint.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert checkpoint.load(tmp_path / "saved").dtype == torch.float32  # whatever is stored
    for key, p in model.named_parameters():
        kept = key.endswith(("A_log", ".D", "dt_bias")) and name != "float64"
        expected = torch.float32 if kept else getattr(torch, name)
        assert p.dtype == stored[key].dtype == again[key].dtype == expected, key
        assert torch.equal(p, full.get_parameter(key).to(expected)), key
        assert torch.equal(p, stored[key]) and torch.equal(p, again[key]), key
    ids = torch.randint(61, (1, 9))
    assert torch.isfinite(model.logits(model(ids))).all()


def test_weights_are_mapped_and_the_file_never_written(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

    shape = {"d_model": 32, "n_layer": 1, "d_state": 8, "headdim": 8, "vocab_size": 2**19}  # 64 MiB
    checkpoint.save(Mamba2LM(Mamba2Config(**shape)), tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    write(tmp_path / "b", official_config(32, 1, vocab_size=2**19, d_state=8, headdim=8), state, "pytorch_model.bin")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    del state
    for name in ("a", "b"):
        held = anonymous()
        model = checkpoint.load(tmp_path / name)
        assert anonymous() - held < 16, name
        with torch.no_grad():
            model.backbone.norm_f.weight.add_(1.0)  # training writes to its own copy
        del model
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert (checkpoint.load(tmp_path / "b").backbone.norm_f.weight == 1).all()


def test_gradients_reach_a_loaded_model(own):
    model = checkpoint.load(own)
    model.losses(model(torch.randint(61, (1, 9))), torch.randint(61, (1, 9))).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_saving_over_a_checkpoint(make, own, monkeypatch):
    old = checkpoint.load(own)
    (own / "notes.txt").write_text("mine")
    (own / "calibration.json").write_text("{}")

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(sys.modules["rnn_longctx.models.checkpoint.save"], "save_file", full_disk)
        with pytest.raises(InputError, match=r"cannot write.*No space left"):
            checkpoint.save(make(), own)
    assert same(checkpoint.load(own), old) and (own / "calibration.json").exists()

    new = make()
    checkpoint.save(new, own)  # over the very file that `old` is mapped from
    assert same(checkpoint.load(own), new) and not same(old, new)
    assert (own / "notes.txt").read_text() == "mine"
    assert checkpoint.load(own).calibration is None  # it was made with other weights
    checkpoint.save(checkpoint.load(own), own)
    assert same(checkpoint.load(own), new)
    assert [p.name for p in own.parent.iterdir()] == ["own"]


# --- where it comes from


@pytest.mark.parametrize("name", DEMOS)
def test_demos(name, own, monkeypatch):
    monkeypatch.setattr(locate, "BUNDLED", own.parent)
    own.rename(own.parent / name)
    assert checkpoint.load(name).name == name
    monkeypatch.setattr(locate, "BUNDLED", own.parent / "none")
    refused(name, f"without its {name} checkpoint")


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
def test_hub(stored, official, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append(allow_patterns)
        config, state = official
        wanted = Path(stored).suffix in str(allow_patterns)
        return str(
            write(tmp_path / "0123abc", config, {k: v.clone() for k, v in state.items()} if wanted else None, stored)
        )

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = checkpoint.load("state-spaces/mamba2-tiny")
    assert model.name == "state-spaces/mamba2-tiny"
    assert model.provenance == {"source": "state-spaces/mamba2-tiny", "revision": "0123abc"}
    assert len(asked) == (1 if stored == "model.safetensors" else 2)  # pickles only where there is nothing better
    assert not any(".bin" in pattern for pattern in asked[0])


def test_sources_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    neither = ["neither a directory nor a hub id"]
    refused(tmp_path / "none", *neither, "none")
    refused(str(tmp_path / "none"), *neither)
    refused("runs/demo/model", *neither)
    refused("demoo", *neither, 'did you mean "demo"?')
    refused("demolong", *neither, 'did you mean "demo-long"?')
    refused(f"nobody/nothing-{os.urandom(4).hex()}", *neither)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty directory")
    (tmp_path / "file.bin").write_bytes(b"")
    refused(tmp_path / "file.bin", "is a file")


# --- tokenizers


@pytest.fixture
def tokenizer_files(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    fast = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(["<eos>"])
    directory = tmp_path / "words"
    directory.mkdir()
    fast.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return directory


def test_a_missing_tokenizer_only_matters_when_used(own, official, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = checkpoint.load(own)
    with pytest.raises(InputError, match="own comes with no tokenizer"):
        model.tokenizer.encode("a")
    copy.deepcopy(model)
    pickle.dumps(model.tokenizer)
    checkpoint.save(model, tmp_path / "again")

    config, state = official
    monkeypatch.setattr(layouts, "GPT_NEOX", "nobody/no-tokenizer")
    model = checkpoint.load(write(tmp_path / "a", config, state, "pytorch_model.bin"))
    checkpoint.save(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tokenizer"] == "nobody/no-tokenizer"
    with pytest.raises(InputError, match="nobody/no-tokenizer"):
        model.tokenizer.encode("a")
    refused(tmp_path / "b", "nobody/none", tokenizer="nobody/none")  # asked for: missing at once
    refused(tmp_path / "b", "256 tokens", f"vocabulary {model.config.vocab_size}", tokenizer="bytes")


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_tokenizer_files_travel_with_the_weights(layout, own, tokenizer_files, tmp_path):
    model = checkpoint.load(own, tokenizer=str(tokenizer_files))
    ids = model.tokenizer.encode("a b\0b").tolist()
    assert ids == [2, 3, 1, 3]
    checkpoint.save(model, tmp_path / "once", layout=layout)
    tokenizer_files.rename(tmp_path / "gone")
    checkpoint.save(checkpoint.load(tmp_path / "once"), tmp_path / "twice", layout=layout)
    again = checkpoint.load(tmp_path / "twice")
    assert again.tokenizer.encode("a b\0b").tolist() == ids and again.tokenizer.eos_id == 1


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_names_that_wrappers_gave(prefix, tmp_path):
    """karpathy/nanoGPT#325, huggingface/pytorch-image-models#2003: what torch.compile, DDP or FSDP wraps has the
    wrapper's name before each tensor's, or within it where blocks were wrapped alone."""
    model = Mamba2LM(Mamba2Config(d_model=24, n_layer=2, vocab_size=61, d_state=8, headdim=8)).eval()
    checkpoint.save(model, tmp_path / "plain")
    expected = checkpoint.load(tmp_path / "plain")
    for name, change in (("all", lambda k: prefix + k), ("blocks", lambda k: k.replace(".mixer.", f".{prefix}mixer."))):
        state = {change(k): v for k, v in load_file(tmp_path / "plain" / "model.safetensors").items()}
        write(tmp_path / name, (tmp_path / "plain" / "config.json").read_text(), state)
        found = checkpoint.load(tmp_path / name)
        assert found.weights_hash == expected.weights_hash and same(found, expected)
    twice = state | load_file(tmp_path / "plain" / "model.safetensors")
    refused(write(tmp_path / "twice", (tmp_path / "plain" / "config.json").read_text(), twice), "is there twice")


def test_a_model_of_a_training_run_is_called_after_the_run(tmp_path, monkeypatch):
    """All runs call their folders alike."""
    names = {"my-run/model": "my-run", "my-run/last": "my-run/last", "my-run/best": "my-run/best",
             "my-run/steps/300": "my-run/300", "my-run/steps": "steps", "run/7": "7", "last-1": "last-1"}  # fmt: skip
    for folder, name in names.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        assert name_of(tmp_path / folder) == name
    monkeypatch.chdir(tmp_path / "my-run" / "last")
    assert name_of(Path(".")) == "my-run/last" and name_of(Path("/")) == ""
