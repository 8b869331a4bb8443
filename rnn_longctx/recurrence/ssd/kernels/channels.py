"""The scan of heads of headdim 1 whose states decay number by number (Mamba-1), forward.

    S_t[n] = exp(dt_t A[n]) S_{t-1}[n] + dt_t x_t B_t[n]        y_t = sum_n S_t[n] C_t[n] + D x_t

There is no matrix product here: with a decay a number, no two numbers of a state share anything but x, dt, B and C. So
a program takes a row, BD channels and a chunk of tokens, and reads these in order, the states (BN, BD) in registers: a
thread holds a channel, and the sum over n stays inside it. Where rows and channels alone would leave most of the device
idle there are several chunks:

1. `walk_chunks`, FROM_ZERO: the state that each chunk alone leaves, and its log-decay.
2. `chain_chunks`: from those the state at each chunk's beginning.
3. `walk_chunks`: the outputs, from there.

Inside the kernels states are (N, H), so that neighbours in memory are neighbours among threads. Offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.recurrence.ssd.kernels.launcher import Launched
from rnn_longctx.recurrence.ssd.kernels.prepare import step_size


@triton.jit
def channel_block(H, G, BD: tl.constexpr):
    """Return a program's group of channels (those that share B and C), its channels (BD), and which of them exist.

    Kernels are not compiled for one G: for G = 1 Triton would see that channels begin at multiples of BD, read four of
    them a thread, spread n over four threads, and move all numbers between threads at every token."""
    size = H // G
    blocks = tl.cdiv(size, BD)
    g, block = (tl.program_id(1) // blocks).to(tl.int64), tl.program_id(1) % blocks
    d = block * BD + tl.arange(0, BD)
    return g, g * size + d, d < size


@triton.jit
def channel_gates(A, dt_bias, table, h, n, ok, H, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return what a program's channels add to dt (BD), the factor of dt in a log-decay (BN, BD), and the policy's mul,
    add, gain and min_dt (BD)."""
    bias = tl.zeros(h.shape, tl.float32)
    if HAS_BIAS:
        bias += tl.load(dt_bias + h, mask=ok, other=0.0).to(tl.float32)
    mul, add = tl.load(table + h, mask=ok, other=0.0), tl.load(table + H + h, mask=ok, other=0.0)
    gain, least = tl.load(table + 2 * H + h, mask=ok, other=0.0), tl.load(table + 3 * H + h, mask=ok, other=0.0)
    inside = ok[None, :] & (n[:, None] < N)
    rate = tl.load(A + n[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32) * mul[None, :]
    return bias, rate, mul, add, gain, least


@Launched
@triton.jit(do_not_specialize=["G"])
def walk_chunks(x, dt, B, C, D, A, dt_bias, table, pad, drop, states, own, decays, y, final, steps, tiles, low, high,
                sxb, sxt, sxh, sdb, sdt, sdh, sBb, sBt, sBg, sCb, sCt, sCg, T, H, G, chunks, size, slab, width,
                N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, HAS_D: tl.constexpr,
                HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_PAD: tl.constexpr, HAS_DROP: tl.constexpr,
                FROM_ZERO: tl.constexpr, READS: tl.constexpr):  # fmt: skip
    """A chunk of `size` tokens from chunk `slab` on, by one of three ways. Grid (chunks, G * blocks of BD channels, B).

    FROM_ZERO: own (B,chunks,N,H), the state that the chunk leaves from zero; decays, alike: its log-decay, -inf where
        the state is dropped in it.
    READS: y (B,T,H), final (B,N,H) and steps (2,B,chunks,H) float64: of a chunk's last document the sum of its steps
        and the number of tokens that are not left out.
    else: tiles (B,width,N,H), the state before every TILE tokens.

    states (B,chunks,N,H): at the beginning of chunks. pad (B): leading tokens of a row to leave out. drop (B,T): 1
    where the state is dropped before the token, 2 where a document begins too.
    """
    local, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    chunk = slab + local
    g, h, ok = channel_block(H, G, BD)
    n = tl.arange(0, BN)
    of_B = n < N
    inside = of_B[:, None] & ok[None, :]
    bias, rate, _, add, gain, least = channel_gates(A, dt_bias, table, h, n, ok, H, N, HAS_BIAS)
    here = ((b * chunks + chunk) * N + n[:, None]) * H + h[None, :]
    if FROM_ZERO:
        S = tl.zeros((BN, BD), tl.float32)
    else:
        S = tl.load(states + here, mask=inside, other=0.0)
    if READS:
        D_D = tl.zeros((BD,), tl.float32)
        if HAS_D:
            D_D += tl.load(D + h, mask=ok, other=0.0).to(tl.float32)
    begins = tl.load(pad + b) if HAS_PAD else 0  # the row's first token
    taken, count = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    dropped = 0
    x, dt, B, C = x + b * sxb, dt + b * sdb, B + b * sBb + g * sBg, C + b * sCb + g * sCg
    first = chunk * size
    stop = tl.minimum(first + size, T)
    x_next = tl.load(x + first * sxt + h * sxh, mask=ok, other=0.0)
    dt_next = tl.load(dt + first * sdt + h * sdh, mask=ok, other=0.0)
    B_next = tl.load(B + first * sBt + n, mask=of_B, other=0.0)
    C_next = tl.load(C + first * sCt + n, mask=of_B, other=0.0)
    for t in range(first, stop):
        x_D, raw = x_next.to(tl.float32), dt_next.to(tl.float32) + bias
        B_N, C_N = B_next.to(tl.float32), C_next.to(tl.float32)
        ahead = tl.minimum(t + 1, stop - 1)  # the next token is asked for while this one is worked on
        x_next = tl.load(x + ahead * sxt + h * sxh, mask=ok, other=0.0)
        dt_next = tl.load(dt + ahead * sdt + h * sdh, mask=ok, other=0.0)
        B_next = tl.load(B + ahead * sBt + n, mask=of_B, other=0.0)
        C_next = tl.load(C + ahead * sCt + n, mask=of_B, other=0.0)
        step = step_size(raw, low, high, SOFTPLUS)
        keep = ((step < least) == 0) & (t >= begins)
        step = tl.where(keep, step, 0.0)
        if HAS_DROP:
            mark = tl.load(drop + b * T + t).to(tl.int32)
            S = tl.where(mark > 0, 0.0, S)
            dropped = tl.maximum(dropped, mark)
            if READS:
                taken, count = tl.where(mark > 1, 0.0, taken), tl.where(mark > 1, 0.0, count)
        if not (FROM_ZERO or READS):  # noqa: SIM102 (a constant and a value)
            if (t - first) % TILE == 0:
                tile = b * width + local * (size // TILE) + (t - first) // TILE
                tl.store(tiles + (tile * N + n[:, None]) * H + h[None, :], S, mask=inside)
        decay = tl.exp(rate * step[None, :] + tl.where(keep, add, 0.0)[None, :])
        S = S * decay + B_N[:, None] * (step * gain * x_D)[None, :]
        taken += step.to(tl.float64)
        count += keep.to(tl.float64)
        if READS:
            out = tl.sum(S * C_N[:, None], 0) + D_D * x_D
            tl.store(y + (b * T + t) * H + h, out.to(y.dtype.element_ty), mask=ok)
    if FROM_ZERO:
        total = rate * taken.to(tl.float32)[None, :] + (add * count.to(tl.float32))[None, :]
        tl.store(own + here, S, mask=inside)
        tl.store(decays + here, tl.where(dropped > 0, float("-inf"), total), mask=inside)
    if READS:
        at = (b * chunks + chunk) * H + h
        tl.store(steps + at, taken, mask=ok)
        tl.store(steps + tl.num_programs(2).to(tl.int64) * chunks * H + at, count, mask=ok)
        if chunk == chunks - 1:
            tl.store(final + (b * N + n[:, None]) * H + h[None, :], S, mask=inside)


@Launched
@triton.jit
def chain_chunks(states, own, decays, chunks, NH, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """states (B,chunks,N,H): of the first chunk given, of the others filled in: the state at a chunk's beginning.
    BACK: of the last chunk given, and the gradients of the states at the chunks' ends. Grid (B, N * H / BLOCK)."""
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = e < NH
    at = (tl.program_id(0).to(tl.int64) * chunks + (chunks - 1 if BACK else 0)) * NH + e
    step = -NH if BACK else NH
    S = tl.load(states + at, mask=ok, other=0.0)
    for _ in range(chunks - 1):
        decay = tl.load(decays + at, mask=ok, other=0.0)
        S = tl.where(decay == float("-inf"), 0.0, S * tl.exp(decay)) + tl.load(own + at, mask=ok, other=0.0)
        at += step
        tl.store(states + at, S, mask=ok)
