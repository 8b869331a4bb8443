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
sums run over one chunk only, so that no rounding of far tokens enters; and of the pairs inside it most cancel, so that
both kernels weigh the same rounded operands (otherwise A's gradient is off by 3% in bfloat16).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.recurrence.ssd.kernels.forward import first_state, reach
from rnn_longctx.recurrence.ssd.kernels.launcher import Launched
from rnn_longctx.recurrence.ssd.kernels.prepare import add_product, product, step_size


@Launched
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


@Launched
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


@Launched
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
def half(wild, totals, row, chunk, chunks, segment_chunks, segments):
    """Half a chunk's log-decay, which the factors of `output_grads` and `input_grads` leave to the state; 0 where they
    take differences instead."""
    tame = tl.load(wild + row * segments + chunk // segment_chunks) == 0
    return tl.where(tame, 0.5 * tl.load(totals + row * chunks + chunk).to(tl.float32), 0.0)


@Launched
@triton.jit
def chunk_states(x, B, drop, cum, scale, totals, wild, initial, states, out, sxb, sxt, sxh, sBb, sBt, sBg,
                 T, H, P, N, G, chunks, segment_chunks, segments, slab, width,
                 Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr,
                 FULL: tl.constexpr):  # fmt: skip
    """out (B,H,P/BP,width,BP,BN): the state before each chunk from segment `slab` on, times exp(`half`). `states` are
    folded. Grid (segments of the slab, H, B * P / BP)."""
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
    last = tl.minimum(first + segment_chunks, chunks)
    for chunk in tl.range(first, last, num_stages=2):
        factor = tl.exp(half(wild, totals, row, chunk, chunks, segment_chunks, segments))
        tl.store(out + (h * 0 + chunk - slab * segment_chunks) * BP * BN, (S * factor).to(out.dtype.element_ty))
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


@Launched
@triton.jit
def chunk_state_grads(dy, C, drop, cum, totals, wild, grads, at_chunks, out, dtotal, sdyb, sdyt, sdyh, sCb, sCt, sCg,
                      T, H, P, N, G, chunks, segment_chunks, segments, slab, width,
                      Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr,
                      FULL: tl.constexpr):  # fmt: skip
    """out as at_chunks, which `chunk_states` made: the gradient of the state after each chunk times exp(`half`); dtotal
    (P/BP,B,H,chunks): that of the chunk's log-decay by the state before it. `grads` are folded. Same grid."""
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
        own = half(wild, totals, row, chunk, chunks, segment_chunks, segments)
        scaled = (dS * tl.exp(own)).to(out.dtype.element_ty)
        tl.store(out + tile, scaled)
        S_PN = tl.load(at_chunks + tile)
        total = tl.load(totals + row * chunks + chunk).to(tl.float32)
        both = tl.sum(scaled.to(tl.float32) * S_PN) * tl.exp(total - 2 * own)
        t = (h * 0 + chunk) * Q + q  # 64-bit
        here = t < T
        kept = tl.exp(total)
        weight = tl.exp(tl.load(cum + (row * chunks + chunk) * Q + q).to(tl.float32))
        if HAS_DROP:
            document = tl.cumsum(tl.load(drop + b * T + t, mask=here, other=0).to(tl.int32), 0)
            weight = tl.where(document == 0, weight, 0.0)
            kept = tl.where(tl.max(document, 0) > 0, 0.0, kept)
            both = tl.where(tl.max(document, 0) > 0, 0.0, both)
        tl.store(dtotal + ((block * (tl.num_programs(2) // blocks) + b) * H + h) * chunks + chunk, both)
        dy_QP = tl.load(dy + t[:, None] * sdyt + p[None, :], mask=here[:, None] & (p[None, :] < P), other=0.0)
        C_QN = tl.load(C + t[:, None] * sCt + n[None, :], mask=here[:, None] & (n[None, :] < N), other=0.0)
        dyw = (tl.trans(dy_QP) * weight[None, :]).to(C_QN.dtype)
        dS = add_product(dyw, C_QN, dS * kept, FULL)


@triton.jit
def nothing_wild(wild, low, high, segments, BH: tl.constexpr):
    h = low + tl.arange(0, BH)
    return tl.max(tl.load(wild + h * segments, mask=h < high, other=0), 0) == 0


@Launched
@triton.jit
def output_grads(x, B, C, gram, dy, cum, scale, totals, drop, wild, states, dB, dC, dcum, dscale,
                 sxb, sxt, sxh, sBb, sBt, sBg, sCb, sCt, sCg, sdyb, sdyt, sdyh,
                 T, H, P, N, G, chunks, segment_chunks, segments, first, width, splits,
                 Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DROP: tl.constexpr, FULL: tl.constexpr,
                 WILD: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Of the outputs of chunk `first` + program_id(0): dC (splits,B,T,G,N), a group's heads split over programs; dB as
    it comes through gram; dcum (P/BP,B,H,chunks*Q), what an output weighs beside its own token's part, and x . dy, of
    which `input_grads` makes dscale. Grid (chunks of the slab, splits * G, B)."""
    local, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, split = (tl.program_id(1) // splits).to(tl.int64), (tl.program_id(1) % splits).to(tl.int64)
    blocks, batch, per_group = tl.cdiv(P, BP), tl.num_programs(2), H // G
    chunk = first + local
    low, high = split * per_group // splits, (split + 1) * per_group // splits
    wild += (b * H + g * per_group) * segments + chunk // segment_chunks
    if WILD:  # noqa: SIM102 (a constant and a value)
        if nothing_wild(wild, low, high, segments, BH):
            return
    q, n = tl.arange(0, Q), tl.arange(0, BN)
    t = chunk * Q + q
    here = t < T
    of_C = here[:, None] & (n[None, :] < N)
    C_QN = tl.load(C + b * sCb + g * sCg + t[:, None] * sCt + n[None, :], mask=of_C, other=0.0)
    square = ((b * G + g) * chunks + chunk) * Q * Q + q[:, None] * Q + q[None, :]
    G_QQ = tl.load(gram + square, mask=q[:, None] != q[None, :], other=0.0)  # [s, t], s < t
    seen = q[:, None] <= q[None, :]
    if HAS_DROP:
        document = tl.cumsum(tl.load(drop + b * T + t, mask=here, other=0).to(tl.int32), 0)
        seen = seen & (document[:, None] == document[None, :])
    dC_QN = tl.zeros((Q, BN), tl.float32)
    dgram = tl.zeros((Q, Q), tl.float32)
    tile = tl.arange(0, BP)[:, None] * BN + n[None, :]
    for item in tl.range(low * blocks, high * blocks, num_stages=STAGES):
        h, block = g * per_group + item // blocks, item % blocks
        p = block * BP + tl.arange(0, BP)
        row = b * H + h
        flag = tl.load(wild + (item // blocks) * segments)
        # one for every token: Triton's interpreter takes no single truth value in a mask
        mine = (flag + q * 0 != 0) if WILD else (flag + q * 0 == 0)
        at = (row * chunks + chunk) * Q + q
        of_x = (here & mine)[:, None] & (p[None, :] < P)
        x_QP = tl.load(x + b * sxb + h * sxh + t[:, None] * sxt + p[None, :], mask=of_x, other=0.0)
        dy_QP = tl.load(dy + b * sdyb + h * sdyh + t[:, None] * sdyt + p[None, :], mask=of_x, other=0.0)
        S_PN = tl.load(states + ((row * blocks + block) * width + local) * BP * BN + tile)
        c, s = tl.load(cum + at), tl.load(scale + at)
        total = tl.load(totals + row * chunks + chunk)
        out = tl.where(mine, tl.exp((c if WILD else c - 0.5 * total).to(tl.float32)), 0.0)
        if WILD:
            z_QP, o_QP = (x_QP * s[:, None]).to(x_QP.dtype), (dy_QP * out[:, None]).to(x_QP.dtype)
            decay = tl.exp(tl.where(seen, (c[None, :] - c[:, None]).to(tl.float32), float("-inf")))
            weights = (G_QQ * decay).to(x_QP.dtype)
            dgram += product(z_QP, tl.trans(dy_QP).to(x_QP.dtype), FULL) * decay
            y_QP = product(C_QN, tl.trans(S_PN), FULL) * out[:, None]
        else:
            into = tl.where(mine, s * tl.exp((0.5 * total - c).to(tl.float32)), 0.0)
            z_QP, o_QP = (x_QP * into[:, None]).to(x_QP.dtype), (dy_QP * out[:, None]).to(x_QP.dtype)
            weights = G_QQ
            dgram = add_product(z_QP, tl.trans(o_QP), dgram, FULL)  # what no token sees may overflow
            y_QP = product(C_QN, tl.trans(S_PN), FULL)
        both_QP = dy_QP if WILD else o_QP  # what meets z in `input_grads` too
        if HAS_DROP:
            y_QP = tl.where((document == 0)[:, None], y_QP, 0.0)
            o_QP = tl.where((document == 0)[:, None], o_QP, 0.0)
        y_QP = add_product(tl.trans(weights), z_QP, y_QP, FULL)
        at += block * batch * H * chunks * Q
        tl.store(dcum + at, tl.sum(y_QP * both_QP, 1), mask=here & mine)
        tl.store(dscale + at, tl.sum(x_QP.to(tl.float32) * dy_QP, 1), mask=here & mine)
        dC_QN = add_product(o_QP, S_PN, dC_QN, FULL)
    dgram = tl.where(seen, dgram, 0.0).to(C_QN.dtype)
    B_QN = tl.load(B + b * sBb + g * sBg + t[:, None] * sBt + n[None, :], mask=of_C, other=0.0)
    dC_QN = add_product(tl.trans(dgram), B_QN, dC_QN, FULL)
    to = (((split * batch + b) * T + t)[:, None] * G + g) * N + n[None, :]
    dB_QN = product(dgram, C_QN, FULL)
    if WILD:
        dC_QN += tl.load(dC + to, mask=of_C, other=0.0)
        dB_QN += tl.load(dB + to, mask=of_C, other=0.0)
    tl.store(dC + to, dC_QN, mask=of_C)
    tl.store(dB + to, dB_QN, mask=of_C)


@Launched
@triton.jit
def input_grads(x, B, gram, dy, cum, scale, totals, D, drop, wild, grads, dtotal,
                dx, dB, dcum, dscale, dD,
                sxb, sxt, sxh, sBb, sBt, sBg, sdyb, sdyt, sdyh,
                T, H, P, N, G, chunks, segment_chunks, segments, first, width, splits,
                Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_D: tl.constexpr, HAS_DROP: tl.constexpr,
                FULL: tl.constexpr, WILD: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Of a chunk's inputs: dx (B,T,H,P), dD (P/BP,B,H,chunks) of D (H), dscale as dcum, and the rest of dB; dcum
    becomes the gradient of log-decay. Same grid."""
    local, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, split = (tl.program_id(1) // splits).to(tl.int64), (tl.program_id(1) % splits).to(tl.int64)
    blocks, batch, per_group = tl.cdiv(P, BP), tl.num_programs(2), H // G
    chunk = first + local
    low, high = split * per_group // splits, (split + 1) * per_group // splits
    wild += (b * H + g * per_group) * segments + chunk // segment_chunks
    if WILD:  # noqa: SIM102 (a constant and a value)
        if nothing_wild(wild, low, high, segments, BH):
            return
    q, n = tl.arange(0, Q), tl.arange(0, BN)
    t = chunk * Q + q
    here = t < T
    of_B = here[:, None] & (n[None, :] < N)
    B_QN = tl.load(B + b * sBb + g * sBg + t[:, None] * sBt + n[None, :], mask=of_B, other=0.0)
    square = ((b * G + g) * chunks + chunk) * Q * Q
    G_QQ = tl.load(gram + square + q[:, None] * Q + q[None, :], mask=q[:, None] != q[None, :], other=0.0)
    own = tl.load(gram + square + q * Q + q).to(tl.float32)  # C_t . B_t
    seen = q[:, None] < q[None, :]  # [s, t]
    if HAS_DROP:
        document = tl.cumsum(tl.load(drop + b * T + t, mask=here, other=0).to(tl.int32), 0)
        latest = tl.max(document, 0)
        seen = seen & (document[:, None] == document[None, :])
    dB_QN = tl.zeros((Q, BN), tl.float32)
    tile = tl.arange(0, BP)[:, None] * BN + n[None, :]
    for item in tl.range(low * blocks, high * blocks, num_stages=STAGES):
        h, block = g * per_group + item // blocks, item % blocks
        p = block * BP + tl.arange(0, BP)
        row = b * H + h
        flag = tl.load(wild + (item // blocks) * segments)
        mine = (flag + q * 0 != 0) if WILD else (flag + q * 0 == 0)
        at = (row * chunks + chunk) * Q + q
        to = block * batch * H * chunks * Q + at
        of_x = (here & mine)[:, None] & (p[None, :] < P)
        x_QP = tl.load(x + b * sxb + h * sxh + t[:, None] * sxt + p[None, :], mask=of_x, other=0.0)
        dy_QP = tl.load(dy + b * sdyb + h * sdyh + t[:, None] * sdyt + p[None, :], mask=of_x, other=0.0)
        dS_PN = tl.load(grads + ((row * blocks + block) * width + local) * BP * BN + tile)
        c, s = tl.load(cum + at), tl.load(scale + at)
        total = tl.load(totals + row * chunks + chunk)
        into = tl.where(mine, tl.exp((total - c if WILD else 0.5 * total - c).to(tl.float32)), 0.0)
        if WILD:
            decay = tl.exp(tl.where(seen, (c[None, :] - c[:, None]).to(tl.float32), float("-inf")))
            weights, o_QP = (G_QQ * decay).to(x_QP.dtype), dy_QP.to(x_QP.dtype)
        else:
            weights = G_QQ
            out = tl.where(mine, tl.exp((c - 0.5 * total).to(tl.float32)), 0.0)
            o_QP = (dy_QP * out[:, None]).to(x_QP.dtype)
        z_QP = (x_QP * (into * s)[:, None]).to(x_QP.dtype)
        both_QP = (x_QP * s[:, None]).to(x_QP.dtype) if WILD else z_QP  # as `output_grads` has it
        u_QP = product(B_QN, tl.trans(dS_PN), FULL)
        if HAS_DROP:
            u_QP = tl.where((document == latest)[:, None], u_QP, 0.0)
            z_QP = tl.where((document == latest)[:, None], z_QP, 0.0)
        dB_QN = add_product(z_QP, dS_PN, dB_QN, FULL)
        if WILD:
            u_QP = u_QP * into[:, None]
            into = 1.0
        through = tl.sum(u_QP * both_QP, 1)
        ended = tl.load(dtotal + block * batch * H * chunks + row * chunks + chunk) + tl.sum(through, 0)
        u_QP = add_product(weights, o_QP, u_QP, FULL)
        weighs = tl.sum(u_QP * both_QP, 1)
        together = tl.load(dscale + to, mask=here & mine, other=0.0)
        dcum_Q = tl.load(dcum + to, mask=here & mine, other=0.0) - weighs
        # without a scale the step is 0, or left out: its gradient is multiplied by 0
        tl.store(dscale + to, tl.where(s != 0.0, weighs / s, 0.0) + own * together, mask=here & mine)
        tl.store(dcum + to, tl.cumsum(dcum_Q, 0, reverse=True) + ended, mask=here & mine)
        direct = own * s
        if HAS_D:
            direct += tl.load(D + h).to(tl.float32)
            at_D = (block * batch * H + row) * chunks + chunk + q
            tl.store(dD + at_D, tl.sum(together, 0) + q * 0.0, mask=mine & (q == 0))
        dx_QP = u_QP * (into * s)[:, None] + dy_QP * direct[:, None]
        tl.store(dx + ((b * T + t)[:, None] * H + h) * P + p[None, :], dx_QP.to(dx.dtype.element_ty), mask=of_x)
    to = (((split * batch + b) * T + t)[:, None] * G + g) * N + n[None, :]
    tl.store(dB + to, tl.load(dB + to, mask=of_B, other=0.0) + dB_QN, mask=of_B)


@Launched
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
