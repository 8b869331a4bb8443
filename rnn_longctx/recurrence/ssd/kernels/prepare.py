"""What every head of a chunk shares, worked out once: gates and the inner products of C and B.

Beside x and y (2 * P numbers a token and head) this is little: two floats a token and head, Q numbers a token and
group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.recurrence.ssd.kernels.launcher import Launched

# Nats a token: exp(-25) = 1e-11 is nothing beside float32's 6e-8, and sums over a chunk, whose differences the weights
# are exponentials of, keep their digits. For float32 inputs the sums are float64.
FLOOR = tl.constexpr(-25.0)


@triton.jit
def product(a, b, FULL: tl.constexpr):
    """Matrix product with float32 sums; float32 operands keep (nearly) all their digits."""
    if FULL:
        return tl.dot(a, b, input_precision="tf32x3")
    return tl.dot(a, b)


@triton.jit
def add_product(a, b, c, FULL: tl.constexpr):
    if FULL:
        return tl.dot(a, b, c, input_precision="tf32x3")
    return tl.dot(a, b, c)


@triton.jit
def step_size(raw, low, high, SOFTPLUS: tl.constexpr):
    """clamp(softplus(raw), low, high), to full relative precision where it is tiny."""
    v = raw
    if SOFTPLUS:
        e = tl.exp(-tl.abs(v))
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
        v = tl.maximum(v, 0.0) + log1p
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)  # a NaN shows, it is not clamped away
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@Launched
@triton.jit
def prepare_chunk(dt, A, dt_bias, table, pad, B, C, drop, cum, scale, totals, spent, wild, gram, low, high, limit,
                  sdb, sdt, sdh, sBb, sBt, sBg, sCb, sCt, sCg, T, H, N, G, chunks, segment_chunks, segments,
                  Q: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
                  HAS_PAD: tl.constexpr, HAS_DROP: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """A chunk's gates and its gram. Grid (chunks, G + H / BH, B): the first G programs of a chunk work out gram."""
    chunk, part, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if part < G:
        chunk_gram(
            B, C, drop, gram, sBb, sBt, sBg, sCb, sCt, sCg, T, N, G, chunks, chunk, part, b, Q, BN, HAS_DROP, FULL
        )
    else:
        chunk_gates(dt, A, dt_bias, table, pad, cum, scale, totals, spent, wild, low, high, limit, sdb, sdt, sdh,
                    T, H, chunks, segment_chunks, segments, chunk, part - G, b, Q, BH, HAS_BIAS, SOFTPLUS,
                    HAS_PAD)  # fmt: skip


@triton.jit
def chunk_gates(dt, A, dt_bias, table, pad, cum, scale, totals, spent, wild, low, high, limit, sdb, sdt, sdh,
                T, H, chunks, segment_chunks, segments, chunk, part, b,
                Q: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
                HAS_PAD: tl.constexpr):  # fmt: skip
    """Of a chunk and BH heads: the running sum of log-decay and the input scale, (B,H,chunks,Q), the total
    (B,H,chunks), the same without FLOOR, and whether it forgets too much for `chunk_scan` (see there).

    table (4, H): the policy's mul, add, gain, min_dt. pad (B): leading tokens of a row to leave out.
    """
    h, q = part.to(tl.int64) * BH + tl.arange(0, BH), tl.arange(0, Q)
    ok = h < H
    t = chunk * Q + q
    real = t < T
    raw = tl.load(dt + b * sdb + t[None, :] * sdt + h[:, None] * sdh, mask=real[None, :] & ok[:, None], other=0.0)
    raw = raw.to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + h, mask=ok, other=0.0).to(tl.float32)[:, None]
    if HAS_PAD:
        real = real & (t >= tl.load(pad + b))
    rate = tl.load(A + h, mask=ok, other=0.0).to(tl.float32) * tl.load(table + h, mask=ok, other=0.0)
    add = tl.load(table + H + h, mask=ok, other=0.0)
    gain = tl.load(table + 2 * H + h, mask=ok, other=0.0)
    min_dt = tl.load(table + 3 * H + h, mask=ok, other=0.0)

    step = step_size(raw, low, high, SOFTPLUS)
    keep = real[None, :] & ((step < min_dt[:, None]) == 0)
    exact = tl.where(keep, step * rate[:, None] + add[:, None], 0.0)
    log_decay = tl.maximum(exact, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    sums = log_decay.to(cum.dtype.element_ty)
    c = tl.cumsum(sums, 1)
    total = tl.sum(sums, 1)
    at = (b * H + h) * chunks + chunk
    tl.store(cum + at[:, None] * Q + q[None, :], c, mask=ok[:, None])
    tl.store(scale + at[:, None] * Q + q[None, :], tl.where(keep, step * gain[:, None], 0.0), mask=ok[:, None])
    tl.store(totals + at, total, mask=ok)
    tl.store(spent + at, tl.sum(exact, 1), mask=ok)
    far = tl.max(tl.abs(c - 0.5 * total[:, None]), 1) > limit
    tl.atomic_max(wild + (b * H + h) * segments + chunk // segment_chunks, far.to(tl.int32), mask=ok & far)


@triton.jit
def chunk_gram(B, C, drop, gram, sBb, sBt, sBg, sCb, sCt, sCg, T, N, G, chunks, chunk, g, b,
               Q: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """gram (B,G,chunks,Q,Q): C_t . B_s at [s, t] where token t sees token s, otherwise 0."""
    q, n = tl.arange(0, Q), tl.arange(0, BN)
    t = chunk * Q + q
    inside = (t < T)[:, None] & (n < N)[None, :]
    B_QN = tl.load(B + b * sBb + g.to(tl.int64) * sBg + t[:, None] * sBt + n[None, :], mask=inside, other=0.0)
    C_QN = tl.load(C + b * sCb + g.to(tl.int64) * sCg + t[:, None] * sCt + n[None, :], mask=inside, other=0.0)
    seen = q[:, None] <= q[None, :]
    if HAS_DROP:
        document = tl.cumsum(tl.load(drop + b * T + t, mask=t < T, other=0).to(tl.int32), 0)
        seen = seen & (document[:, None] == document[None, :])
    inner = tl.where(seen, product(B_QN, tl.trans(C_QN), FULL), 0.0)
    at = ((b * G + g) * chunks + chunk) * Q
    tl.store(gram + (at + q)[:, None] * Q + q[None, :], inner.to(gram.dtype.element_ty))
