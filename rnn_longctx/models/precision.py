"""What a model computes in (the type of its weights, unless a global switch of torch changes its numbers), and what
its states are kept in."""

from __future__ import annotations

from typing import Any

import torch

from rnn_longctx.devices import DTYPES, dtype_name
from rnn_longctx.errors import InputError, nearest


def computes_as(model: Any) -> str:
    """Return what rows, saved states and calibrations are told apart by: "float32", "bfloat16 autocast" of float32
    weights, "float32 with tf32 products" where those of float32 matrices are rounded.

    Convolutions of cuDNN are left out: it rounds them to TF32 unless it is told not to, and hardly any is called.
    """
    kind, weights = model.device.type, dtype_name(model.dtype)
    if torch.is_autocast_enabled(kind):
        cast = dtype_name(torch.get_autocast_dtype(kind))
        return f"{cast} autocast" + ("" if weights == "float32" else f" of {weights}")
    products = _products(kind)
    return weights if weights != "float32" or products is None else f"{weights} with {products} products"


def _products(kind: str) -> str | None:
    """What products of float32 matrices are rounded to on a kind of device, None for nothing.

    torch.get_float32_matmul_precision raises where the newer switches (torch 2.9) were used, so those are asked."""
    backend: Any = torch.backends.cuda.matmul if kind == "cuda" else torch.backends.mkldnn
    if kind == "cuda" and not hasattr(backend, "fp32_precision"):
        return "tf32" if backend.allow_tf32 else None
    places = (backend if kind == "cuda" else getattr(backend, "matmul", None), torch.backends)
    settings = (getattr(place, "fp32_precision", "none") for place in places)
    precision = next((p for p in settings if p != "none"), "ieee")
    return None if precision == "ieee" else precision


def state_dtype(requested: torch.dtype | str | None, dtype: torch.dtype) -> torch.dtype | None:
    """What `use_state_dtype` asks for in a model of `dtype`; None where the scan's states are of that type anyway."""
    if requested is None:
        return None
    name = dtype_name(requested)
    if name not in DTYPES:
        raise InputError(f"a state is kept in {', '.join(DTYPES)}, not in {name!r}{nearest(name, DTYPES)}")
    chosen = DTYPES[name]
    return None if chosen == (torch.float64 if dtype == torch.float64 else torch.float32) else chosen
