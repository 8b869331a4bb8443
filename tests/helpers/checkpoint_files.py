"""What tests of checkpoints share: writing one, changing it, and seeing that it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM


def official_config(d_model: int, n_layer: int, vocab_size: int = 50277, **ssm) -> dict:
    return {
        "d_model": d_model,
        "d_intermediate": 0,
        "n_layer": n_layer,
        "vocab_size": vocab_size,
        "ssm_cfg": {"layer": "Mamba2", **ssm},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }


def write(directory: Path, config: dict | str, state: dict | None = None, name: str = "model.safetensors") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if state is not None and name.endswith(".bin"):
        torch.save(state, directory / name)
    elif state is not None:
        save_file(state, directory / name)
    return directory


@torch.no_grad()
def same(a: Mamba2LM, b: Mamba2LM) -> bool:
    ids = torch.randint(61, (2, 20))
    return torch.equal(a.logits(a(ids)), b.logits(b(ids)))


def refused(source, *words: str, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        checkpoint.load(source, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return message


def edit(directory: Path, **changes) -> Path:
    """Change (or, with None, remove) tensors of a directory's model.safetensors."""
    state = load_file(directory / "model.safetensors") | changes
    save_file({k: v for k, v in state.items() if v is not None}, directory / "model.safetensors")
    return directory
