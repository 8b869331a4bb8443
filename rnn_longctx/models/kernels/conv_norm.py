"""What stands around the scan in a layer, one pass over memory each: convolution with SiLU, and the norms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnn_longctx.models.deferred import DeferredNorm
from rnn_longctx.recurrence.ssd.kernels.launcher import Launched

CONV = (64, 256)  # tokens and channels of a program, a warp


@triton.jit
def _before(x, before, u, sxt, c, here, TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr):
    """Inputs of token u (it may lie before the first, then they are in `before`), float32."""
    at = u + c * 0  # of every channel
    row = tl.load(x + u * sxt + c, mask=here & (at >= 0), other=0.0)
    if HAS_BEFORE:
        row += tl.load(before + c * (TAPS - 1) + at + TAPS - 1, mask=here & (at < 0) & (at > -TAPS), other=0.0)
    return row.to(tl.float32)


@Launched
@triton.jit
def _conv_silu(x, weight, bias, before, y, after, sxb, sxt, T, channels,
               TAPS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr,
               HAS_BEFORE: tl.constexpr):  # fmt: skip
    """A program walks along the tokens of its channels and reads each input once: the last three stay in registers. Of
    tiles of tokens and channels, every input was read four times, and instructions took twice the memory's time."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BT
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    here = c < channels
    x += b * sxb
    before += b * channels * (TAPS - 1)
    rest = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        rest += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    weight += (TAPS - 1) * channels + c
    w0 = tl.load(weight, mask=here, other=0.0).to(tl.float32)  # of the token itself
    w1, w2, w3 = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    if TAPS > 1:
        w1 = tl.load(weight - channels, mask=here, other=0.0).to(tl.float32)
    if TAPS > 2:
        w2 = tl.load(weight - 2 * channels, mask=here, other=0.0).to(tl.float32)
    if TAPS > 3:
        w3 = tl.load(weight - 3 * channels, mask=here, other=0.0).to(tl.float32)
    x3 = _before(x, before, first - 3, sxt, c, here, TAPS, HAS_BEFORE)
    x2 = _before(x, before, first - 2, sxt, c, here, TAPS, HAS_BEFORE)
    x1 = _before(x, before, first - 1, sxt, c, here, TAPS, HAS_BEFORE)
    x += first * sxt
    y += (b * T + first) * channels
    for start in range(0, BT, 4):
        for k in tl.static_range(4):
            inside = here & (c * 0 + first + start + k < T)
            x0 = tl.load(x + (start + k) * sxt + c, mask=inside, other=0.0).to(tl.float32)
            total = rest + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * total))  # of sigmoid(total), without a division
            tl.store(y + (start + k) * channels + c, (total * root * root).to(y.dtype.element_ty), mask=inside)
            x3, x2, x1 = x2, x1, x0
    if tl.program_id(0) == tl.num_programs(0) - 1:  # the inputs that the next call's first tokens still need
        x -= first * sxt
        for k in tl.static_range(TAPS - 1):
            late = b * 0 + T - (TAPS - 1) + k
            last = _before(x, before, late, sxt, c, here, TAPS, HAS_BEFORE)
            tl.store(after + (b * channels + c) * (TAPS - 1) + k, last.to(after.dtype.element_ty), mask=here)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (B,T,channels) with any strides over B and T, weight (channels, 1, taps) of at most 4 taps, before
    (B,channels,taps-1). Returns (B,T,channels) and the inputs (B,channels,taps-1) to go on from."""
    batch, length, channels = x.shape
    taps = weight.shape[2]
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    after = torch.empty(batch, channels, taps - 1, dtype=x.dtype, device=x.device)
    BT, BC = CONV
    biases, past = weight if bias is None else bias, x if before is None else before.to(x.dtype)
    arrays, sizes = (x, weight[:, 0].t().contiguous(), biases, past, y, after), (*x.stride()[:2], length, channels)
    given = {"HAS_BIAS": bias is not None, "HAS_BEFORE": before is not None}
    with torch.cuda.device_of(x):
        _conv_silu[(triton.cdiv(length, BT), triton.cdiv(channels, BC), batch)](
            *arrays, *sizes, TAPS=taps, BT=BT, BC=BC, **given, num_warps=1
        )
    return y, after


@Launched
@triton.jit
def _norm(x, add, squares, gate, weight, total, y, sx, sa, sg, width, eps, parts, add_width, add_eps,
          BLOCK: tl.constexpr, HAS_ADD: tl.constexpr, PARTS: tl.constexpr, HAS_GATE: tl.constexpr):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.arange(0, BLOCK)
    here, at = e < width, group * width + e
    v = tl.load(x + row * sx + at, mask=here, other=0.0).to(tl.float32)
    if HAS_ADD:
        more = tl.load(add + row * sa + at, mask=here, other=0.0).to(tl.float32)
        if PARTS > 0:
            part = tl.arange(0, PARTS)
            square = tl.sum(tl.load(squares + row * parts + part, mask=part < parts, other=0.0), 0)
            more *= tl.rsqrt(square / add_width + add_eps)
        v += more
        tl.store(total + row * sx + at, v.to(total.dtype.element_ty), mask=here)
    if HAS_GATE:
        z = tl.load(gate + row * sg + at, mask=here, other=0.0).to(tl.float32)
        v *= z * tl.sigmoid(z)
    v *= tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    v *= tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row * tl.num_programs(1) * width + at, v.to(y.dtype.element_ty), mask=here)


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    groups: int = 1,
    gate: Tensor | None = None,
    add: Tensor | DeferredNorm | None = None,
    dtype: torch.dtype | None = None,
    total: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (..., dim) (+ add) (* silu(gate)), over each of `groups` equal parts, times weight; in `dtype`, or
    x's. Returns it and x + add (in type `total`, or x's; x itself without add)."""
    shape, width = x.shape, x.shape[-1] // groups
    flat = x.contiguous().reshape(-1, shape[-1])
    squares, parts, PARTS, add_width, add_eps = weight, 0, 0, 1, 0.0
    if isinstance(add, DeferredNorm):
        add, squares, add_width, add_eps = add
        parts = squares.shape[-1]
        PARTS, squares = triton.next_power_of_2(parts), squares.contiguous()
    added, gates = (weight[None] if t is None else t.reshape(-1, shape[-1]) for t in (add, gate))
    y = torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
    after = x if add is None else torch.empty(shape, dtype=total or x.dtype, device=x.device)
    BLOCK = triton.next_power_of_2(width)
    arrays = (flat, added, squares, gates, weight, after, y)
    numbers = (flat.stride(0), added.stride(0), gates.stride(0), width, eps, parts, add_width, add_eps)
    given, warps = {"HAS_ADD": add is not None, "HAS_GATE": gate is not None}, min(8, max(1, BLOCK // 256))
    with torch.cuda.device_of(x):
        _norm[(flat.shape[0], groups)](*arrays, *numbers, BLOCK=BLOCK, PARTS=PARTS, **given, num_warps=warps)
    return y, after
