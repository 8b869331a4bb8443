"""A model that transformers reads, with every way in which its files may be wrong said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.models.adopt.stepped import UNLIMITED
from rnn_longctx.models.checkpoint.json_files import read_json
from rnn_longctx.models.checkpoint.layouts import WITH_IMAGES
from rnn_longctx.models.hashing import computes_in
from rnn_longctx.models.mixers.mamba2 import dt_limits


def library_model(directory: Path, name: str, dtype: torch.dtype) -> Any:
    """Return the model of transformers in a directory, on the CPU.

    Raises:
        InputError: transformers cannot read it, or weights are missing, do not fit its config or are not finite.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = directory / "config.json"
    with_images = read_json(config).get("model_type") in WITH_IMAGES
    library_class: Any = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    try:
        settings: Any = AutoConfig.from_pretrained(directory)
        if hasattr(settings, "time_step_limit"):
            limits = settings.time_step_limit
            settings.time_step_limit = UNLIMITED if limits is None else dt_limits(limits, "time_step_limit")
        loaded: Any = library_class.from_pretrained(
            directory, config=settings, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, missing, misshapen = loaded[0], loaded[1]["missing_keys"], loaded[1]["mismatched_keys"]
    except InputError as error:
        raise InputError(f"{config}: {error}") from None
    except Exception as error:  # a config of nonsense raises nearly anything
        raise InputError(f"transformers cannot read {name}: {one_line(error)}") from None
    if misshapen:  # which transformers draws at random, as it does those that are missing
        weight, stored, expected = min(misshapen)
        raise InputError(f"{name}: {weight} has shape {tuple(stored)}, config.json expects {tuple(expected)}")
    if missing:
        raise InputError(f"{name} lacks {counted(len(missing), 'weight')}, {min(missing)} among them")
    for weight, p in model.named_parameters():
        if computes_in(p) is not None and not bool(p.isfinite().all()):
            raise InputError(f"{name}: {weight} is not finite: it holds NaN or infinity")
    return model
