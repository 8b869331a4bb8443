"""The weights of a checkpoint: read from its files, held against a model and a dtype.

Weights are memory-mapped and only copied where their dtype or device must change. Nothing that a file says is run.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rnn_longctx.devices import DTYPES, dtype_name
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.models.checkpoint.foreign import held_instead
from rnn_longctx.models.checkpoint.json_files import read_json
from rnn_longctx.models.lm import LM

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each whole, or in shards that <name>.index.json lists
# Rounded to 16 bits these change the decays over thousands of tokens, so mamba-ssm keeps them in float32.
_SENSITIVE = ("A_log", "D", "dt_bias", "bound")
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return every tensor by its official name, memory-mapped and as stored."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
        for name, tensor in read(path).items():
            if canonical(name) in tensors:
                raise InputError(f"{path}: {canonical(name)} is there twice, once as {name}")
            tensors[canonical(name)] = tensor
    return tensors


def canonical(name: str) -> str:
    """Return the official name of a tensor, without what wrappers (DDP, FSDP, torch.compile) put into their names."""
    name = ".".join(piece for piece in name.split(".") if piece not in _WRAPPERS)
    return name.replace("backbone.embeddings.", "backbone.embedding.", 1)


def fitting(stored: dict[str, Tensor], model: LM, source: str) -> dict[str, Tensor]:
    """Return the tensors that `model` has, each once. Raises InputError for any that does not fit."""
    expected = {k: v.shape for k, v in model.state_dict().items()}
    if model.config.tie_embeddings:
        head, embedding = stored.get("lm_head.weight"), stored.get("backbone.embedding.weight")
        if head is not None and embedding is not None:
            if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
                raise InputError(f"{source}: config.json ties lm_head.weight to the embedding, but they differ")
            stored = {k: v for k, v in stored.items() if k != "lm_head.weight"}
        del expected["lm_head.weight"]
    missing, unexpected = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    problems = [f"{what} {_some(n)}" for what, n in (("missing", missing), ("unexpected", unexpected)) if n]
    if problems:
        raise InputError(f"{source}: the weights do not fit config.json: {'; '.join(problems)}")
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            shapes = f"{tuple(tensor.shape)}, config.json expects {tuple(expected[name])}"
            raise InputError(f"{source}: {name} has shape {shapes}")
        if tensor.dtype not in DTYPES.values():
            kind = f"{dtype_name(tensor.dtype)}, expected one of {', '.join(DTYPES)}"
            raise InputError(f"{source}: {name} is {kind}")
    return stored


def check_finite(tensors: dict[str, Tensor], source: str) -> None:
    """Raise InputError if one holds NaN or infinity. Mapped weights are read in place, several tensors at a time."""

    def finite(name: str) -> bool:
        tensor = tensors[name].detach()
        return not tensor.numel() or all(bool(v.isfinite()) for v in tensor.aminmax())

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, fine in zip(tensors, pool.map(finite, tensors)):
            if not fine:
                raise InputError(f"{source}: {name} is not finite: it holds NaN or infinity")


def stored_state(model: LM, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights as a file of that dtype holds them, on the CPU, a tied one once."""
    state = {k: t.detach().to("cpu", stored_dtype(k, dtype)).contiguous() for k, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    return state


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type that a tensor has in a file whose weights are of a dtype."""
    return torch.promote_types(dtype, torch.float32) if name.rpartition(".")[2] in _SENSITIVE else dtype


def _weight_files(directory: Path) -> list[Path]:
    for name in WEIGHTS:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            table = read_json(index).get("weight_map")
            shards = list(dict.fromkeys(table.values())) if isinstance(table, dict) else []
            if not shards or not all(isinstance(s, str) and Path(s).name == s for s in shards):
                raise InputError(f"{index}: expected a weight_map of tensors to file names beside it")
            missing = [s for s in shards if not (directory / s).is_file()]
            if missing:
                raise InputError(f"missing shard {missing[0]}, one of the {len(shards)} that {index} lists")
            return [directory / s for s in shards]
    instead = held_instead(directory)
    hint = f"it {instead}" if instead else f"expected {' or '.join(WEIGHTS)}, or shards with <name>.index.json"
    raise InputError(f"{directory} holds config.json but no weights; {hint}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or cut short: {one_line(error)}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:  # files of before torch 1.6 are no zip archives and cannot be mapped
        with warnings.catch_warnings():  # what it says of odd pickles is told below
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for {code[1]}" if code else "damaged, or more than tensors"
        raise InputError(f"{path} is refused, nothing in it was run: {why}; expected plain tensors") from None
    except Exception as error:  # a damaged file raises nearly anything
        raise InputError(f"{path} is damaged or cut short: {one_line(error)}") from None
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        raise InputError(f"{path}: expected a table of tensors by name, got {type(data).__name__}")
    return data


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
