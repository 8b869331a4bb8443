"""What a gated MLP does between its two products, one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnn_longctx.recurrence.ssd.kernels.launcher import Launched

TILE = (8, 256)  # tokens and channels of a program


@Launched
@triton.jit
def _swiglu(gate_up_ptr, y_ptr, rows, width, BR: tl.constexpr, BC: tl.constexpr):
    blocks = tl.cdiv(width, BC)
    program = tl.program_id(0)
    r = (program // blocks).to(tl.int64) * BR + tl.arange(0, BR)
    c = program % blocks * BC + tl.arange(0, BC)
    here = (r < rows)[:, None] & (c < width)[None, :]
    at = r[:, None] * (2 * width) + c[None, :]
    gate = tl.load(gate_up_ptr + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=here, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + r[:, None] * width + c[None, :], y.to(y_ptr.dtype.element_ty), mask=here)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, (..., width), of gate_up (..., 2 * width), the gates before what they gate."""
    width = gate_up.shape[-1] // 2
    flat = gate_up.contiguous().view(-1, 2 * width)
    y = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    BR, BC = TILE
    with torch.cuda.device_of(gate_up):
        _swiglu[(triton.cdiv(len(flat), BR) * triton.cdiv(width, BC),)](flat, y, len(flat), width, BR=BR, BC=BC)
    return y
