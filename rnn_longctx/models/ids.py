"""What a model is given to read, and what it must hold to read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnn_longctx.devices import dtype_name
from rnn_longctx.errors import InputError


def refuse_offloaded(weight: Tensor, name: str) -> Tensor:
    """Return the weight. Raises InputError where there are no numbers in it: our own models are read whole, on one
    device."""
    if weight.is_meta:
        raise InputError(
            f"the weights of {name} are offloaded, and this library's own models are read whole: load it anew"
        )
    return weight


def rows_of(ids: Any, expected: str = "a stream is read from token ids (B, T) or (T) of whole numbers") -> Tensor:
    """Return token ids as a tensor (B, T), int64, (T) as one row. Raises InputError for anything else."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":  # in any order of items and of bytes
        ids = np.ascontiguousarray(ids, dtype=np.int64)
    try:
        rows = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{expected}; got {type(ids).__name__} {ids!r:.60}") from None
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise InputError(f"{expected}; got shape {tuple(rows.shape)}")
    if rows.numel() and (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool):
        raise InputError(f"{expected}; got {dtype_name(rows.dtype)} of shape {tuple(rows.shape)}")
    return rows.long()
