"""Gradients of the scan of heads of headdim 1 (`recurrence.ssd.kernels.channels`), the same in every run (no atomics).

1. `walk_back`, `chain_chunks`: the gradient of the state at each chunk's end, as the states were found, from the end.
2. `walk_chunks`: from the states at the chunks' beginnings, which the scan left, those before every TILE tokens, of a
   slab of chunks at a time, so that memory does not grow with the stream.
3. `tile_grads`: a program takes the tiles of its chunk from the last to the first, and walks their numbers n one after
   the other: of each, TILE tokens by BD channels, the states again, forward, and their gradients, backward, as two
   scans over the tokens in registers.

With b_t = dt_t x_t B_t, P_t = decay_t S_{t-1} what is left of the past at token t, and G_t the gradient of S_t,

    P_t = decay_t (P_{t-1} + b_{t-1})        G_t = C_t dy_t + decay_{t+1} G_{t+1}

the gradient of b_t is G_t and that of log_decay_t is G_t P_t: no difference of large numbers, whatever is forgotten.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.recurrence.ssd.kernels.channels import channel_block, channel_gates
from rnn_longctx.recurrence.ssd.kernels.launcher import Launched
from rnn_longctx.recurrence.ssd.kernels.prepare import step_size


@triton.jit
def then(decay, added, decay_after, added_after):
    """Two steps of S <- decay S + added as one."""
    return decay * decay_after, decay_after * added + added_after


@Launched
@triton.jit(do_not_specialize=["G"])
def walk_back(dt, C, dy, A, dt_bias, table, pad, drop, own, decays, low, high,
              sdb, sdt, sdh, sCb, sCt, sCg, T, H, G, chunks, size,
              N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
              HAS_PAD: tl.constexpr, HAS_DROP: tl.constexpr):  # fmt: skip
    """own (B,chunks,N,H): what a chunk's own outputs, dy (B,T,H), add to the gradient of the state before it; decays:
    its log-decay, as `walk_chunks` has it. Grid (chunks, G * blocks of BD channels, B)."""
    chunk, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, h, ok = channel_block(H, G, BD)
    n = tl.arange(0, BN)
    of_C = n < N
    bias, rate, _, add, _, least = channel_gates(A, dt_bias, table, h, n, ok, H, N, HAS_BIAS)
    begins = tl.load(pad + b) if HAS_PAD else 0
    dS = tl.zeros((BN, BD), tl.float32)
    taken, count = tl.zeros((BD,), tl.float64), tl.zeros((BD,), tl.float64)
    dropped = 0
    dt, C, dy = dt + b * sdb, C + b * sCb + g * sCg, dy + b * T * H
    first = chunk * size
    stop = tl.minimum(first + size, T)
    last = stop - 1
    dy_next = tl.load(dy + last * H + h, mask=ok, other=0.0)
    dt_next = tl.load(dt + last * sdt + h * sdh, mask=ok, other=0.0)
    C_next = tl.load(C + last * sCt + n, mask=of_C, other=0.0)
    for i in range(stop - first):
        t = last - i
        dy_D, raw, C_N = dy_next.to(tl.float32), dt_next.to(tl.float32) + bias, C_next.to(tl.float32)
        ahead = tl.maximum(t - 1, first)
        dy_next = tl.load(dy + ahead * H + h, mask=ok, other=0.0)
        dt_next = tl.load(dt + ahead * sdt + h * sdh, mask=ok, other=0.0)
        C_next = tl.load(C + ahead * sCt + n, mask=of_C, other=0.0)
        step = step_size(raw, low, high, SOFTPLUS)
        keep = ((step < least) == 0) & (t >= begins)
        step = tl.where(keep, step, 0.0)
        decay = tl.exp(rate * step[None, :] + tl.where(keep, add, 0.0)[None, :])
        dS = (dS + C_N[:, None] * dy_D[None, :]) * decay
        taken += step.to(tl.float64)
        count += keep.to(tl.float64)
        if HAS_DROP:
            mark = tl.load(drop + b * T + t).to(tl.int32)
            dS = tl.where(mark > 0, 0.0, dS)
            dropped = tl.maximum(dropped, mark)
    total = rate * taken.to(tl.float32)[None, :] + (add * count.to(tl.float32))[None, :]
    here, inside = ((b * chunks + chunk) * N + n[:, None]) * H + h[None, :], of_C[:, None] & ok[None, :]
    tl.store(own + here, dS, mask=inside)
    tl.store(decays + here, tl.where(dropped > 0, float("-inf"), total), mask=inside)


@triton.jit
def tile_steps(dt, bias, least, columns, ok, t, first, stop, begins, sdt, low, high, SOFTPLUS: tl.constexpr):
    """Return of tokens t and channels, (TILE, BD): dt with its bias, the step, clamped, and whether it is taken."""
    there = (t >= first) & (t < stop)
    raw = tl.load(dt + t[:, None] * sdt + columns[None, :], mask=there[:, None] & ok[None, :], other=0.0)
    raw = raw.to(tl.float32) + bias[None, :]
    step = step_size(raw, low, high, SOFTPLUS)
    return raw, step, ((step < least[None, :]) == 0) & (there & (t >= begins))[:, None]


@Launched
@triton.jit(do_not_specialize=["G"])
def tile_grads(x, dt, B, C, dy, D, A, dt_bias, table, pad, drop, tiles, grads, dx, ddt, dA, dB, dC, dD, dbias,
               low, high, sxb, sxt, sxh, sdb, sdt, sdh, sBb, sBt, sBg, sCb, sCt, sCg, T, H, G, chunks, size, slab,
               width, N: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, HAS_D: tl.constexpr,
               HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_PAD: tl.constexpr,
               HAS_DROP: tl.constexpr):  # fmt: skip
    """dx, ddt (B,T,H), and of the program's own tokens and channels alone dA (B,chunks,N,H), dB, dC (blocks of
    channels,B,T,G,N), dD, dbias (B,chunks,H). grads (B,chunks,N,H): the gradient of the state at a chunk's end becomes
    that of the state at its beginning. tiles: as `walk_chunks` left them. Grid (chunks of the slab, G * blocks, B)."""
    local, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    chunk = slab + local
    g, h, ok = channel_block(H, G, BD)
    block = (tl.program_id(1) % tl.cdiv(H // G, BD)).to(tl.int64)
    bias, _rate, mul, add, gain, least = channel_gates(A, dt_bias, table, h, tl.arange(0, 1), ok, H, N, HAS_BIAS)
    begins = tl.load(pad + b) if HAS_PAD else 0
    x, dt, B, C = x + b * sxb, dt + b * sdb, B + b * sBb + g * sBg, C + b * sCb + g * sCg
    first = chunk * size
    stop = tl.minimum(first + size, T)
    count = tl.cdiv(stop - first, TILE)
    q = tl.arange(0, TILE)
    sum_D, sum_bias = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    at_chunk = (b * chunks + chunk) * N * H + h
    for i in range(count):
        tile = count - 1 - i
        start = first + tile * TILE
        t = start + q
        here = t < stop
        of_x = here[:, None] & ok[None, :]
        late, early = q == TILE - 1, q == 0
        raw, clamped, keep = tile_steps(dt, bias, least, h * sdh, ok, t, first, stop, begins, sdt, low, high, SOFTPLUS)
        _raw, after, keep_after = tile_steps(
            dt, bias, least, h * sdh, ok, t + 1, first, stop, begins, sdt, low, high, SOFTPLUS
        )
        _raw, before, keep_before = tile_steps(
            dt, bias, least, h * sdh, ok, tl.where(early, -1, t - 1), first, stop, begins, sdt, low, high, SOFTPLUS
        )
        step, after = tl.where(keep, clamped, 0.0), tl.where(keep_after, after, 0.0)
        x_QD = tl.load(x + t[:, None] * sxt + h[None, :] * sxh, mask=of_x, other=0.0).to(tl.float32)
        dy_QD = tl.load(dy + (b * T + t)[:, None] * H + h[None, :], mask=of_x, other=0.0).to(tl.float32)
        later = here & (early == 0)  # of which the token before lies in the tile
        x_before = tl.load(x + (t - 1)[:, None] * sxt + h[None, :] * sxh, mask=later[:, None] & ok[None, :], other=0.0)
        xw = x_QD * step * gain[None, :]
        xw_before = x_before.to(tl.float32) * tl.where(keep_before, before, 0.0) * gain[None, :]
        if HAS_DROP:
            kept = tl.load(drop + b * T + t, mask=here, other=0) == 0
            kept_after = tl.load(drop + b * T + t + 1, mask=t + 1 < stop, other=0) == 0
        sum_decay, sum_scale = tl.zeros((TILE, BD), tl.float32), tl.zeros((TILE, BD), tl.float32)
        at_tile = (b * width + local * (size // TILE) + tile) * N * H + h
        for n in range(N):
            rate = tl.load(A + n * H + h, mask=ok, other=0.0).to(tl.float32) * mul
            B_Q = tl.load(B + start * sBt + n + q * sBt, mask=here, other=0.0).to(tl.float32)
            C_Q = tl.load(C + start * sCt + n + q * sCt, mask=here, other=0.0).to(tl.float32)
            B_before = tl.load(B + (start - 1) * sBt + n + q * sBt, mask=later, other=0.0).to(tl.float32)
            decay = tl.exp(step * rate[None, :] + tl.where(keep, add[None, :], 0.0))
            decay_after = tl.exp(after * rate[None, :] + tl.where(keep_after, add[None, :], 0.0))
            if HAS_DROP:
                decay = tl.where(kept[:, None], decay, 0.0)
                decay_after = tl.where(kept_after[:, None], decay_after, 0.0)
            S_D = tl.load(tiles + at_tile + n * H, mask=ok, other=0.0)
            dS_D = tl.load(grads + at_chunk + n * H, mask=ok, other=0.0)
            came = tl.where(early[:, None], S_D[None, :], xw_before * B_before[:, None])
            _p, P = tl.associative_scan((decay, decay * came), 0, then)
            asked = dy_QD * C_Q[:, None] + tl.where(late[:, None], dS_D[None, :], 0.0)
            _g, dS = tl.associative_scan((decay_after, asked), 0, then, reverse=True)
            of_decay = dS * P
            sum_decay += of_decay * rate[None, :]
            sum_scale += dS * B_Q[:, None]
            of_A = tl.sum(of_decay * step, 0) * mul
            if i > 0:
                of_A += tl.load(dA + at_chunk + n * H, mask=ok, other=0.0)
            tl.store(dA + at_chunk + n * H, of_A, mask=ok)
            first_grad = tl.sum(tl.where(early[:, None], dS * decay, 0.0), 0)
            tl.store(grads + at_chunk + n * H, first_grad, mask=ok)
            to = (((block * tl.num_programs(2) + b) * T + start) * G + g) * N + n
            tl.store(dB + to + q * (G * N), tl.sum(dS * xw, 1), mask=here)
            tl.store(dC + to + q * (G * N), tl.sum(dy_QD * (P + xw * B_Q[:, None]), 1), mask=here)
        to = (b * T + t)[:, None] * H + h[None, :]
        of_step = sum_decay + sum_scale * x_QD * gain[None, :]
        free = step_size(raw, float("-inf"), float("inf"), SOFTPLUS)
        of_step = tl.where(keep & (free >= low) & (free <= high), of_step, 0.0)
        if SOFTPLUS:
            of_step *= tl.sigmoid(raw)
        of_x_itself = sum_scale * step * gain[None, :]
        if HAS_D:
            of_x_itself += dy_QD * tl.load(D + h, mask=ok, other=0.0).to(tl.float32)[None, :]
        tl.store(dx + to, of_x_itself.to(dx.dtype.element_ty), mask=of_x)
        tl.store(ddt + to, of_step.to(ddt.dtype.element_ty), mask=of_x)
        sum_D += tl.sum(dy_QD * x_QD, 0)
        sum_bias += tl.sum(of_step, 0)
        tl.debug_barrier()  # the next tile loads what this one stored to grads and dA
    tl.store(dD + (b * chunks + chunk) * H + h, sum_D, mask=ok)
    tl.store(dbias + (b * chunks + chunk) * H + h, sum_bias, mask=ok)
