"""A norm and the projection after it for the few rows of a decode step, in one launch: a matrix-vector product.

Such a step waits: for its weights, and for one launch after another. So every program finds the norm of the whole input
again, which is cheaper than a launch, and asks for all its weights at once, before the input is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rnn_longctx.recurrence.ssd.kernels.decode import dependent
from rnn_longctx.recurrence.ssd.kernels.launcher import Launched

MOST = 4  # rows of the input; with more of them a matrix product is faster
BYTES = 2**15  # of weights a program reads
SHARE = 256  # of them a thread


@Launched
@triton.jit
def _norm_linear(x, add, norm, weight, bias, total, y, sx, sa, dim, outs, eps,
                 BATCH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    program, e = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    r = program * ROWS + tl.arange(0, ROWS)
    inside, here = r < outs, e < dim
    W = tl.load(
        (weight + r * dim)[:, None] + e[None, :],
        mask=inside[:, None] & here[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    scale = tl.load(norm + e, mask=here, other=0.0).to(tl.float32)
    start = tl.zeros((ROWS,), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + r, mask=inside, other=0.0).to(tl.float32)
    if PDL:  # so far nothing that an earlier launch writes was read, and nothing was written
        gdc_wait()
    width = dim // GROUPS
    for b in range(BATCH):
        v = tl.load(x + b * sx + e, mask=here, other=0.0).to(tl.float32)
        if HAS_ADD:
            v += tl.load(add + b * sa + e, mask=here, other=0.0).to(tl.float32)
            if program == 0:  # and elsewhere than in x, which the others may not have read yet
                tl.store(total + b * dim + e, v.to(total.dtype.element_ty), mask=here)
        if GROUPS == 1:
            v *= tl.rsqrt(tl.sum(v * v, 0) / width + eps)
        else:
            parts = tl.zeros((BLOCK,), tl.float32)
            for g in tl.static_range(GROUPS):
                own = (e >= g * width) & (e < (g + 1) * width)
                parts += tl.where(own, tl.rsqrt(tl.sum(tl.where(own, v * v, 0.0), 0) / width + eps), 0.0)
            v *= parts
        v = (v * scale).to(W.dtype).to(tl.float32)  # rounded as for a launch of its own
        product = tl.sum(W.to(tl.float32) * v[None, :], 1) + start
        tl.store(y + b * outs + r, product.to(y.dtype.element_ty), mask=inside)


def norm_linear(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    groups: int = 1,
    add: Tensor | None = None,
    total: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (B, I) (+ add), over each of `groups` equal parts, times scale (I); times weight (O, I), plus bias
    (O). Returns it, (B, O) in the weight's type, and x + add (in type `total`, or x's; x itself without add). For a B
    of up to MOST."""
    batch, dim = x.shape
    outs, size = weight.shape[0], weight.element_size()
    BLOCK = triton.next_power_of_2(dim)
    ROWS = rows_of(BLOCK, size)
    y = torch.empty(batch, outs, dtype=weight.dtype, device=x.device)
    after, added = (x, x) if add is None else (torch.empty(x.shape, dtype=total or x.dtype, device=x.device), add)
    arrays = (x, added, scale, weight, scale if bias is None else bias, after, y)
    sizes, tiles = (x.stride(0), added.stride(0), dim, outs), {"ROWS": ROWS, "BLOCK": BLOCK}
    options = {"BATCH": batch, "GROUPS": groups, "HAS_ADD": add is not None, "HAS_BIAS": bias is not None}
    warps = warps_of(ROWS, BLOCK, size)
    with torch.cuda.device_of(x):
        _norm_linear[(triton.cdiv(outs, ROWS),)](
            *arrays, *sizes, eps, **tiles, **options, **dependent(x), num_warps=warps
        )
    return y, after


def rows_of(block: int, size: int) -> int:
    """Rows of weights of `size` bytes, `block` numbers each, that a program holds."""
    return min(32, max(2, BYTES // (block * size)))


def warps_of(rows: int, block: int, size: int) -> int:
    """To hold them, and at most 16 numbers of the input a thread."""
    return min(16, max(1, rows * block * size // (32 * SHARE), block // 512))
