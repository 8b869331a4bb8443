"""The convolution and the norms of `rnn_longctx.models.kernels.conv_norm` with gradients: one kernel each way.

What a backward kernel needs besides the inputs it makes again, so that nothing is kept but those, in their own type.
Gradients of weights are summed by each program over its own tokens and then over programs, in float32 and always in the
same order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn_longctx.models.kernels import conv_norm
from rnn_longctx.models.kernels.conv_norm import _before
from rnn_longctx.recurrence.ssd.kernels.launcher import Launched

CONV = (128, 128)  # tokens and channels of a program, a warp
ROWS = 32  # that a program norms, one after the other


@Launched
@triton.jit
def _conv_silu_backward(x, weight, bias, before, dy, dx, dbefore, sums, sxb, sxt, syb, syt, T, channels,
                        TAPS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr,
                        HAS_BEFORE: tl.constexpr):  # fmt: skip
    """A program walks along its tokens, and three beyond: a token's gradient needs those of the three after it. d is
    what comes back to the sum under the SiLU."""
    b = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    first = part * BT
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    here = c < channels
    x += b * sxb
    dy += b * syb + c
    dx += b * T * channels + c
    before += b * channels * (TAPS - 1)
    dbefore += (b * channels + c) * (TAPS - 1)
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
    g0, g1, g2, g3, gb = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    d1, d2, d3 = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    x3 = _before(x, before, first - 3, sxt, c, here, TAPS, HAS_BEFORE)
    x2 = _before(x, before, first - 2, sxt, c, here, TAPS, HAS_BEFORE)
    x1 = _before(x, before, first - 1, sxt, c, here, TAPS, HAS_BEFORE)
    for step in range(BT + TAPS - 1):
        t = first + step
        inside = here & (c * 0 + t < T)
        x0 = tl.load(x + t * sxt + c, mask=inside, other=0.0).to(tl.float32)
        total = rest + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        s = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * total))
        d0 = tl.load(dy + t * syt, mask=inside, other=0.0).to(tl.float32) * s * (1.0 + total * (1.0 - s))
        own = tl.where(step < BT, d0, 0.0)  # the tokens beyond are another program's
        gb += own
        g0 += own * x0
        g1 += own * x1
        g2 += own * x2
        g3 += own * x3
        if TAPS == 1:
            made = w0 * d0
        elif TAPS == 2:
            made = w0 * d1 + w1 * d0
        elif TAPS == 3:
            made = w0 * d2 + w1 * d1 + w2 * d0
        else:
            made = w0 * d3 + w1 * d2 + w2 * d1 + w3 * d0
        u = t - (TAPS - 1)  # whose gradient this is
        mine = here & (c * 0 + step >= TAPS - 1) & (c * 0 + u < T)
        tl.store(dx + u * channels, made.to(dx.dtype.element_ty), mask=mine)
        if HAS_BEFORE:
            early = here & (c * 0 + u < 0)
            tl.store(dbefore + u + TAPS - 1, made.to(dbefore.dtype.element_ty), mask=early)
        x3, x2, x1 = x2, x1, x0
        d3, d2, d1 = d2, d1, d0
    sums += (b * tl.num_programs(0) + part) * (TAPS + 1) * channels + c
    tl.store(sums + TAPS * channels, gb, mask=here)
    tl.store(sums + (TAPS - 1) * channels, g0, mask=here)
    if TAPS > 1:
        tl.store(sums + (TAPS - 2) * channels, g1, mask=here)
    if TAPS > 2:
        tl.store(sums + (TAPS - 3) * channels, g2, mask=here)
    if TAPS > 3:
        tl.store(sums, g3, mask=here)


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, before)
        ctx.set_materialize_grads(False)
        return conv_norm.conv_silu(x, weight, bias, before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dafter: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, before = ctx.saved_tensors
        batch, length, channels = x.shape
        edge = weight.shape[2] - 1
        x = x if x.stride(2) == 1 else x.contiguous()
        dy = x.new_zeros(x.shape) if dy is None else dy
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        BT, BC = CONV
        parts = triton.cdiv(length, BT)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dbefore = None if before is None else before.new_zeros(before.shape)
        sums = torch.empty(batch, parts, edge + 2, channels, dtype=torch.float32, device=x.device)
        biases, past = weight if bias is None else bias, x if before is None else before.to(x.dtype).contiguous()
        inputs = (x, weight[:, 0].t().contiguous(), biases, past, dy)
        grads = (dx, dx if dbefore is None else dbefore, sums)
        given = {"HAS_BIAS": bias is not None, "HAS_BEFORE": before is not None}
        sizes, tiles = (*x.stride()[:2], *dy.stride()[:2], length, channels), {"TAPS": edge + 1, "BT": BT, "BC": BC}
        with torch.cuda.device_of(x):
            _conv_silu_backward[(parts, triton.cdiv(channels, BC), batch)](
                *inputs, *grads, *sizes, **tiles, **given, num_warps=1
            )
        if dafter is not None and edge:  # the last inputs of what came before and x, in this order
            kept = min(length, edge)
            dx[:, length - kept :] += dafter[..., edge - kept :].transpose(1, 2)
            if dbefore is not None and length < edge:
                dbefore[..., length:] += dafter[..., : edge - length]
        total = sums.sum((0, 1))
        dweight = total[: edge + 1].t()[:, None].to(weight.dtype)
        return dx, dweight, None if bias is None else total[edge + 1].to(bias.dtype), dbefore


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """`conv_norm.conv_silu` with gradients of all four, and through both that it returns. weight (channels, 1,
    taps)."""
    made: tuple[Tensor, Tensor] = _ConvSilu.apply(x, weight, bias, before)
    return made


@Launched
@triton.jit
def _norm_backward(x, gate, weight, dy, dtotal, dx, dadd, dgate, sums, rows, dim, width, eps, sx, sg, sy, st,
                   BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_ADD: tl.constexpr,
                   HAS_GATE: tl.constexpr):  # fmt: skip
    part, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.arange(0, BLOCK)
    here, at = e < width, group * width + e
    w = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(part * ROWS, tl.minimum((part + 1) * ROWS, rows)):
        v = tl.load(x + row * sx + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(dy + row * sy + at, mask=here, other=0.0).to(tl.float32)
        if HAS_GATE:
            z = tl.load(gate + row * sg + at, mask=here, other=0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))
            plain = v
            v *= z * s
        scale = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
        n = v * scale
        dw += g * n
        g *= w
        d = scale * (g - n * (tl.sum(g * n, 0) / width))
        if HAS_GATE:
            dz = d * plain * s * (1.0 + z * (1.0 - s))
            tl.store(dgate + row * dim + at, dz.to(dgate.dtype.element_ty), mask=here)
            d *= z * s
        if HAS_TOTAL:
            d += tl.load(dtotal + row * st + at, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * dim + at, d.to(dx.dtype.element_ty), mask=here)
        if HAS_ADD:
            tl.store(dadd + row * dim + at, d.to(dadd.dtype.element_ty), mask=here)
    tl.store(sums + part * dim + at, dw, mask=here)


class _Norm(torch.autograd.Function):
    """Keeps the sum alone, which the next block's norm keeps anyway, or x and the gate."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        add: Tensor | None,
        eps: float,
        groups: int,
        dtype: torch.dtype | None,
        total: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, after = conv_norm.norm(x, weight, eps, groups, gate, add, dtype, total)
        ctx.save_for_backward(after, weight, gate)
        ctx.eps, ctx.groups, ctx.types = eps, groups, (x.dtype, None if add is None else add.dtype)
        ctx.set_materialize_grads(False)
        return y, None if add is None else after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        dim, (own, added) = x.shape[-1], ctx.types
        dy = torch.zeros_like(x) if dy is None else dy
        flat, gates, grads, totals = (weight[None] if t is None else t.reshape(-1, dim) for t in (x, gate, dy, dtotal))
        flat, grads, totals = (t if t.stride(1) == 1 else t.contiguous() for t in (flat, grads, totals))
        rows, width = flat.shape[0], dim // ctx.groups
        parts = triton.cdiv(rows, ROWS)
        dx = torch.empty(x.shape, dtype=own, device=x.device)
        apart = added not in (None, own)  # else one tensor is the gradient of both
        dadd = torch.empty(x.shape, dtype=added, device=x.device) if apart else dx
        dgate = None if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
        sums = torch.empty(parts, dim, dtype=torch.float32, device=x.device)
        BLOCK = triton.next_power_of_2(width)
        arrays = (flat, gates, weight, grads, totals, dx, dadd, dx if dgate is None else dgate, sums)
        strides = (flat.stride(0), gates.stride(0), grads.stride(0), totals.stride(0))
        given = {"HAS_TOTAL": dtotal is not None, "HAS_ADD": apart, "HAS_GATE": gate is not None}
        tiles = {"BLOCK": BLOCK, "ROWS": ROWS, "num_warps": min(8, max(1, BLOCK // 256))}
        with torch.cuda.device_of(x):
            _norm_backward[(parts, ctx.groups)](*arrays, rows, dim, width, ctx.eps, *strides, **tiles, **given)
        dweight = sums.sum(0).to(weight.dtype)
        return dx, dweight, dgate, None if added is None else dadd, None, None, None, None


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    groups: int = 1,
    gate: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
    total: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`conv_norm.norm` with gradients of x, weight, gate and add, and through both that it returns."""
    y, after = _Norm.apply(x, weight, gate, add, eps, groups, dtype, total)
    return y, x if add is None else after
