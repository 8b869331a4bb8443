"""Norms of single heads, one pass over memory each: of keys and queries, and of outputs with their gate behind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a program


@triton.jit
def _head_norm(
    x, weight, gate, y, length, heads, width, sxb, sxt, share, eps, scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens. y = x / sqrt(share * sum x^2 + eps) * scale (* weight) (* what is made of gate).

    (A program for rows that are heads of tokens would divide 64-bit numbers, row by row: more work than the norm.)"""
    program = tl.program_id(0)
    head, block, blocks = program % heads, program // heads, tl.cdiv(length, ROWS)
    row, t = (block // blocks).to(tl.int64), block % blocks * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK)
    here = (t < length)[:, None] & (e < width)[None, :]
    read = row * sxb + t.to(tl.int64)[:, None] * sxt + head * width + e[None, :]
    at = (row * length + t)[:, None] * (heads * width) + head * width + e[None, :]
    v = tl.load(x + read, mask=here, other=0.0).to(tl.float32)
    v *= (tl.rsqrt(tl.sum(v * v, 1) * share + eps) * scale)[:, None]
    if HAS_WEIGHT:
        v *= tl.load(weight + e, mask=e < width, other=0.0).to(tl.float32)[None, :]
    if GATE > 0:
        z = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
        v *= tl.sigmoid(z) if GATE == 2 else z * tl.sigmoid(z)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=here)


def head_norm(
    x: Tensor,
    *,
    share: float,
    eps: float,
    scale: float = 1.0,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    sigmoid: bool = False,
) -> Tensor:
    """Return (B, T, H, P), contiguous: x / sqrt(share * sum over P of x^2 + eps) * scale (* weight) (* a gate).

    Args:
        x: (B, T, H, P), any strides over B and T.
        weight: (P).
        gate: (B, T, H * P), of which the silu is taken, or the sigmoid.
    """
    batch, length, heads, width = x.shape
    if x.stride()[2:] != (width, 1):
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gates = x if gate is None else gate.contiguous()
    BLOCK = triton.next_power_of_2(width)
    ROWS = max(1, ELEMENTS // BLOCK)
    with torch.cuda.device_of(x):
        _head_norm[(batch * triton.cdiv(length, ROWS) * heads,)](
            x, x if weight is None else weight, gates, y, length, heads, width, *x.stride()[:2], share, eps, scale,
            ROWS=ROWS, BLOCK=BLOCK, HAS_WEIGHT=weight is not None,
            GATE=0 if gate is None else 2 if sigmoid else 1, num_warps=4,
        )  # fmt: skip
    return y
