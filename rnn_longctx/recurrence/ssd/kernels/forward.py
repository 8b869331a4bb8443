"""The scan forward. The stream is cut into segments, walked side by side, chunk after chunk of Q tokens:

1. `segment_states`: what each segment alone adds to the state at its end. Walked backwards, and left as soon as what is
   still unread has decayed by exp(-HORIZON): heads that forget cost nearly nothing here.
2. `chunk_scan`: the state at the segment's beginning, by folding those from left to right, and the outputs
   (arXiv 2405.21060, section 6), with the state (P, N) held in registers.

Inside a chunk, with cum the running sum of log-decay, m half its total, o_t = exp(cum_t - m) and
z_s = scale_s exp(m - cum_s),

    y_t = o_t (exp(m) S C_t + sum_s z_s x_s G[s, t])         S <- exp(total - m) (exp(m) S + sum_s z_s x_s B_s^T)

so the heads of a group share G, and both sums take the same left factor. Where o or z would leave the range of the
inputs' type the segment is `wild`, and a second launch reads it, differences before exponentials. Offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.recurrence.ssd.kernels.launcher import Launched
from rnn_longctx.recurrence.ssd.kernels.prepare import add_product, product

HORIZON = tl.constexpr(40.0)  # nats: exp(-40) = 4e-18 is nothing beside float32's 6e-8


@triton.jit
def reach(A, table, h, H, low):
    """The log-decay beyond which a head's past is nothing. A head that may also grow has no such point."""
    rate = tl.load(A + h).to(tl.float32) * tl.load(table + h)
    only_forgets = (rate <= 0.0) & (tl.load(table + H + h) <= 0.0) & (low >= 0.0)
    return tl.where(only_forgets, -HORIZON, float("-inf"))


@triton.jit
def walk_back(x, B, drop, cum, scale, totals, sxt, sBt, row, chunk, count, horizon, p, n, P, N,
              Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr,
              FULL: tl.constexpr):  # fmt: skip
    """What the `count` full chunks before `chunk` add to the state there, (BP, BN), and their log-decay. x, B, drop: at
    the row's beginning. Left where what is still unread has decayed to nothing."""
    q = tl.arange(0, Q)
    S = tl.zeros((BP, BN), tl.float32)
    suffix = 0.0
    i = 0
    while (i < count) & (suffix > horizon):
        i += 1
        at = (row + chunk - i) * Q + q
        t = (chunk - i) * Q + q
        total = tl.load(totals + row + chunk - i)
        weight = tl.load(scale + at) * tl.exp((total - tl.load(cum + at)).to(tl.float32) + suffix)
        suffix += total.to(tl.float32)
        if HAS_DROP:
            document = tl.cumsum(tl.load(drop + t).to(tl.int32), 0)
            latest = tl.max(document, 0)
            weight = tl.where(document == latest, weight, 0.0)
            suffix = tl.where(latest > 0, float("-inf"), suffix)
        x_QP = tl.load(x + t[:, None] * sxt + p[None, :], mask=p[None, :] < P, other=0.0)
        B_QN = tl.load(B + t[:, None] * sBt + n[None, :], mask=n[None, :] < N, other=0.0)
        xw = (tl.trans(x_QP) * weight[None, :]).to(x_QP.dtype)
        S += product(xw, B_QN, FULL)
    return S, suffix


@Launched
@triton.jit
def segment_states(x, B, A, table, drop, cum, scale, totals, states, ends, caps, sxb, sxt, sxh, sBb, sBt, sBg, low,
                   T, H, P, N, G, chunks, segment_chunks, segments, offset,
                   Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr, HAS_CAPS: tl.constexpr,
                   FULL: tl.constexpr):  # fmt: skip
    """states (B,H,segments-1,P,N): what each segment but the last (they are full) adds; ends (B,H,segments-1): its
    log-decay. The first begins at chunk `offset`, below 0 if it is shorter. With caps (H): not of heads without one.
    Grid (segments - 1 or fewer, H, B * P / BP)."""
    segment, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_CAPS:  # noqa: SIM102 (a constant and a value)
        if tl.load(caps + h) == float("inf"):
            return
    blocks = tl.cdiv(P, BP)
    b, block = (tl.program_id(2) // blocks).to(tl.int64), tl.program_id(2) % blocks
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    stop = offset + (segment.to(tl.int64) + 1) * segment_chunks
    S, suffix = walk_back(
        x + b * sxb + h * sxh, B + b * sBb + (h // (H // G)) * sBg, drop + b * T, cum, scale, totals, sxt, sBt,
        (b * H + h) * chunks, stop, tl.minimum(stop, segment_chunks),
        reach(A, table, h, H, low), p, n, P, N, Q, BP, BN, HAS_DROP, FULL,
    )  # fmt: skip
    at = (b * H + h) * (segments - 1) + segment
    tl.store(states + at * P * N + p[:, None] * N + n[None, :], S, mask=(p[:, None] < P) & (n[None, :] < N))
    if block == 0:
        tl.store(ends + at, suffix)


@triton.jit
def first_state(initial, states, ends, row, segment, segments, p, n, P, N,
                FOLDED: tl.constexpr, ALONE: tl.constexpr = False):  # fmt: skip
    """The state (BP, BN) at the beginning of a segment: read, or folded here from what the segments before it add.
    ALONE: rows begin at zero."""
    inside = (p[:, None] < P) & (n[None, :] < N)
    here = p[:, None] * N + n[None, :]
    if FOLDED:
        at = segment + tl.zeros_like(here)
        S = tl.load(states + (row * (segments - 1) + segment - 1) * P * N + here, mask=inside & (at > 0), other=0.0)
        S += tl.load(initial + row * P * N + here, mask=inside & (at == 0), other=0.0)
    else:
        if ALONE:
            S = tl.zeros_like(here).to(tl.float32)
        else:
            S = tl.load(initial + row * P * N + here, mask=inside, other=0.0)
        for i in range(segment):
            at = row * (segments - 1) + i
            S = S * tl.exp(tl.load(ends + at)) + tl.load(states + at * P * N + here, mask=inside, other=0.0)
    return S


@triton.jit
def tile(source, stride_b, stride_t, stride_h, b, t0, h, column, T, columns, Q: tl.constexpr, W: tl.constexpr,
         TMA: tl.constexpr):  # fmt: skip
    """Q tokens of one head's (or group's) rows, W columns from `column` on; zeros beyond the array."""
    if TMA:
        values = source.load([b.to(tl.int32), t0, h.to(tl.int32), column]).reshape(Q, W)
    else:
        t, c = t0.to(tl.int64) + tl.arange(0, Q), column + tl.arange(0, W)
        at = b * stride_b + h * stride_h + t[:, None] * stride_t + c[None, :]
        values = tl.load(source + at, mask=(t < T)[:, None] & (c < columns)[None, :], other=0.0)
    return values


@Launched
@triton.jit
def chunk_scan(x, B, C, gram, y, z, A, table, cum, scale, totals, D, drop, initial, states, ends, final, wild, sums,
               weight, squares, low, sxb, sxt, sxh, sBb, sBt, sBg, sCb, sCt, sCg, syb, syt, syh, szb, szt, szh,
               sDh, sDp, T, H, P, N, G, chunks, segment_chunks, segments, parts, looks, look_chunks,
               Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_D: tl.constexpr, HAS_DROP: tl.constexpr,
               FULL: tl.constexpr, WILD: tl.constexpr, TMA: tl.constexpr, HAS_LOOK: tl.constexpr,
               HAS_GATE: tl.constexpr, STAGES: tl.constexpr, ALONE: tl.constexpr = False):  # fmt: skip
    """y (B,T,H,P) and final (B,H,P,N), of the segments that are wild or of those that are not, in `parts` each: where
    one head alone is wild, the device would wait for its few programs. ALONE: rows begin at zero and nothing follows
    them, initial and final are not touched. sums (3,B,H,looks,P): of the state after every `look_chunks` chunks. With a
    gate, y is what `Gate` says, of z (B,T,H,P) and weight (H,P), and squares are (B,T,H,ceil(P/BP))."""
    segment, h = tl.program_id(0) // parts, tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(P, BP)
    b, block = (tl.program_id(2) // blocks).to(tl.int64), tl.program_id(2) % blocks
    row = b * H + h
    if (tl.load(wild + row * segments + segment) != 0) != WILD:
        return
    q, p, n = tl.arange(0, Q), block * BP + tl.arange(0, BP), tl.arange(0, BN)
    g = h // (H // G)
    S = first_state(initial, states, ends, row, segment, segments, p, n, P, N, False, ALONE)
    if HAS_D:
        D_P = tl.load(D + h * sDh + p * sDp, mask=p < P, other=0.0).to(tl.float32)
    if HAS_GATE:
        weight_P = tl.load(weight + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    carry = 0.0  # S is still to be multiplied by exp(carry)
    first = segment * segment_chunks
    stop = tl.minimum(first + segment_chunks, chunks)
    if WILD:
        each = tl.cdiv(segment_chunks, parts)
        skipped = tl.minimum((tl.program_id(0) % parts) * each, stop - first)
        first += skipped
        stop = tl.minimum(first + each, stop)
        added, suffix = walk_back(
            x + b * sxb + h * sxh, B + b * sBb + g * sBg, drop + b * T, cum, scale, totals, sxt, sBt, row * chunks,
            row * 0 + first, skipped, reach(A, table, h, H, low), p, n, P, N, Q, BP, BN, HAS_DROP, FULL,
        )  # fmt: skip
        S = tl.where(suffix > float("-inf"), S * tl.exp(suffix), 0.0) + added
    for chunk in tl.range(first, stop, num_stages=STAGES):
        t0 = chunk * Q
        C_QN = tile(C, sCb, sCt, sCg, b, t0, g, 0, T, N, Q, BN, TMA)
        B_QN = tile(B, sBb, sBt, sBg, b, t0, g, 0, T, N, Q, BN, TMA)
        x_QP = tile(x, sxb, sxt, sxh, b, t0, h, block * BP, T, P, Q, BP, TMA)
        square = h * 0 + chunks * Q  # 64-bit
        G_QQ = tile(gram, square * G * Q, Q, square * Q, b, t0, g, 0, chunks * Q, Q, Q, Q, TMA)
        at = row * chunks + chunk
        total = tl.load(totals + at)
        c = tl.load(cum + at * Q + q)
        s = tl.load(scale + at * Q + q)
        middle = total if WILD else 0.5 * total
        # of a token into the state, which is handed on times exp(middle - total)
        into = s * tl.exp((middle - c).to(tl.float32))
        out = tl.exp((c if WILD else c - middle).to(tl.float32))
        Z = (tl.trans(x_QP) * into[None, :]).to(x_QP.dtype)
        Y = product(S.to(x_QP.dtype), tl.trans(C_QN), FULL)  # (P, Q): tokens along the columns
        middle = middle.to(tl.float32)
        if not WILD:
            Y = Y * tl.exp(carry) * tl.exp(middle)  # one after the other: exp of their sum may underflow
        S *= tl.exp(carry + middle)  # here it may: what is added is larger by as much
        carry = 0.0 if WILD else total.to(tl.float32) - middle
        if HAS_DROP:
            t = t0.to(tl.int64) + q
            document = tl.cumsum(tl.load(drop + b * T + t, mask=t < T, other=0).to(tl.int32), 0)
            latest = tl.max(document, 0)
            Y = tl.where((document == 0)[None, :], Y, 0.0)
            S = tl.where(latest > 0, 0.0, S)
        if WILD:
            decay = tl.where(q[:, None] <= q[None, :], (c[None, :] - c[:, None]).to(tl.float32), 0.0)
            weights = (G_QQ * tl.exp(decay) * s[:, None]).to(x_QP.dtype)
            Y = add_product(tl.trans(x_QP), weights, Y * out[None, :], FULL)
        else:
            Y = add_product(Z, G_QQ, Y, FULL) * out[None, :]
        if HAS_DROP:
            Z = tl.where((document == latest)[None, :], Z, 0.0)
        S = add_product(Z, B_QN, S, FULL)
        y_QP = tl.trans(Y)
        if HAS_D:
            y_QP += x_QP * D_P[None, :]
        if HAS_GATE:
            z_QP = tile(z, szb, szt, szh, b, t0, h, block * BP, T, P, Q, BP, TMA).to(tl.float32)
            root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * z_QP))  # of sigmoid(z), without a division
            y_QP *= z_QP * root * root
            t = t0.to(tl.int64) + q
            tl.store(squares + ((b * T + t) * H + h) * blocks + block, tl.sum(y_QP * y_QP, 1), mask=t < T)
            y_QP *= weight_P[None, :]
        if TMA:
            y.store([b.to(tl.int32), t0, h.to(tl.int32), block * BP], y_QP.to(x_QP.dtype).reshape(1, Q, 1, BP))
        else:
            t = t0.to(tl.int64) + q
            tl.store(y + b * syb + h * syh + t[:, None] * syt + p[None, :], y_QP.to(x_QP.dtype),
                     mask=(t < T)[:, None] & (p < P)[None, :])  # fmt: skip

        if HAS_LOOK:  # noqa: SIM102 (a constant and a value)
            if ((chunk + 1) % look_chunks == 0) & (t0 + Q <= T):
                # of each row of the state: the rest costs less outside than barriers here
                E = S * tl.exp(carry)
                here = (row * looks + (chunk + 1) // look_chunks - 1) * P + p
                apart = h * 0 + tl.num_programs(2) // blocks * H * looks * P  # 64-bit
                tl.store(sums + here, tl.sum(E, 1), mask=p < P)
                tl.store(sums + apart + here, tl.sum(E * E, 1), mask=p < P)
                tl.store(sums + 2 * apart + here, tl.max(tl.abs(E), 1), mask=p < P)

    if not ALONE and (stop == chunks) & (first < stop):
        S *= tl.exp(carry)
        inside = (p[:, None] < P) & (n[None, :] < N)
        tl.store(final + row * P * N + p[:, None] * N + n[None, :], S, mask=inside)
