"""Gradients of the scan, recomputed instead of stored, and the same in every run (no atomics).

1. `segment_states` (forward.py), `fold_states`: the state at the beginning of each segment of a few chunks.
2. `segment_grads`, `fold_grads`: the gradient of the state at the end of each, the same thing run backwards.
3. `chunk_states`, `chunk_state_grads`: from those the state before each chunk and the gradient of that after it, in the
   inputs' type, of a slab of segments at a time, so that memory does not grow with the stream.
4. `output_grads`, `input_grads`: a chunk then depends on no other. A program takes one and walks its heads, which
   share B, C and gram. Two kernels, because the sums of both do not fit into one's registers.
5. `gate_grads`: from the gradients of log-decay and input scale to those of dt, A and dt_bias.

With L[s, t] = exp(cum_t - cum_s), M[s, t] = scale_s L G x_s . dy_t, and S, dS the state before and its gradient after a
chunk, d cum_t gets what output t weighs less what input t weighs, and d log_decay_t is the sum of d cum from t on. The
sums run over one chunk only, so that no rounding of far tokens enters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.ssd.kernels.forward import first_state, reach
from rnn_longctx.ssd.kernels.prepare import add_product, product, step_size


@triton.jit
def fold_states(initial, states, ends, segments, PN, BLOCK: tl.constexpr):
    """states[..., i] becomes the state at the end of segment i, in place. Grid (B * H, P * N / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    S = tl.load(initial + row * PN + e, mask=e < PN, other=0.0)
    for i in range(segments - 1):
        at = row * (segments - 1) + i
        S = S * tl.exp(tl.load(ends + at)) + tl.load(states + at * PN + e, mask=e < PN, other=0.0)
        tl.store(states + at * PN + e, S, mask=e < PN)


@triton.jit
def segment_grads(dy, C, A, table, drop, cum, totals, grads, ends, sdyb, sdyt, sdyh, sCb, sCt, sCg, low,
                  T, H, P, N, G, chunks, segment_chunks, segments,
                  Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr,
                  FULL: tl.constexpr):  # fmt: skip
    """grads (B,H,segments,P,N): what a segment's own outputs add to the gradient of the state before it; ends
    (B,H,segments): its log-decay. Grid (segments, H, B * P / BP)."""
    segment, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(P, BP)
    b, block = (tl.program_id(2) // blocks).to(tl.int64), tl.program_id(2) % blocks
    q, p, n = tl.arange(0, Q), block * BP + tl.arange(0, BP), tl.arange(0, BN)
    horizon = reach(A, table, h, H, low)
    row = (b * H + h) * chunks
    dy += b * sdyb + h * sdyh
    C += b * sCb + (h // (H // G)) * sCg

    dS = tl.zeros((BP, BN), tl.float32)
    prefix = 0.0
    chunk = segment.to(tl.int64) * segment_chunks
    stop = tl.minimum(chunk + segment_chunks, chunks)
    while (chunk < stop) & (prefix > horizon):
        t = chunk * Q + q
        here = (t < T)[:, None]
        weight = tl.exp(tl.load(cum + (row + chunk) * Q + q).to(tl.float32) + prefix)
        prefix += tl.load(totals + row + chunk).to(tl.float32)
        if HAS_DROP:
            document = tl.cumsum(tl.load(drop + b * T + t, mask=t < T, other=0).to(tl.int32), 0)
            weight = tl.where(document == 0, weight, 0.0)
            prefix = tl.where(tl.max(document, 0) > 0, float("-inf"), prefix)
        dy_QP = tl.load(dy + t[:, None] * sdyt + p[None, :], mask=here & (p[None, :] < P), other=0.0)
        C_QN = tl.load(C + t[:, None] * sCt + n[None, :], mask=here & (n[None, :] < N), other=0.0)
        dyw = (tl.trans(dy_QP) * weight[None, :]).to(C_QN.dtype)
        dS += product(dyw, C_QN, FULL)
        chunk += 1

    at = (b * H + h) * segments + segment
    tl.store(grads + at * P * N + p[:, None] * N + n[None, :], dS, mask=(p[:, None] < P) & (n[None, :] < N))
    if block == 0:
        tl.store(ends + at, prefix)


@triton.jit
def fold_grads(final, grads, ends, initial, segments, PN, BLOCK: tl.constexpr):
    """grads[..., i] becomes the gradient of the state at the end of segment i, in place; initial that of the first
    state. Grid (B * H, P * N / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dS = tl.load(final + row * PN + e, mask=e < PN, other=0.0)
    for j in range(segments):
        at = row * segments + segments - 1 - j
        own = tl.load(grads + at * PN + e, mask=e < PN, other=0.0)
        tl.store(grads + at * PN + e, dS, mask=e < PN)
        dS = dS * tl.exp(tl.load(ends + at)) + own
    tl.store(initial + row * PN + e, dS, mask=e < PN)


@triton.jit
def chunk_states(x, B, drop, cum, scale, totals, initial, states, out, sxb, sxt, sxh, sBb, sBt, sBg,
                 T, H, P, N, G, chunks, segment_chunks, segments, slab, width,
                 Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr,
                 FULL: tl.constexpr):  # fmt: skip
    """out (B,H,P/BP,width,BP,BN): the state before each of `width` chunks from segment `slab` on. `states` are folded.
    Grid (segments of the slab, H, B * P / BP)."""
    segment, h = slab + tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(P, BP)
    b, block = (tl.program_id(2) // blocks).to(tl.int64), tl.program_id(2) % blocks
    q, p, n = tl.arange(0, Q), block * BP + tl.arange(0, BP), tl.arange(0, BN)
    row = b * H + h
    x += b * sxb + h * sxh
    B += b * sBb + (h // (H // G)) * sBg
    out += (row * blocks + block) * width * BP * BN + tl.arange(0, BP)[:, None] * BN + n[None, :]
    S = first_state(initial, states, states, row, segment, segments, p, n, P, N, True)
    first = segment * segment_chunks
    for chunk in tl.range(first, tl.minimum(first + segment_chunks, chunks), num_stages=2):
        tl.store(out + (h * 0 + chunk - slab * segment_chunks) * BP * BN, S.to(out.dtype.element_ty))
        t = (h * 0 + chunk) * Q + q  # 64-bit
        here = t < T
        at = (row * chunks + chunk) * Q + q
        total = tl.load(totals + row * chunks + chunk)
        into = tl.load(scale + at) * tl.exp((total - tl.load(cum + at)).to(tl.float32))
        if HAS_DROP:
            document = tl.cumsum(tl.load(drop + b * T + t, mask=here, other=0).to(tl.int32), 0)
            latest = tl.max(document, 0)
            into = tl.where(document == latest, into, 0.0)
            S = tl.where(latest > 0, 0.0, S)
        x_QP = tl.load(x + t[:, None] * sxt + p[None, :], mask=here[:, None] & (p[None, :] < P), other=0.0)
        B_QN = tl.load(B + t[:, None] * sBt + n[None, :], mask=here[:, None] & (n[None, :] < N), other=0.0)
        xw = (tl.trans(x_QP) * into[None, :]).to(x_QP.dtype)
        S = add_product(xw, B_QN, S * tl.exp(total.to(tl.float32)), FULL)


@triton.jit
def chunk_state_grads(dy, C, drop, cum, totals, grads, at_chunks, out, dtotal, sdyb, sdyt, sdyh, sCb, sCt, sCg,
                      T, H, P, N, G, chunks, segment_chunks, segments, slab, width,
                      Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr,
                      FULL: tl.constexpr):  # fmt: skip
    """out as at_chunks, which `chunk_states` made: the gradient of the state after each chunk; dtotal (P/BP,B,H,chunks):
    that of the chunk's log-decay by the state before it. `grads` are folded. Same grid."""
    segment, h = slab + tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(P, BP)
    b, block = (tl.program_id(2) // blocks).to(tl.int64), tl.program_id(2) % blocks
    q, p, n = tl.arange(0, Q), block * BP + tl.arange(0, BP), tl.arange(0, BN)
    row = b * H + h
    dy += b * sdyb + h * sdyh
    C += b * sCb + (h // (H // G)) * sCg
    square = (row * blocks + block) * width * BP * BN + tl.arange(0, BP)[:, None] * BN + n[None, :]
    inside = (p[:, None] < P) & (n[None, :] < N)
    dS = tl.load(grads + (row * segments + segment) * P * N + p[:, None] * N + n[None, :], mask=inside, other=0.0)
    first = segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks) - 1
    for i in tl.range(0, last - first + 1, num_stages=2):
        chunk = last - i
        tile = square + (h * 0 + chunk - slab * segment_chunks) * BP * BN
        rounded = dS.to(out.dtype.element_ty)
        tl.store(out + tile, rounded)
        S_PN = tl.load(at_chunks + tile)
        t = (h * 0 + chunk) * Q + q  # 64-bit
        here = t < T
        kept = tl.exp(tl.load(totals + row * chunks + chunk).to(tl.float32))
        weight = tl.exp(tl.load(cum + (row * chunks + chunk) * Q + q).to(tl.float32))
        if HAS_DROP:
            document = tl.cumsum(tl.load(drop + b * T + t, mask=here, other=0).to(tl.int32), 0)
            weight = tl.where(document == 0, weight, 0.0)
            kept = tl.where(tl.max(document, 0) > 0, 0.0, kept)
        both = tl.sum(rounded.to(tl.float32) * S_PN)
        tl.store(dtotal + ((block * (tl.num_programs(2) // blocks) + b) * H + h) * chunks + chunk, kept * both)
        dy_QP = tl.load(dy + t[:, None] * sdyt + p[None, :], mask=here[:, None] & (p[None, :] < P), other=0.0)
        C_QN = tl.load(C + t[:, None] * sCt + n[None, :], mask=here[:, None] & (n[None, :] < N), other=0.0)
        dyw = (tl.trans(dy_QP) * weight[None, :]).to(C_QN.dtype)
        dS = add_product(dyw, C_QN, dS * kept, FULL)


@triton.jit
def output_grads(x, B, C, gram, dy, cum, scale, drop, states, dB, dC, dcum, dscale,
                 sxb, sxt, sxh, sBb, sBt, sBg, sCb, sCt, sCg, sdyb, sdyt, sdyh,
                 T, H, P, N, G, chunks, first, width, splits,
                 Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr, FULL: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """What the outputs of chunk `first` + program_id(0) weigh, from inside the chunk and through the state before it:
    dB, dC (splits,B,T,G,N), a group's heads split over programs; dcum, dscale (P/BP,B,H,chunks*Q). Grid (chunks of the
    slab, splits * G, B)."""
    local, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, split = (tl.program_id(1) // splits).to(tl.int64), (tl.program_id(1) % splits).to(tl.int64)
    blocks, batch, per_group = tl.cdiv(P, BP), tl.num_programs(2), H // G
    chunk = first + local
    q, n = tl.arange(0, Q), tl.arange(0, BN)
    t = chunk * Q + q
    here = t < T
    of_C = here[:, None] & (n[None, :] < N)
    C_QN = tl.load(C + b * sCb + g * sCg + t[:, None] * sCt + n[None, :], mask=of_C, other=0.0)
    G_QQ = tl.load(gram + ((b * G + g) * chunks + chunk) * Q * Q + q[:, None] * Q + q[None, :])
    seen = q[:, None] <= q[None, :]  # [s, t]
    if HAS_DROP:
        document = tl.cumsum(tl.load(drop + b * T + t, mask=here, other=0).to(tl.int32), 0)
        seen = seen & (document[:, None] == document[None, :])
    dC_QN = tl.zeros((Q, BN), tl.float32)
    dgram = tl.zeros((Q, Q), tl.float32)
    square = tl.arange(0, BP)[:, None] * BN + n[None, :]
    low, high = split * per_group // splits, (split + 1) * per_group // splits
    for item in tl.range(low * blocks, high * blocks, num_stages=STAGES):
        h, block = g * per_group + item // blocks, item % blocks
        p = block * BP + tl.arange(0, BP)
        at = ((b * H + h) * chunks + chunk) * Q + q
        of_x = here[:, None] & (p[None, :] < P)
        x_QP = tl.load(x + b * sxb + h * sxh + t[:, None] * sxt + p[None, :], mask=of_x, other=0.0)
        dy_QP = tl.load(dy + b * sdyb + h * sdyh + t[:, None] * sdyt + p[None, :], mask=of_x, other=0.0)
        S_PN = tl.load(states + (((b * H + h) * blocks + block) * width + local) * BP * BN + square)
        c, s = tl.load(cum + at).to(tl.float32), tl.load(scale + at)
        out = tl.exp(c)
        if HAS_DROP:
            out = tl.where(document == 0, out, 0.0)
        y_QP = product(C_QN, tl.trans(S_PN), FULL)
        dC_QN = add_product((dy_QP * out[:, None]).to(C_QN.dtype), S_PN, dC_QN, FULL)
        inner = product(x_QP, tl.trans(dy_QP), FULL) * tl.exp(tl.where(seen, c[None, :] - c[:, None], float("-inf")))
        dgram += inner * s[:, None]
        inner *= G_QQ
        ds = tl.sum(inner, 1)
        at += block * batch * H * chunks * Q
        tl.store(dcum + at, tl.sum(y_QP * dy_QP, 1) * out + tl.sum(inner * s[:, None], 0) - s * ds)
        tl.store(dscale + at, ds)
    dgram = dgram.to(C_QN.dtype)
    B_QN = tl.load(B + b * sBb + g * sBg + t[:, None] * sBt + n[None, :], mask=of_C, other=0.0)
    dC_QN = add_product(tl.trans(dgram), B_QN, dC_QN, FULL)
    to = (((split * batch + b) * T + t)[:, None] * G + g) * N + n[None, :]
    tl.store(dC + to, dC_QN, mask=of_C)
    tl.store(dB + to, product(dgram, C_QN, FULL), mask=of_C)


@triton.jit
def input_grads(x, B, gram, dy, cum, scale, totals, D, drop, grads, dtotal,
                dx, dB, dcum, dscale, dD,
                sxb, sxt, sxh, sBb, sBt, sBg, sdyb, sdyt, sdyh, sDh, sDp,
                T, H, P, N, G, chunks, first, width, splits,
                Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_D: tl.constexpr, HAS_DROP: tl.constexpr,
                FULL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """What the inputs of a chunk weigh, dx (B,T,H,P) and dD (B,width,H,P), and the rest of dB and dscale, through the
    state after the chunk; dcum becomes the gradient of log-decay. Same grid."""
    local, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, split = (tl.program_id(1) // splits).to(tl.int64), (tl.program_id(1) % splits).to(tl.int64)
    blocks, batch, per_group = tl.cdiv(P, BP), tl.num_programs(2), H // G
    chunk = first + local
    q, n = tl.arange(0, Q), tl.arange(0, BN)
    t = chunk * Q + q
    here = t < T
    of_B = here[:, None] & (n[None, :] < N)
    B_QN = tl.load(B + b * sBb + g * sBg + t[:, None] * sBt + n[None, :], mask=of_B, other=0.0)
    G_QQ = tl.load(gram + ((b * G + g) * chunks + chunk) * Q * Q + q[:, None] * Q + q[None, :])
    seen = q[:, None] <= q[None, :]  # [s, t]
    if HAS_DROP:
        document = tl.cumsum(tl.load(drop + b * T + t, mask=here, other=0).to(tl.int32), 0)
        latest = tl.max(document, 0)
        seen = seen & (document[:, None] == document[None, :])
    dB_QN = tl.zeros((Q, BN), tl.float32)
    square = tl.arange(0, BP)[:, None] * BN + n[None, :]
    low, high = split * per_group // splits, (split + 1) * per_group // splits
    for item in tl.range(low * blocks, high * blocks, num_stages=STAGES):
        h, block = g * per_group + item // blocks, item % blocks
        p = block * BP + tl.arange(0, BP)
        row = b * H + h
        at = (row * chunks + chunk) * Q + q
        own = block * batch * H * chunks
        of_x = here[:, None] & (p[None, :] < P)
        x_QP = tl.load(x + b * sxb + h * sxh + t[:, None] * sxt + p[None, :], mask=of_x, other=0.0)
        dy_QP = tl.load(dy + b * sdyb + h * sdyh + t[:, None] * sdyt + p[None, :], mask=of_x, other=0.0)
        dS_PN = tl.load(grads + ((row * blocks + block) * width + local) * BP * BN + square)
        total, c, s = tl.load(totals + row * chunks + chunk), tl.load(cum + at), tl.load(scale + at)
        left = tl.exp((total - c).to(tl.float32))
        if HAS_DROP:
            left = tl.where(document == latest, left, 0.0)
        u_QP = product(B_QN, tl.trans(dS_PN), FULL)
        dB_QN = add_product((x_QP * (left * s)[:, None]).to(x_QP.dtype), dS_PN, dB_QN, FULL)
        dleft = tl.sum(u_QP * x_QP, 1) * left
        ended = tl.load(dcum + own * Q + at) - dleft * s
        after = tl.load(dtotal + own + row * chunks + chunk) + tl.sum(dleft * s, 0)
        tl.store(dcum + own * Q + at, tl.cumsum(ended, 0, reverse=True) + after)
        tl.store(dscale + own * Q + at, tl.load(dscale + own * Q + at) + dleft)

        decay = tl.exp(tl.where(seen, (c[None, :] - c[:, None]).to(tl.float32), float("-inf")))
        weights = (G_QQ * decay * s[:, None]).to(x_QP.dtype)
        dx_QP = product(weights, dy_QP, FULL) + u_QP * (left * s)[:, None]
        if HAS_D:
            D_P = tl.load(D + h * sDh + p * sDp, mask=p < P, other=0.0).to(tl.float32)
            tl.store(dD + ((b * width + local) * H + h) * P + p, tl.sum(dy_QP.to(tl.float32) * x_QP, 0), mask=p < P)
            dx_QP += dy_QP * D_P[None, :]
        tl.store(dx + ((b * T + t)[:, None] * H + h) * P + p[None, :], dx_QP.to(dx.dtype.element_ty), mask=of_x)
    to = (((split * batch + b) * T + t)[:, None] * G + g) * N + n[None, :]
    tl.store(dB + to, tl.load(dB + to, mask=of_B, other=0.0) + dB_QN, mask=of_B)


@triton.jit
def gate_grads(dt, A, dt_bias, table, pad, dlog_decay, dscale, ddt, dA, dbias, low, high, sdb, sdt, sdh,
               T, H, stride, BT: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
               HAS_PAD: tl.constexpr):  # fmt: skip
    """ddt (B,T,H), and of BT tokens each dA, dbias (B,T/BT,H), from dlog_decay, dscale (B,H,stride), stride >= T. The
    gates: see `chunk_gates`. Grid (T / BT, H / BH, B)."""
    h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    t, b = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(2).to(tl.int64)
    ok = h < H
    real = t < T
    here = real[None, :] & ok[:, None]
    raw = tl.load(dt + b * sdb + t[None, :] * sdt + h[:, None] * sdh, mask=here, other=0.0).to(tl.float32)
    at = (b * H + h)[:, None] * stride + t[None, :]
    of_decay, of_scale = tl.load(dlog_decay + at, mask=here, other=0.0), tl.load(dscale + at, mask=here, other=0.0)
    if HAS_BIAS:
        raw += tl.load(dt_bias + h, mask=ok, other=0.0).to(tl.float32)[:, None]
    if HAS_PAD:
        real = real & (t >= tl.load(pad + b))
    mul, rate = tl.load(table + h, mask=ok, other=0.0), tl.load(A + h, mask=ok, other=0.0).to(tl.float32)
    gain, min_dt = tl.load(table + 2 * H + h, mask=ok, other=0.0), tl.load(table + 3 * H + h, mask=ok, other=0.0)
    step = step_size(raw, float("-inf"), float("inf"), SOFTPLUS)
    within = (step >= low) & (step <= high)
    clipped = step_size(raw, low, high, SOFTPLUS)
    keep = real[None, :] & ((clipped < min_dt[:, None]) == 0)
    dstep = tl.where(keep & within, of_decay * (rate * mul)[:, None] + of_scale * gain[:, None], 0.0)
    if SOFTPLUS:
        dstep *= tl.sigmoid(raw)
    tl.store(ddt + (b * T + t)[None, :] * H + h[:, None], dstep.to(ddt.dtype.element_ty), mask=here)
    part = (b * tl.num_programs(0) + tl.program_id(0)) * H + h
    tl.store(dA + part, tl.sum(tl.where(keep, of_decay * clipped, 0.0), 1) * mul, mask=ok)
    tl.store(dbias + part, tl.sum(dstep, 1), mask=ok)
