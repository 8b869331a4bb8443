"""Checkpoints, good and bad, and the command line in this process."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from called import called

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

SHAPE = {"d_model": 32, "n_layer": 1, "headdim": 16, "d_state": 8}
OFFICIAL = {
    "d_model": 32,
    "n_layer": 1,
    "vocab_size": 256,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16},
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Checkpoints, one good and the others not, and texts."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("store")
    model = Mamba2LM(Mamba2Config(**SHAPE)).eval()
    model.train_length, model.tokenizer, model.name = 128, ByteTokenizer(), "tiny"
    with torch.no_grad():
        model.lm_head.weight[model.tokenizer.eos_id] = 0  # else one drawn in some hundreds says nothing
    checkpoint.save(model, root / "ok", dtype=torch.float32)
    (root / "empty").mkdir()
    for name in ("noweights", "cut", "mismatch"):
        shutil.copytree(root / "ok", root / name)
    (root / "noweights" / "model.safetensors").unlink()
    whole = (root / "ok" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((root / "ok" / "config.json").read_text())
    config["model"]["d_state"] = 16
    (root / "mismatch" / "config.json").write_text(json.dumps(config))
    for name in ("official", "evil", "evilzip"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(OFFICIAL))
    torch.save(model.state_dict(), root / "official" / "pytorch_model.bin")
    (root / "evil" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, root / "evilzip" / "pytorch_model.bin")
    with torch.no_grad():
        model.mixers[0].in_proj.weight[0, 0] = torch.nan
    checkpoint.save(model, root / "nan", dtype=torch.float32)

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (root / "words").mkdir()
    words.save(str(root / "words" / "tokenizer.json"))
    (root / "text.py").write_bytes(bytes(torch.randint(32, 120, (4000,)).tolist()))
    (root / "latin.txt").write_bytes("é à ü ".encode("latin1") * 300)
    (root / "file").touch()
    return root


@pytest.fixture
def run(store, monkeypatch, capsys):
    """run(words...) -> exit code, stdout, stderr, in the store's folder and with no hub in reach."""
    monkeypatch.chdir(store)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*words: str) -> tuple[int, str, str]:
        return called(monkeypatch, capsys, *words)

    return call
