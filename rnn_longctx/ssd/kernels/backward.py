"""Gradients of the scan, recomputed instead of stored. Segments of a few chunks, each a piece of work of its own. Sums
over heads are added up by atomics, so the last bits of dB and dC vary from run to run:

1. `segment_states` (forward.py), `fold_states`: the state at the beginning of each segment.
2. `segment_grads`, `fold_grads`: the gradient of the state at the end of each, the same thing run backwards.
3. `chunk_grads`: a program walks a segment forwards for the states at its chunks, which it keeps in a scratch of its
   own (as many scratches as programs run at once, so memory does not grow with the stream), then backwards.

With L[s, t] = exp(cum_t - cum_s), M[s, t] = scale_s L G x_s . dy_t, and S, dS the state before and its gradient after a
chunk, d cum_t gets what output t weighs less what input t weighs, and d log_decay_t is the sum of d cum from t on. The
sums run over one chunk only, so that no rounding of far tokens enters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.ssd.kernels.forward import first_state, reach
from rnn_longctx.ssd.kernels.prepare import add_product, product


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
def chunk_grads(x, B, C, gram, dy, cum, scale, totals, D, drop, initial, states, grads, scratch,
                dx, dB, dC, dgram, dlog_decay, dscale, dD,
                sxb, sxt, sxh, sBb, sBt, sBg, sCb, sCt, sCg, sdyb, sdyt, sdyh, sDh, sDp,
                T, H, P, N, G, chunks, segment_chunks, segments, items,
                Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_D: tl.constexpr, HAS_DROP: tl.constexpr,
                FULL: tl.constexpr):  # fmt: skip
    """dx (B,T,H,P); sums over heads, added up in float32: dB, dC (B,G,chunks*Q,BN) without what comes through gram,
    dgram (B,G,chunks,Q,Q); dlog_decay, dscale (B,H,chunks,Q); dD (H,P). A grid of programs that share `items`."""
    q, n = tl.arange(0, Q), tl.arange(0, BN)
    blocks = tl.cdiv(P, BP)
    scratch += tl.program_id(0).to(tl.int64) * segment_chunks * BP * BN
    local = tl.arange(0, BP)[:, None] * BN + n[None, :]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        segment = item % segments
        h = (item // segments) % H + tl.program_id(0).to(tl.int64) * 0
        block = (item // segments // H) % blocks
        b = (item // segments // H // blocks).to(tl.int64)
        g = h // (H // G)
        p = block * BP + tl.arange(0, BP)
        inside = (p[:, None] < P) & (n[None, :] < N)
        row = b * H + h
        first = segment * segment_chunks
        count = tl.minimum(segment_chunks, chunks - first)
        # a segment's tokens at scalar addresses, so that offsets inside it are 32-bit
        begin = first.to(tl.int64) * Q
        xs, dys = x + b * sxb + h * sxh + begin * sxt, dy + b * sdyb + h * sdyh + begin * sdyt
        Bs, Cs = B + b * sBb + g * sBg + begin * sBt, C + b * sCb + g * sCg + begin * sCt
        dxs, drops, tokens = dx + ((b * T + begin) * H + h) * P, drop + b * T + begin, T - begin
        group = (b * G + g) * chunks + first
        cums, scales, all_totals = (cum + (row * chunks + first) * Q, scale + (row * chunks + first) * Q,
                                    totals + row * chunks + first)  # fmt: skip

        S = first_state(initial, states, states, row, segment, segments, p, n, P, N, True)
        for i in tl.range(count, num_stages=1):
            tl.store(scratch + i * BP * BN + local, S.to(scratch.dtype.element_ty))
            if i + 1 < count:
                t = i * Q + q
                total = tl.load(all_totals + i)
                into = tl.load(scales + t) * tl.exp((total - tl.load(cums + t)).to(tl.float32))
                if HAS_DROP:
                    document = tl.cumsum(tl.load(drops + t).to(tl.int32), 0)
                    latest = tl.max(document, 0)
                    into = tl.where(document == latest, into, 0.0)
                    S = tl.where(latest > 0, 0.0, S)
                x_QP = tl.load(xs + t[:, None] * sxt + p[None, :], mask=p[None, :] < P, other=0.0)
                B_QN = tl.load(Bs + t[:, None] * sBt + n[None, :], mask=n[None, :] < N, other=0.0)
                xw = (tl.trans(x_QP) * into[None, :]).to(x_QP.dtype)
                S = add_product(xw, B_QN, S * tl.exp(total.to(tl.float32)), FULL)
        tl.debug_barrier()

        dS = tl.load(grads + (row * segments + segment) * P * N + p[:, None] * N + n[None, :], mask=inside, other=0.0)
        if HAS_D:
            D_P = tl.load(D + h * sDh + p * sDp, mask=p < P, other=0.0).to(tl.float32)
            dD_P = tl.zeros((BP,), tl.float32)
        for j in tl.range(count, num_stages=1):
            i = count - 1 - j
            t = i * Q + q
            here = t < tokens
            of_x = here[:, None] & (p[None, :] < P)
            of_B = here[:, None] & (n[None, :] < N)
            total, c, s = tl.load(all_totals + i), tl.load(cums + t), tl.load(scales + t)
            out, left = tl.exp(c.to(tl.float32)), tl.exp((total - c).to(tl.float32))
            kept = tl.exp(total.to(tl.float32))
            seen = q[:, None] <= q[None, :]  # [s, t]
            if HAS_DROP:
                document = tl.cumsum(tl.load(drops + t, mask=here, other=0).to(tl.int32), 0)
                latest = tl.max(document, 0)
                out = tl.where(document == 0, out, 0.0)
                left = tl.where(document == latest, left, 0.0)
                kept = tl.where(latest > 0, 0.0, kept)
                seen = seen & (document[:, None] == document[None, :])
            x_QP = tl.load(xs + t[:, None] * sxt + p[None, :], mask=of_x, other=0.0)
            dy_QP = tl.load(dys + t[:, None] * sdyt + p[None, :], mask=of_x, other=0.0).to(x_QP.dtype)

            # inside the chunk
            square = (group + i) * Q * Q + q[:, None] * Q + q[None, :]
            wide = (group + i) * Q * BN + q[:, None] * BN + n[None, :]
            decay = tl.exp(tl.where(seen, (c[None, :] - c[:, None]).to(tl.float32), float("-inf")))
            inner = product(x_QP, tl.trans(dy_QP), FULL) * decay
            tl.atomic_add(dgram + square, inner * s[:, None], sem="relaxed")
            G_QQ = tl.load(gram + square)
            weights = (G_QQ * decay * s[:, None]).to(x_QP.dtype)
            inner *= G_QQ
            ds = tl.sum(inner, 1)
            dcum = tl.sum(inner * s[:, None], 0) - s * ds
            dx_QP = product(weights, dy_QP, FULL)

            # through the state after it
            B_QN = tl.load(Bs + t[:, None] * sBt + n[None, :], mask=of_B, other=0.0)
            u_QP = product(B_QN, tl.trans(dS.to(x_QP.dtype)), FULL)
            dleft = tl.sum(u_QP * x_QP, 1) * left
            ds += dleft
            dcum -= dleft * s
            dtotal = tl.sum(dleft * s, 0)
            dx_QP += u_QP * (left * s)[:, None]
            if HAS_D:
                dx_QP += dy_QP * D_P[None, :]
                dD_P += tl.sum(dy_QP.to(tl.float32) * x_QP, 0)
            tl.store(dxs + t[:, None] * (H * P) + p[None, :], dx_QP.to(dx.dtype.element_ty), mask=of_x)
            xw = (x_QP * (left * s)[:, None]).to(x_QP.dtype)
            tl.atomic_add(dB + wide, product(xw, dS.to(x_QP.dtype), FULL), sem="relaxed")

            # through the state before it
            S_PN = tl.load(scratch + i * BP * BN + local).to(x_QP.dtype)
            dtotal += kept * tl.sum(dS * S_PN)
            dyo = (dy_QP * out[:, None]).to(x_QP.dtype)
            dC_QN = product(dyo, S_PN, FULL)
            tl.atomic_add(dC + wide, dC_QN, sem="relaxed")
            C_QN = tl.load(Cs + t[:, None] * sCt + n[None, :], mask=of_B, other=0.0)
            dcum += tl.sum(dC_QN * C_QN, 1)
            dS = add_product(tl.trans(dyo), C_QN, dS * kept, FULL)

            at = (row * chunks + first) * Q + t
            tl.atomic_add(dlog_decay + at, tl.cumsum(dcum, 0, reverse=True) + dtotal, sem="relaxed")
            tl.atomic_add(dscale + at, ds, sem="relaxed")
        if HAS_D:
            tl.atomic_add(dD + h * P + p, dD_P, mask=p < P, sem="relaxed")
        tl.debug_barrier()  # before the scratch is written again
