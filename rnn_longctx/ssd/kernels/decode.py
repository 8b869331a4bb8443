"""One token of a layer between its two projections: convolution, gates, state, norm cap and output in one launch.

What depends on a row's position is worked out from a counter on the device, so that a launch can be replayed as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rnn_longctx.ssd.kernels.launcher import Launched
from rnn_longctx.ssd.kernels.prepare import FLOOR, step_size


@triton.jit
def _convolved(
    new, weight, bias, before, after, b, c, here, channels, keep, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """SiLU of the convolution at this token, of channels `c`; where `keep`, their inputs for the next are written."""
    value = tl.load(new + c, mask=here, other=0.0)
    total = value.to(tl.float32) * tl.load(weight + c * TAPS + TAPS - 1, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    at = (b * channels + c) * (TAPS - 1)
    for k in tl.static_range(TAPS - 1):
        old = tl.load(before + at + k, mask=here, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + c * TAPS + k, mask=here, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(after + at + k - 1, old, mask=here & keep)
    tl.store(after + at + TAPS - 2, value, mask=here & keep)
    return total * tl.sigmoid(total)


@Launched
@triton.jit
def _decode(projected, weight, bias, before, after, A, dt_bias, D, table, caps, position, S, log_decay, y,
            low, high, stride, H, P, N, G, every, restart,
            TAPS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
            HAS_DROP: tl.constexpr):  # fmt: skip
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    inner, channels, g = H * P, H * P + 2 * G * N, h // (H // G)
    row = projected + b * stride + inner  # after z
    x = _convolved(row, weight, bias, before, after, b, h * P + p, p < P, channels, p >= 0, TAPS, HAS_BIAS)
    own = n * 0 + h % (H // G) + block == 0  # of the programs that read a group's B and C, one keeps them
    B = _convolved(row, weight, bias, before, after, b, inner + g * N + n, n < N, channels, own, TAPS, HAS_BIAS)
    C = _convolved(row, weight, bias, before, after, b, inner + (G + g) * N + n, n < N, channels, own, TAPS, HAS_BIAS)

    dt = tl.load(row + channels + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
    dt = step_size(dt, low, high, True)
    keep = (dt < tl.load(table + 3 * H + h)) == 0
    decay = dt * tl.load(A + h).to(tl.float32) * tl.load(table + h) + tl.load(table + H + h)
    decay = tl.where(keep, tl.maximum(decay, FLOOR, propagate_nan=tl.PropagateNan.ALL), 0.0)
    scale = tl.where(keep, dt * tl.load(table + 2 * H + h), 0.0)
    read = tl.load(position + b)
    here = (p[:, None] < P) & (n[None, :] < N)
    at = ((b * H + h) * P + p[:, None]) * N + n[None, :]
    S_PN = tl.load(S + at, mask=here, other=0.0)
    if HAS_DROP:
        S_PN = tl.where((read > 0) & (read % restart == 0), 0.0, S_PN)
    S_PN = S_PN * tl.exp(decay) + (scale * x)[:, None] * B[None, :]
    if HAS_CAP:
        cap = tl.load(caps + h)
        norm = tl.sqrt(tl.sum(S_PN * S_PN))
        S_PN *= tl.where(((read + 1) % every == 0) & (norm > cap), cap / norm, 1.0)
    tl.store(S + at, S_PN, mask=here)
    out = tl.sum(S_PN * C[None, :], 1) + tl.load(D + h).to(tl.float32) * x
    tl.store(y + b * inner + h * P + p, out.to(y.dtype.element_ty), mask=p < P)
    if block == 0:
        total = log_decay + b * H + h
        tl.store(total, tl.load(total) + decay)


def decode(projected: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, after: Tensor, A: Tensor,
           dt_bias: Tensor, D: Tensor, table: Tensor, caps: Tensor | None, position: Tensor, S: Tensor,
           log_decay: Tensor, y: Tensor, groups: int, dt_limit: tuple[float, float], every: int,
           drop: int | None) -> None:  # fmt: skip
    """One token of every row.

    Args: projected (B, d_in_proj), as z, x, B, C, dt; weight (channels, taps); before, after (B, channels, taps - 1),
        not the same memory; position (B) int64 on the device, tokens read so far; S (B, H, P, N) float32, moved on;
        log_decay (B, H) float64, added to; y (B, H * P), written; caps (H), applied every `every` tokens; drop: tokens
        after which the state is dropped.
    """
    batch, heads, headdim, d_state = S.shape
    BN = max(16, triton.next_power_of_2(d_state))
    whole = max(16, triton.next_power_of_2(headdim))
    BP = whole if caps is not None else min(16, whole)  # a cap needs the norm of all of a head
    _decode[(heads, triton.cdiv(headdim, BP), batch)](
        projected, weight, weight if bias is None else bias, before, after, A, dt_bias, D, table,
        table if caps is None else caps, position, S, log_decay, y, float(dt_limit[0]), float(dt_limit[1]),
        projected.stride(0), heads, headdim, d_state, groups, every, drop or 1, TAPS=weight.shape[1], BP=BP, BN=BN,
        HAS_BIAS=bias is not None, HAS_CAP=caps is not None, HAS_DROP=drop is not None,
        num_warps=8 if BP * BN > 4096 else 4,
    )  # fmt: skip
