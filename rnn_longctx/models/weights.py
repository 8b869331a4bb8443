"""Weights of another library's model: their hash, and the type they compute in."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def hash_of(module: nn.Module) -> str:
    """First 16 hex digits of a sha256 over each tensor's name, dtype, shape and bytes, or, of one made of others
    (quantised weights), theirs in turn. What a state_dict holds beside tensors does not count."""
    found = hashlib.sha256()
    for name, t in sorted(module.state_dict().items()):
        if isinstance(t, Tensor):
            _digest(found, name, t)
    return found.hexdigest()[:16]


def _digest(found: Any, name: str, t: Tensor) -> None:
    found.update(f"{name} {t.dtype} {list(t.shape)}".encode())
    if hasattr(t, "__tensor_flatten__"):
        for part in t.__tensor_flatten__()[0]:
            _digest(found, f"{name}.{part}", getattr(t, part))
    else:
        raw = t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        found.update(memoryview(raw))  # type: ignore[arg-type]


def computes_in(weight: Any) -> torch.dtype | None:
    """The type of a weight, or None where that is how it is packed (bytes, 8-bit floats) or there is none."""
    dtype = getattr(weight, "dtype", None)
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) else None
