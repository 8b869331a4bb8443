"""`save` writes a model of this library's own, in one of four layouts (`rnn_longctx.models.checkpoint.layouts`)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rnn_longctx.config import home_path
from rnn_longctx.devices import dtype_of
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.files import to_disk
from rnn_longctx.models.checkpoint import fla, layouts
from rnn_longctx.models.checkpoint.json_files import write_json
from rnn_longctx.models.checkpoint.tokenizer import tokenizer_spec, write_tokenizer
from rnn_longctx.models.checkpoint.weights import WEIGHTS, stored_state
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


def save(
    model: LM,
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    provenance: dict[str, Any] | None = None,
    layout: str = "rnn-longctx",
    calibration: dict[str, Any] | None = None,
) -> None:
    """Write weights and config.json. In a new directory a reader finds the checkpoint whole or not at all; over an
    older one, of whichever layout, files are replaced one by one, config.json last.

    Args:
        dtype: of the weights; None keeps theirs. A_log, D and dt_bias are at least float32 in a 16-bit file.
        provenance: recorded beside the shape; None: the model's own.
        layout: "rnn-longctx"; "transformers", for its AutoModelForCausalLM; "state-spaces", for mamba-ssm's
            MambaLMHeadModel: with pytorch_model.bin, and what config.json has no place for in rnn_longctx.json; or
            "fla", for transformers' AutoModelForCausalLM where flash-linear-attention is imported.
        calibration: goes beside the weights; None: none, since it belongs to the weights it was made with.
    Raises:
        InputError: an unknown layout or dtype, a model that the layout cannot hold, or a directory that cannot be
            written.
    """
    if not isinstance(model, LM):
        raise InputError(
            f"{getattr(model, 'name', type(model).__name__)} is no model of this library's own: "
            "a model of another library has its save_pretrained"
        )
    layouts.check_layout(model.config, layout)
    target = model.dtype if dtype is None else dtype_of(dtype)
    state = stored_state(model, target)
    extra: dict[str, Any] = {
        "tokenizer": tokenizer_spec(model),
        "train_length": model.train_length,
        "provenance": model.provenance if provenance is None else provenance,
    }
    if model.eos_token_id is not None:
        extra["eos_token_id"] = model.eos_token_id
    if layout == "rnn-longctx":
        config = layouts.own_config(model.config, extra)
    elif layout == "transformers":
        assert isinstance(model.config, Mamba2Config)  # (`check_layout`)
        state["backbone.embeddings.weight"] = state.pop("backbone.embedding.weight")
        config = layouts.transformers_config(model.config, target, extra)
    elif layout == layouts.FLA:
        assert isinstance(model.config, ModelConfig)
        kind = fla.type_for(model.config)
        state = kind.write_tensors(state, model.config)
        config = kind.write_config(model.config, target, extra)
    else:
        assert isinstance(model.config, Mamba2Config)
        state.setdefault("lm_head.weight", state["backbone.embedding.weight"])  # it asks for a tied one too
        config = layouts.official_config(model.config)

    directory = home_path(directory).absolute()
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_tokenizer(model, aside)
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if calibration is not None:
            write_json(aside / "calibration.json", calibration, indent=None)
        if layout == "state-spaces":
            write_json(aside / layouts.SIDE, extra)
            torch.save(state, aside / "pytorch_model.bin")
        else:
            save_file(state, aside / "model.safetensors", {"format": "pt"})
        for file in aside.iterdir():
            to_disk(file)
        _put(aside, directory)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save wraps the first in the second
        raise InputError(f"cannot write the checkpoint {directory}: {one_line(error)}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(aside: Path, directory: Path) -> None:
    """Move finished files to their place: one rename if nothing is there, else file by file, config.json last."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        os.replace(aside, directory)
        return
    (directory / "calibration.json").unlink(missing_ok=True)  # it belongs to the weights that go
    *files, config = sorted(aside.iterdir(), key=lambda f: f.name == "config.json")
    for file in files:
        os.replace(file, directory / file.name)
    for name in (layouts.SIDE, *WEIGHTS, *(f"{w}.index.json" for w in WEIGHTS)):
        if name not in {file.name for file in files}:  # of another layout, whose weights would be read first
            (directory / name).unlink(missing_ok=True)
    os.replace(config, directory / config.name)
