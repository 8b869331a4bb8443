"""One token of a layer from its first projection to its last norm: convolution, gates, state, norm cap, and output
times silu(z), in one launch.

What depends on a row's position is worked out from a counter on the device, so that a launch can be replayed as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rnn_longctx.recurrence.ssd.kernels.launcher import Launched
from rnn_longctx.recurrence.ssd.kernels.prepare import FLOOR, step_size

DEPENDENT = True  # a launch may begin before the one before it has ended (programmatic dependent launch)


def dependent(x: Tensor) -> dict[str, bool]:
    """Options of a launch. A dependent one reads what no launch just before it writes, and only then waits for them;
    every dependent launch waits, so that they still end in order. A launch without these options starts after them."""
    able = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if DEPENDENT and able else {"PDL": False}


@triton.jit
def _past(weight, bias, before, after, b, c, here, channels, keep, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What the tokens before this one add to the convolution of channels `c`; where `keep`, they are moved on by one
    for the next."""
    total = tl.zeros(c.shape, tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    at = (b * channels + c) * (TAPS - 1)
    for k in tl.static_range(TAPS - 1):
        old = tl.load(before + at + k, mask=here, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + c * TAPS + k, mask=here, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(after + at + k - 1, old, mask=here & keep)
    return total


@triton.jit
def _convolved(total, new, weight, after, b, c, here, channels, keep, TAPS: tl.constexpr):
    """SiLU of the convolution at this token, from `_past`; where `keep`, the token is kept for the next."""
    value = tl.load(new + c, mask=here, other=0.0)
    total += value.to(tl.float32) * tl.load(weight + c * TAPS + TAPS - 1, mask=here, other=0.0).to(tl.float32)
    if TAPS > 1:
        tl.store(after + (b * channels + c) * (TAPS - 1) + TAPS - 2, value, mask=here & keep)
    return total * tl.sigmoid(total)


@Launched
@triton.jit
def _decode(projected, weight, bias, before, after, A, dt_bias, D, table, caps, position, S, log_decay, y,
            low, high, stride, H, P, N, G, every, restart,
            TAPS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
            HAS_DROP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    inner, channels, g = H * P, H * P + 2 * G * N, h // (H // G)
    here = (p[:, None] < P) & (n[None, :] < N)
    at = ((b * H + h) * P + p[:, None]) * N + n[None, :]
    S_PN = tl.load(S + at, mask=here, other=0.0)
    own = n * 0 + h % (H // G) + block == 0  # of the programs that read a group's B and C, one keeps them
    cx, cB, cC = h * P + p, inner + g * N + n, inner + (G + g) * N + n
    x = _past(weight, bias, before, after, b, cx, p < P, channels, p >= 0, TAPS, HAS_BIAS)
    B = _past(weight, bias, before, after, b, cB, n < N, channels, own, TAPS, HAS_BIAS)
    C = _past(weight, bias, before, after, b, cC, n < N, channels, own, TAPS, HAS_BIAS)
    bias_h, A_h, D_h = tl.load(dt_bias + h).to(tl.float32), tl.load(A + h).to(tl.float32), tl.load(D + h).to(tl.float32)
    mul, add = tl.load(table + h), tl.load(table + H + h)
    gain, least = tl.load(table + 2 * H + h), tl.load(table + 3 * H + h)
    read = tl.load(position + b)
    if PDL:  # so far nothing was read or written that another launch of the same step touches
        gdc_wait()

    row = projected + b * stride + inner  # after z
    x = _convolved(x, row, weight, after, b, cx, p < P, channels, p >= 0, TAPS)
    B = _convolved(B, row, weight, after, b, cB, n < N, channels, own, TAPS)
    C = _convolved(C, row, weight, after, b, cC, n < N, channels, own, TAPS)

    dt = step_size(tl.load(row + channels + h).to(tl.float32) + bias_h, low, high, True)
    keep = (dt < least) == 0
    decay = tl.where(keep, tl.maximum(dt * A_h * mul + add, FLOOR, propagate_nan=tl.PropagateNan.ALL), 0.0)
    scale = tl.where(keep, dt * gain, 0.0)
    if HAS_DROP:
        S_PN = tl.where((read > 0) & (read % restart == 0), 0.0, S_PN)
    S_PN = S_PN * tl.exp(decay) + (scale * x)[:, None] * B[None, :]
    if HAS_CAP:
        cap = tl.load(caps + h)
        norm = tl.sqrt(tl.sum(S_PN * S_PN))
        S_PN *= tl.where(((read + 1) % every == 0) & (norm > cap), cap / norm, 1.0)
    tl.store(S + at, S_PN, mask=here)
    out = tl.sum(S_PN * C[None, :], 1) + D_h * x
    z = tl.load(projected + b * stride + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    out = out.to(projected.dtype.element_ty).to(tl.float32) * z * tl.sigmoid(z)
    tl.store(y + b * inner + h * P + p, out, mask=p < P)
    if block == 0:
        total = log_decay + b * H + h
        tl.store(total, tl.load(total) + decay)


class Weights(NamedTuple):
    """A layer's parameters, and its sizes."""

    conv: Tensor  # (channels, taps)
    bias: Tensor | None  # (channels)
    A: Tensor  # (H) float32
    dt_bias: Tensor  # (H)
    D: Tensor  # (H)
    groups: int
    dt_limit: tuple[float, float]


class Rules(NamedTuple):
    """A layer's policy."""

    table: Tensor  # (4, H): gates, see `Operands`
    caps: Tensor | None  # (H), applied every `every` tokens
    every: int
    drop: int | None  # tokens after which the state is dropped


class Memory(NamedTuple):
    """What a layer carries."""

    before: Tensor  # (B, channels, taps - 1)
    after: Tensor  # written: `before` of the next token, and not the same memory
    position: Tensor  # (B) int64 on the device, tokens read so far
    S: Tensor  # (B, H, P, N) float32, moved on
    log_decay: Tensor  # (B, H) float64, added to


def decode(projected: Tensor, weights: Weights, rules: Rules, memory: Memory, y: Tensor) -> None:
    """Read one token of every row.

    With `dependent` a launch that is not must stand between two that move the same state: the state is read ahead.

    Args:
        projected: (B, d_in_proj), as z, x, B, C, dt.
        y: (B, H * P) float32, written.
    """
    conv, bias, A, dt_bias, D, groups, (low, high) = weights
    (table, caps, every, drop), (before, after, position, S, log_decay) = rules, memory
    batch, heads, headdim, d_state = S.shape
    BN = max(16, triton.next_power_of_2(d_state))
    whole = max(16, triton.next_power_of_2(headdim))
    BP = whole if caps is not None else min(16, whole)  # a cap needs the norm of all of a head
    arrays = (projected, conv, conv if bias is None else bias, before, after, A, dt_bias, D, table)
    moved = (table if caps is None else caps, position, S, log_decay, y)
    sizes = (projected.stride(0), heads, headdim, d_state, groups, every, drop or 1)
    given = {"HAS_BIAS": bias is not None, "HAS_CAP": caps is not None, "HAS_DROP": drop is not None}
    options = {"TAPS": conv.shape[1], "BP": BP, "BN": BN, "num_warps": 8 if BP * BN > 4096 else 4}
    _decode[(heads, triton.cdiv(headdim, BP), batch)](
        *arrays, *moved, float(low), float(high), *sizes, **options, **given, **dependent(S)
    )
