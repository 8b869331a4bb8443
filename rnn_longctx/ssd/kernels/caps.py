"""The factors r_t by which norm caps cut states back, and what they make of the gates (`rnn_longctx.ssd.caps`).

Every k tokens, k whole chunks: `segment_states` (forward.py) finds what each piece adds, side by side, and `cap_chain`
walks the pieces. Every token: `cap_tokens` walks the chunks, a program a head, with the state before each in registers.
Inside a chunk, with E_s = x_s B_s^T, scales w and K[s, t] = 2 w_s w_t exp(cum_t - cum_s) <E_s, E_t>,

    ||S_t||^2 = a_t^2 ||S_{t-1}||^2 + H_t + K[t, t] / 2,     H <- r_t (H + K[t, :]) for the tokens after t,

and H begins as 2 w_t exp(cum_t) <S_0, E_t>. Nothing in it grows but what the gates make grow, so no factor leaves its
range. 64 such steps, one hanging on the other, are what this costs: K lies in memory, each warp holds all of H, a token
a lane, and tokens are taken four at a time, those four as scalars. H is kept without its last factor, so that the next
four are fetched from it while that factor is worked out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.ssd.kernels.launcher import Launched
from rnn_longctx.ssd.kernels.prepare import add_product, product

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-100.0)  # nats: the log of a factor of 0


@Launched
@triton.jit
def cap_chain(states, ends, caps, S, factors, H, P, N, pieces, offset, all_pieces,
              BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """factors (B,H,all_pieces) from `offset` on: by how much the state is cut back to its cap at the end of each of
    `pieces` pieces of the stream, which add `states` (B,H,pieces,P,N) and forget `ends`. S (B,H,P,N) is the state
    before the first and becomes that after the last. Heads without a cap are left as they are. Grid (B * H): here the
    stream is walked in order."""
    row = tl.program_id(0).to(tl.int64)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    inside = (p[:, None] < P) & (n[None, :] < N)
    here = p[:, None] * N + n[None, :]
    cap = tl.load(caps + tl.program_id(0) % H)
    if cap == float("inf"):
        return
    S_PN = tl.load(S + row * P * N + here, mask=inside, other=0.0)
    factor = cap * 0.0 + 1.0  # S_PN is still to be multiplied by it
    for i in tl.range(0, pieces, num_stages=STAGES):
        at = row * pieces + i
        added = tl.load(states + at * P * N + here, mask=inside, other=0.0)
        S_PN = S_PN * (factor * tl.exp(tl.load(ends + at))) + added.to(tl.float32)
        norm = tl.sqrt(tl.sum(S_PN * S_PN))
        factor = tl.where(norm > cap, cap / norm, 1.0)
        tl.store(factors + row * all_pieces + offset + i, factor)
    tl.store(S + row * P * N + here, S_PN * factor, mask=inside)


@triton.jit
def pick(H, here):
    """The column of H (W, LANES) float32 that is `here`, (W). A sum of integers, of which all but one are 0: one
    instruction a warp."""
    return tl.sum(tl.where(here, H.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)


@triton.jit
def clip(n2, cap):
    """The factor of a state of squared norm n2, and n2 after it. A NaN is let through as it is."""
    over = n2 > cap * cap
    return tl.where(over, cap * tl.rsqrt(n2), 1.0), tl.where(over, cap * cap, n2)


@triton.jit
def four_numbers(K, own, decay_sq, t, Q: tl.constexpr):
    """Of tokens t to t + 3: K between them, and what each alone adds, and their squared decays."""
    k, e, d = K + t * (Q + 1) + 1, own + t, decay_sq + t
    return (tl.load(k), tl.load(k + 1), tl.load(k + 2), tl.load(k + Q + 1), tl.load(k + Q + 2), tl.load(k + 2 * Q + 2),
            tl.load(e), tl.load(e + 1), tl.load(e + 2), tl.load(e + 3),
            tl.load(d), tl.load(d + 1), tl.load(d + 2), tl.load(d + 3))  # fmt: skip


@triton.jit
def four_caps(capped, t, cap, DENSE: tl.constexpr):
    if DENSE:
        return cap, cap, cap, cap
    else:
        return tl.load(capped + t), tl.load(capped + t + 1), tl.load(capped + t + 2), tl.load(capped + t + 3)


@triton.jit
def four_rows(rows, t, Q: tl.constexpr):
    at = rows + t * Q
    return tl.load(at), tl.load(at + Q), tl.load(at + 2 * Q), tl.load(at + 3 * Q)


@triton.jit
def cap_four(H, r, n2, R, lane, first, numbers, caps):
    """The four tokens that stand from lane `first` on in H (W, LANES), which is still to be multiplied by r; n2 the
    squared norm before them. Their factors go into R. Returns those four, n2 and R."""
    k01, k02, k03, k12, k13, k23, e0, e1, e2, e3, d0, d1, d2, d3 = numbers
    at = lane[None, :] - first
    h0, h1, h2, h3 = pick(H, at == 0), pick(H, at == 1), pick(H, at == 2), pick(H, at == 3)
    # what waits for the factor before it comes last in every sum
    r0, n2 = clip(r * h0 + (d0 * n2 + e0), caps[0])
    h1 = r * h1 + k01
    h2 = r * h2 + k02
    h3 = r * h3 + k03
    r1, n2 = clip(r0 * h1 + (d1 * n2 + e1), caps[1])
    h2 = r0 * h2 + k12
    h3 = r0 * h3 + k13
    r2, n2 = clip(r1 * h2 + (d2 * n2 + e2), caps[2])
    h3 = r1 * h3 + k23
    r3, n2 = clip(r2 * h3 + (d3 * n2 + e3), caps[3])
    R = tl.where(at == 0, r0[:, None], R)
    R = tl.where(at == 1, r1[:, None], R)
    R = tl.where(at == 2, r2[:, None], R)
    R = tl.where(at == 3, r3[:, None], R)
    return r0, r1, r2, r3, n2, R


@triton.jit
def add_four(H, r, r0, r1, r2, rows):
    """H (W, LANES) with four tokens' rows of K added, each but the last multiplied by its factor."""
    return (((H * r[:, None] + rows[0]) * r0[:, None] + rows[1]) * r1[:, None] + rows[2]) * r2[:, None] + rows[3]


@triton.jit
def tokens(source, stride, t0, T, q, columns, count):
    """Tokens t0 + q of one head's (or group's) rows; zeros beyond the array. Inside a tile offsets are 32-bit."""
    here = (q < T - t0)[:, None] & (columns < count)[None, :]
    return tl.load(source + t0 * stride + (q[:, None] * stride + columns[None, :]), mask=here, other=0.0)


@triton.jit
def due_cap(caps, h, H, t, T, every, offset, other_every, other_offset):
    """The cap (Q) in force after tokens t of the stream, the lower of two; infinity where none is due."""
    none = float("inf")
    cap = tl.where(((offset + t + 1) % every == 0) & (t < T), tl.load(caps + h), none)
    other = tl.where(((other_offset + t + 1) % other_every == 0) & (t < T), tl.load(caps + H + h), none)
    return tl.minimum(cap, other)


@Launched
@triton.jit(do_not_specialize=["offset", "other_offset"])
def cap_tokens(x, B, cum, scale, totals, caps, initial, factors, room, sxb, sxt, sxh, sBb, sBt, sBg,
               T, H, P, N, G, chunks, every, offset, other_every, other_offset,
               Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, LANES: tl.constexpr,
               DENSE: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """factors (B,H,chunks,Q): by how much every token's state is cut back to a cap. caps (2,H), each applied after the
    tokens t for which every divides offset + t + 1; DENSE: the first after every token, and no other. room
    (B*H, Q*(Q+5)). Q is LANES or twice as many. Grid (B * H): the stream is walked in order, W warps a program."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    g = h // (H // G)
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    lane, warp = tl.arange(0, LANES), tl.arange(0, W)
    inside = (p[:, None] < P) & (n[None, :] < N)
    here = p[:, None] * N + n[None, :]
    K = room + row * (Q * (Q + 5))
    starts, own, decay_sq, capped, logs = (K + Q * Q, K + Q * (Q + 1), K + Q * (Q + 2), K + Q * (Q + 3),
                                           K + Q * (Q + 4))  # fmt: skip
    lanes = lane[None, :] + warp[:, None] * 0  # (W, LANES): each warp holds all of a row
    cap = tl.load(caps + h)

    S = tl.load(initial + row * P * N + here, mask=inside, other=0.0)
    x, B = x + b * sxb + h * sxh, B + b * sBb + g * sBg
    x_QP, B_QN = tokens(x, sxt, h * 0, T, q, p, P), tokens(B, sBt, h * 0, T, q, n, N)
    for i in tl.range(0, chunks, num_stages=1):
        chunk = h * 0 + i  # 64-bit
        at = row * chunks + chunk
        cums, scales, total = cum + at * Q + q, scale + at * Q + q, tl.load(totals + at)
        c, s = tl.load(cums), tl.load(scales)
        # the next chunk is on its way while this one is worked on
        next_x, next_B = tokens(x, sxt, chunk * Q + Q, T, q, p, P), tokens(B, sBt, chunk * Q + Q, T, q, n, N)
        log_decay = (c - tl.load(cums - 1, mask=q > 0, other=0.0)).to(tl.float32)
        if DENSE:
            lowest = cap
        else:
            caps_Q = due_cap(caps, h, H, i * Q + q, T, every, offset, other_every, other_offset)
            lowest = tl.min(caps_Q)
        inner = product(x_QP, tl.trans(x_QP), FULL) * product(B_QN, tl.trans(B_QN), FULL)
        adds = s * s * tl.sum(tl.where(q[:, None] == q[None, :], inner, 0.0), 1)
        grow = tl.exp(tl.sum(tl.maximum(log_decay, 0.0)))
        n2, kept, suffix = tl.sum(S * S), cap * 0.0, q * 0.0
        if (tl.sqrt(n2) + tl.sum(tl.sqrt(adds))) * grow * 1.001 > lowest:  # otherwise no cap can be reached
            u = tl.sum(product(B_QN, tl.trans(S.to(B_QN.dtype)), FULL) * x_QP, 1)
            # Below the diagonal this may be anything, and nobody asks.
            decay = tl.exp2(((c[None, :] - c[:, None]) * LOG2_E).to(tl.float32))
            tl.debug_barrier()  # everyone has read what the chunk before left in the room
            tl.store(K + q[:, None] * Q + q[None, :], inner * decay * (2.0 * s)[:, None] * s[None, :])
            tl.store(starts + q, 2.0 * s * tl.exp(c.to(tl.float32)) * u)
            tl.store(own + q, adds)
            tl.store(decay_sq + q, tl.exp(2.0 * log_decay))
            if not DENSE:
                tl.store(capped + q, caps_Q)
            tl.debug_barrier()

            n2_W, r = n2 + warp * 0.0, warp * 0.0 + 1.0
            low, R = tl.load(starts + lanes), lanes * 0.0
            if Q > LANES:
                high, later = tl.load(starts + LANES + lanes), lanes * 0.0
            # what four tokens need is read while the four before them are worked on; past the end, it is not used
            numbers, due = four_numbers(K, own, decay_sq, 0, Q), four_caps(capped, 0, cap, DENSE)
            these = four_rows(K + lanes, 0, Q)
            if Q > LANES:
                more = four_rows(K + LANES + lanes, 0, Q)
            for t in tl.range(0, LANES, 4, num_stages=1, loop_unroll_factor=2):
                next_numbers, next_due = four_numbers(K, own, decay_sq, t + 4, Q), four_caps(capped, t + 4, cap, DENSE)
                next_these = four_rows(K + lanes, t + 4, Q)
                r0, r1, r2, r3, n2_W, R = cap_four(low, r, n2_W, R, lane, t, numbers, due)
                low = add_four(low, r, r0, r1, r2, these)
                if Q > LANES:
                    next_more = four_rows(K + LANES + lanes, t + 4, Q)
                    high = add_four(high, r, r0, r1, r2, more)
                    more = next_more
                r, numbers, due, these = r3, next_numbers, next_due, next_these
            tl.store(factors + at * Q + lanes, R, mask=warp[:, None] == 0)
            log_R = tl.where(R > 0.0, tl.log(R), LEAST)
            if Q > LANES:
                for t in tl.range(0, LANES, 4, num_stages=1, loop_unroll_factor=2):
                    ahead = LANES + t + 4
                    next_numbers = four_numbers(K, own, decay_sq, ahead, Q)
                    next_due = four_caps(capped, ahead, cap, DENSE)
                    next_more = four_rows(K + LANES + lanes, ahead, Q)
                    r0, r1, r2, r3, n2_W, later = cap_four(high, r, n2_W, later, lane, t, numbers, due)
                    high = add_four(high, r, r0, r1, r2, more)
                    r, numbers, due, more = r3, next_numbers, next_due, next_more
                tl.store(factors + at * Q + LANES + lanes, later, mask=warp[:, None] == 0)
                log_later = tl.where(later > 0.0, tl.log(later), LEAST)
                tl.store(logs + LANES + lanes, tl.cumsum(log_later, 1, reverse=True), mask=warp[:, None] == 0)
                after = tl.sum(log_later, 1)
                tl.store(logs + lanes, tl.cumsum(log_R, 1, reverse=True) + after[:, None], mask=warp[:, None] == 0)
            else:
                tl.store(logs + lanes, tl.cumsum(log_R, 1, reverse=True), mask=warp[:, None] == 0)
            tl.debug_barrier()
            suffix = tl.load(logs + q)  # of a token's factor and all after it
            kept = tl.load(logs)
        else:
            tl.store(factors + at * Q + q, q * 0.0 + 1.0)
        # read again, so that they take no registers meanwhile
        x_QP, B_QN = tokens(x, sxt, chunk * Q, T, q, p, P), tokens(B, sBt, chunk * Q, T, q, n, N)
        weight = s * tl.exp((total - c).to(tl.float32) + suffix)
        S *= tl.exp(total.to(tl.float32) + kept)
        S = add_product((tl.trans(x_QP) * weight[None, :]).to(x_QP.dtype), B_QN, S, FULL)
        x_QP, B_QN = next_x, next_B


@Launched
@triton.jit
def cut_tokens(factors, cum, scale, totals, wild, limit, rows, chunks, segment_chunks, segments,
               Q: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The factors made part of the gates (`chunk_gates` of prepare.py), in place. Grid (B * H * chunks / ROWS)."""
    at, q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, Q)
    here = at < rows
    token, mask = at[:, None] * Q + q[None, :], here[:, None]
    r = tl.load(factors + token, mask=mask, other=1.0)
    logs = tl.where(r > 0.0, tl.log(r), tl.where(r == 0.0, LEAST, r)).to(cum.dtype.element_ty)  # NaN stays
    c = tl.load(cum + token, mask=mask, other=0.0) + tl.cumsum(logs, 1)
    total = tl.load(totals + at, mask=here, other=0.0) + tl.sum(logs, 1)
    tl.store(cum + token, c, mask=mask)
    tl.store(totals + at, total, mask=here)
    tl.store(scale + token, tl.load(scale + token, mask=mask, other=0.0) * r, mask=mask)
    far = tl.max(tl.abs(c - 0.5 * total[:, None]), 1) > limit
    segment = at // chunks * segments + at % chunks // segment_chunks
    tl.atomic_max(wild + segment, far.to(tl.int32), mask=here & far)
