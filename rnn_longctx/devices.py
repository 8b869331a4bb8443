"""Devices and types by the names that a person gives them."""

from __future__ import annotations

import torch

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError, nearest, one_line
from rnn_longctx.ranks import local_rank, rank, world

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return "float32" of torch.float32, and of its text "torch.float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """Return one of `DTYPES` by its name, or as it is. Raises InputError for another."""
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}{nearest(name, DTYPES)}")
    return DTYPES[name]


def device_of(name: torch.device | str) -> torch.device:
    """Return the device of a name; "auto" is a CUDA device where there is one, else the CPU.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(name)!r} is not available here: {one_line(error)}") from None


def device_name(device: torch.device) -> str:
    """Return what results call a device: the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_of_rank(name: str) -> str:
    """Return the device of this process among several (`rnn_longctx.ranks`): "auto" and "cuda" are a GPU of its own,
    which is made the current one; a CPU they share.

    Raises:
        InputError: another device, which all would share, or fewer GPUs than processes.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda for {world()} ranks, got {name!r}")
    if name == "cpu" or not torch.cuda.is_available():
        return "cuda" if name == "cuda" else "cpu"
    if local_rank() >= torch.cuda.device_count():
        gpus = counted(torch.cuda.device_count(), "GPU")
        raise InputError(f"device: rank {rank()} has no GPU of its own, here {gpus}: begin as many ranks as GPUs")
    torch.cuda.set_device(local_rank())
    return f"cuda:{local_rank()}"
