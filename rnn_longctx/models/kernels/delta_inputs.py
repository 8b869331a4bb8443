"""What a layer of the delta rule does between its products and its scan, one pass over memory each: convolutions with
queries and keys of length 1, gates of a head, decays of a channel. Nothing is kept for a gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnn_longctx.models.kernels.conv_norm import _before
from rnn_longctx.recurrence.ssd.kernels.launcher import Launched
from rnn_longctx.recurrence.ssd.kernels.prepare import step_size

CONV = (64, 256)  # tokens and channels of a program, a warp, as in `conv_norm`
TILE = (8, 256)  # tokens and channels of a program that works out decays
MOST_HEADS = 64  # whose gates one program makes
STEP = 64  # channels of the input at a time, for them


@triton.jit
def _silu_heads(total, factor, eps, UNIT: tl.constexpr):
    """SiLU of total (heads, channels), and with UNIT each head of it of length 1, times its factor."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * total))  # of sigmoid(total), without a division
    v = total * root * root
    if UNIT:
        v *= (tl.rsqrt(tl.sum(v * v, 1) + eps) * factor)[:, None]
    return v


@Launched
@triton.jit
def _conv_heads(
    x_ptr, weight_ptr, before_ptr, y_ptr, after_ptr, sxb, sxt, T, channels, start, heads, group, width, eps, scale,
    TAPS: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, HAS_BEFORE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU of `heads` heads of `width` channels, from channel `start` on. A program walks along the
    tokens of BH heads, as `conv_norm._conv_silu` does. With UNIT each head is brought to length 1. y: (parts, B, T,
    group, width), `heads` in parts of `group`; the first part times scale."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BT
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    e = tl.arange(0, BC)
    here = (h < heads)[:, None] & (e < width)[None, :]
    c = start + h[:, None] * width + e[None, :]
    x_ptr += b * sxb
    before_ptr += b * channels * (TAPS - 1)
    weight_ptr += (TAPS - 1) * channels + c
    w0 = tl.load(weight_ptr, mask=here, other=0.0).to(tl.float32)  # of the token itself
    w1, w2, w3 = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    if TAPS > 1:
        w1 = tl.load(weight_ptr - channels, mask=here, other=0.0).to(tl.float32)
    if TAPS > 2:
        w2 = tl.load(weight_ptr - 2 * channels, mask=here, other=0.0).to(tl.float32)
    if TAPS > 3:
        w3 = tl.load(weight_ptr - 3 * channels, mask=here, other=0.0).to(tl.float32)
    x3 = _before(x_ptr, before_ptr, first - 3, sxt, c, here, TAPS, HAS_BEFORE)
    x2 = _before(x_ptr, before_ptr, first - 2, sxt, c, here, TAPS, HAS_BEFORE)
    x1 = _before(x_ptr, before_ptr, first - 1, sxt, c, here, TAPS, HAS_BEFORE)
    factor = tl.where(h < group, scale, 1.0)
    part, size = (h // group).to(tl.int64), group * width
    y_ptr += (part * tl.num_programs(2) + b)[:, None] * T * size + (h % group)[:, None] * width + e[None, :]
    for t in range(first, first + BT, 4):  # four tokens are on their way at once: no load waits for a store before it
        u0 = tl.load(x_ptr + t * sxt + c, mask=here & (c * 0 + t < T), other=0.0).to(tl.float32)
        u1 = tl.load(x_ptr + (t + 1) * sxt + c, mask=here & (c * 0 + t + 1 < T), other=0.0).to(tl.float32)
        u2 = tl.load(x_ptr + (t + 2) * sxt + c, mask=here & (c * 0 + t + 2 < T), other=0.0).to(tl.float32)
        u3 = tl.load(x_ptr + (t + 3) * sxt + c, mask=here & (c * 0 + t + 3 < T), other=0.0).to(tl.float32)
        v = _silu_heads(w0 * u0 + w1 * x1 + w2 * x2 + w3 * x3, factor, eps, UNIT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + t * size, v, mask=here & (c * 0 + t < T))
        v = _silu_heads(w0 * u1 + w1 * u0 + w2 * x1 + w3 * x2, factor, eps, UNIT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (t + 1) * size, v, mask=here & (c * 0 + t + 1 < T))
        v = _silu_heads(w0 * u2 + w1 * u1 + w2 * u0 + w3 * x1, factor, eps, UNIT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (t + 2) * size, v, mask=here & (c * 0 + t + 2 < T))
        v = _silu_heads(w0 * u3 + w1 * u2 + w2 * u1 + w3 * u0, factor, eps, UNIT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (t + 3) * size, v, mask=here & (c * 0 + t + 3 < T))
        x3, x2, x1 = u1, u2, u3
    if tl.program_id(0) == tl.num_programs(0) - 1:  # the inputs that the next call's first tokens still need
        for k in tl.static_range(TAPS - 1):
            late = b * 0 + T - (TAPS - 1) + k
            last = _before(x_ptr, before_ptr, late, sxt, c, here, TAPS, HAS_BEFORE)
            at = (b * channels + c) * (TAPS - 1) + k
            tl.store(after_ptr + at, last.to(after_ptr.dtype.element_ty), mask=here)


def conv_heads(
    x: Tensor, weight: Tensor, before: Tensor | None, key_heads: int, d_state: int, headdim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a scan of the delta rule reads, contiguous, and the inputs (B, channels, taps - 1) to go on from.

        q, k, v = silu(conv(x)), cut into heads;    q / |q| / sqrt(N), k / |k|        |q| = sqrt(sum q^2 + eps)

    Args:
        x: (B, T, channels), any strides over B and T: the channels of queries, then those of keys, then of values.
        weight: (channels, 1, taps), at most 4 taps, without a bias.
        before: what the call before returned.
    Returns:
        q, k (B, T, G, N) and v (B, T, H, P).
    """
    batch, length, channels = x.shape
    keys, taps = key_heads * d_state, weight.shape[2]
    heads = (channels - 2 * keys) // headdim
    x = x if x.stride(2) == 1 else x.contiguous()
    q_k = torch.empty(2, batch, length, key_heads, d_state, dtype=x.dtype, device=x.device)
    v = torch.empty(batch, length, heads, headdim, dtype=x.dtype, device=x.device)
    after = torch.empty(batch, channels, taps - 1, dtype=x.dtype, device=x.device)
    taps_first, past = weight[:, 0].t().contiguous(), x if before is None else before.to(x.dtype).contiguous()

    def write(y: Tensor, start: int, count: int, group: int, width: int, unit: bool) -> None:
        BT, BC = CONV[0], triton.next_power_of_2(width)
        BH = max(1, CONV[1] // BC)
        sizes = (*x.stride()[:2], length, channels, start, count, group, width, eps, d_state**-0.5)
        tiles = {"TAPS": taps, "BT": BT, "BH": BH, "BC": BC, "HAS_BEFORE": before is not None, "UNIT": unit}
        grid = (triton.cdiv(length, BT), triton.cdiv(count, BH), batch)
        _conv_heads[grid](x, taps_first, past, y, after, *sizes, **tiles, num_warps=1)

    with torch.cuda.device_of(x):
        write(q_k, 0, 2 * key_heads, key_heads, d_state, True)
        write(v, 2 * keys, heads, heads, headdim, False)
    return q_k[0], q_k[1], v, after


@Launched
@triton.jit
def _head_gates(
    u_ptr, beta_weight_ptr, decay_weight_ptr, A_log_ptr, dt_bias_ptr, beta_ptr, log_decay_ptr, rows, dim, heads, most,
    BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, HAS_DECAY: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    h = tl.arange(0, BH)
    real, of_head = t < rows, h < heads
    b = tl.zeros((BT, BH), tl.float32)
    a = tl.zeros((BT, BH), tl.float32)
    for begin in range(0, dim, BK):
        e = begin + tl.arange(0, BK)
        u = tl.load(u_ptr + t[:, None] * dim + e[None, :], mask=real[:, None] & (e < dim)[None, :], other=0.0)
        at, inside = h[None, :] * dim + e[:, None], (e < dim)[:, None] & of_head[None, :]
        b = tl.dot(u, tl.load(beta_weight_ptr + at, mask=inside, other=0.0), b, input_precision="ieee")
        if HAS_DECAY:
            a = tl.dot(u, tl.load(decay_weight_ptr + at, mask=inside, other=0.0), a, input_precision="ieee")
    at, inside = t[:, None] * heads + h[None, :], real[:, None] & of_head[None, :]
    tl.store(beta_ptr + at, most * tl.sigmoid(b), mask=inside)
    if HAS_DECAY:
        rate = tl.exp(tl.load(A_log_ptr + h, mask=of_head, other=0.0).to(tl.float32))
        a += tl.load(dt_bias_ptr + h, mask=of_head, other=0.0).to(tl.float32)[None, :]
        tl.store(log_decay_ptr + at, -rate[None, :] * step_size(a, 0.0, float("inf"), True), mask=inside)


def head_gates(
    u: Tensor,
    beta_weight: Tensor,
    most: float,
    decay_weight: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gates of every head, (B, T, H) float32, products with their few columns included:

        beta = most * sigmoid(W_b u),    log_decay = -exp(A_log) * softplus(W_a u + dt_bias)

    Args:
        u: (B, T, d_model).
        beta_weight: (H, d_model) of u's type, H of at most MOST_HEADS.
        decay_weight, A_log, dt_bias: (H, d_model) of u's type, (H), (H); None gives no decays.
    """
    flat, heads = u.reshape(-1, u.shape[-1]).contiguous(), len(beta_weight)
    beta = torch.empty(*u.shape[:-1], heads, dtype=torch.float32, device=u.device)
    log_decay = None if decay_weight is None else torch.empty_like(beta)
    BH = max(16, triton.next_power_of_2(heads))
    BT = min(64, 2048 // BH)
    weights = (t if t is None else t.contiguous() for t in (beta_weight, decay_weight, A_log, dt_bias))
    arrays = [beta_weight if t is None else t for t in weights]
    outputs, sizes = (beta, beta if log_decay is None else log_decay), (*flat.shape, heads, float(most))
    tiles = {"BT": BT, "BH": BH, "BK": STEP, "HAS_DECAY": log_decay is not None}
    with torch.cuda.device_of(u):
        _head_gates[(triton.cdiv(len(flat), BT),)](
            flat, *arrays, *outputs, *sizes, **tiles, num_warps=4, num_stages=3 if BH < 64 else 2
        )
    return beta, log_decay


@Launched
@triton.jit
def _channel_decays(f_ptr, A_log_ptr, dt_bias_ptr, log_decay_ptr, rows, channels, width, bound,
                    BR: tl.constexpr, BC: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(channels, BC)
    program = tl.program_id(0)
    r = (program // blocks).to(tl.int64) * BR + tl.arange(0, BR)
    c = program % blocks * BC + tl.arange(0, BC)
    real = c < channels
    here, at = (r < rows)[:, None] & real[None, :], r[:, None] * channels + c[None, :]
    rate = tl.exp(tl.load(A_log_ptr + c // width, mask=real, other=0.0).to(tl.float32))[None, :]
    f = tl.load(f_ptr + at, mask=here, other=0.0).to(tl.float32)
    f += tl.load(dt_bias_ptr + c, mask=real, other=0.0).to(tl.float32)[None, :]
    if BOUNDED:
        log_decay = bound * tl.sigmoid(rate * f)
    else:
        log_decay = -rate * step_size(f, 0.0, float("inf"), True)
    tl.store(log_decay_ptr + at, log_decay, mask=here)


def channel_decays(f: Tensor, A_log: Tensor, dt_bias: Tensor, bound: float = 0.0) -> Tensor:
    """Return the log-decays of every channel, (B, T, H, N) float32, of f (B, T, H * N):

        -exp(A_log) * softplus(f + dt_bias),   or with a bound below 0:   bound * sigmoid(exp(A_log) * (f + dt_bias))

    A_log: (H); dt_bias: (H * N)."""
    heads, channels = len(A_log), f.shape[-1]
    flat = f.reshape(-1, channels).contiguous()
    log_decay = torch.empty(*f.shape[:-1], heads, channels // heads, dtype=torch.float32, device=f.device)
    BR, BC = TILE
    arrays, sizes = (flat, A_log.contiguous(), dt_bias.contiguous(), log_decay), (*flat.shape, channels // heads)
    with torch.cuda.device_of(f):
        _channel_decays[(triton.cdiv(len(flat), BR) * triton.cdiv(channels, BC),)](
            *arrays, *sizes, float(bound), BR=BR, BC=BC, BOUNDED=bound < 0
        )
    return log_decay
