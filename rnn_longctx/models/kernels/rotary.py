"""Rotary positions in one pass over memory: PyTorch's form of it (`rnn_longctx.models.rotary`) takes a dozen."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # angles of a program, which turns all heads of its tokens by them


@triton.jit
def _turned(
    x, places, rates, y, length, heads, half, sxb, sxt, sxh, spb, sign, BT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.arange(0, BLOCK)
    here = (t < length)[:, None] & (c < half)[None, :]
    place = tl.load(places + b * spb + t, mask=t < length, other=0).to(tl.float64)
    turns = place[:, None] * tl.load(rates + c, mask=c < half, other=0.0)[None, :]  # whole ones change nothing
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32) * sign
    cos, sin = tl.cos(angle), tl.sin(angle)
    source = x + b * sxb + t[:, None] * sxt + c[None, :]
    target = y + ((b * length + t) * heads * 2 * half)[:, None] + c[None, :]
    for head in range(heads):
        first = tl.load(source + head * sxh, mask=here, other=0.0).to(tl.float32)
        second = tl.load(source + head * sxh + half, mask=here, other=0.0).to(tl.float32)
        at = target + head * 2 * half
        tl.store(at, (first * cos - second * sin).to(y.dtype.element_ty), mask=here)
        tl.store(at + half, (first * sin + second * cos).to(y.dtype.element_ty), mask=here)


class Turned(torch.autograd.Function):
    """`apply(x, places, rates, sign)` is x (B, T, H, D), contiguous, turned by sign * rates * places; its gradient is
    turned back. rates: (D / 2) float64, of a whole turn a token; places: (T) or (B, T)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, rates: Tensor, sign: float) -> Tensor:
        ctx.save_for_backward(places, rates)
        ctx.sign = sign
        batch, length, heads, width = x.shape
        x = x if x.stride(3) == 1 else x.contiguous()
        places = places.expand(batch, length)
        places = places if places.stride(1) == 1 else places.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        BLOCK = triton.next_power_of_2(width // 2)
        BT = max(1, ELEMENTS // BLOCK)
        with torch.cuda.device_of(x):
            _turned[(triton.cdiv(length, BT), batch)](
                x, places, rates, y, length, heads, width // 2, *x.stride()[:3], places.stride(0), sign,
                BT=BT, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        places, rates = ctx.saved_tensors
        return Turned.apply(gradients[0], places, rates, -ctx.sign), None, None, None
