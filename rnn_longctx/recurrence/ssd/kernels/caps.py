"""The factors r_t by which norm caps cut states back, and what they make of the gates (`recurrence.ssd.caps`).

Every k tokens, k whole chunks: `segment_states` (forward.py) finds what each piece adds, side by side, and `cap_chain`
walks the pieces. Every token: `cap_tokens` walks the chunks, a program a head, with the state before each in registers.
Inside a chunk, with E_s = x_s B_s^T, scales w and K[t, s] = 2 w_s w_t exp(cum_t - cum_s) <E_s, E_t>,

    ||S_t||^2 before its cap = a_t^2 ||S_{t-1}||^2 + w_t^2 <E_t, E_t> + H_t
    H_t = 2 w_t exp(cum_t) <S_0, E_t> r_0 ... r_{t-1} + sum_{s<t} K[t, s] r_s ... r_{t-1}

Given H the norms are a chain of x -> min(a x + b, c), which an associative scan takes in few steps; H is found from the
factors of the turn before, until they stay. H_t asks only for factors before t, so that every turn makes one more
token right for good; a few turns are enough, since what one factor does to the next H is small. Where tokens resemble
each other it is not, but mostly through the state's norm, which is known: H is scaled to it (20 turns become 5).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnn_longctx.recurrence.ssd.kernels.launcher import Launched
from rnn_longctx.recurrence.ssd.kernels.prepare import add_product, product

LEAST = tl.constexpr(-100.0)  # nats: the log of a factor of 0
MOST = tl.constexpr(1e38)  # no cap, squared
CLOSE, CLOSE_FULL = tl.constexpr(1e-4), tl.constexpr(4e-6)  # nats: 16-bit inputs are rounded by far more


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
def line_after(a, b, a2, b2):
    """x -> a x + b, and then the second."""
    return a2 * a, a2 * b + b2


@triton.jit
def bent_after(a, b, c, a2, b2, c2):
    """x -> min(a x + b, c), and then the second; a >= 0."""
    return a2 * a, a2 * b + b2, tl.minimum(a2 * c + b2, c2)


@triton.jit
def clip_chunk(K, starts, own, decay_sq, n2, cap, before, q, FULL: tl.constexpr):
    """The logs (Q) of a chunk's factors, given K (Q, Q) and, of each token, what H begins as, what it adds alone, its
    squared decay, the cap after it and the square of that before it; n2 is the first state's squared norm."""
    cap_sq = cap * cap
    close = CLOSE_FULL if FULL else CLOSE
    logs, norms = q * 0.0, q * 0.0 - 1.0
    left, change = tl.max(q) + 2, n2 * 0.0 + 1.0
    while (left > 0) & (change > close):
        R = tl.cumsum(logs, 0) - logs  # of the tokens before
        H = starts * tl.exp(R) + tl.sum(K * tl.exp(tl.minimum(R[:, None] - R[None, :], 0.0)), 1)
        # of the states that such factors would leave, and of those that there will be
        r2 = tl.exp(2.0 * logs)
        a, b = tl.associative_scan((decay_sq * r2, (own + H) * r2), 0, line_after)
        implied = a * n2 + b
        norms = tl.where(norms < 0.0, tl.minimum(implied, cap_sq), norms)  # the first time
        ratio = tl.where((implied > 0.0) & (norms > 0.0), norms / implied, 1.0)
        ratio = tl.sqrt(tl.minimum(tl.maximum(ratio, 0.0625), 16.0))
        H *= tl.where(q == 0, 1.0, tl.gather(ratio, tl.maximum(q - 1, 0), 0))
        adds = own + H
        a, b, c = tl.associative_scan((decay_sq, adds, tl.minimum(decay_sq * before + adds, MOST)), 0, bent_after)
        seen = tl.minimum(a * n2 + b, c)
        new = tl.where(seen > cap_sq, tl.maximum(tl.log(cap) - 0.5 * tl.log(seen), LEAST), 0.0)  # NaN: let through
        norms = tl.minimum(seen, cap_sq)
        change = tl.max(tl.abs(new - logs), 0)
        logs = new
        left -= 1
    return logs


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
def cap_tokens(x, B, cum, scale, totals, caps, initial, factors, sxb, sxt, sxh, sBb, sBt, sBg,
               T, H, P, N, G, chunks, every, offset, other_every, other_offset,
               Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """factors (B,H,chunks,Q): by how much every token's state is cut back to a cap. caps (2,H), each applied after the
    tokens t for which every divides offset + t + 1. Grid (B * H): the stream is walked in order."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    g = h // (H // G)
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    inside = (p[:, None] < P) & (n[None, :] < N)
    here = p[:, None] * N + n[None, :]
    S = tl.load(initial + row * P * N + here, mask=inside, other=0.0)
    x, B = x + b * sxb + h * sxh, B + b * sBb + g * sBg
    for i in tl.range(0, chunks, num_stages=1):
        chunk = h * 0 + i  # 64-bit
        at = row * chunks + chunk
        cums, scales, total = cum + at * Q + q, scale + at * Q + q, tl.load(totals + at)
        c, s = tl.load(cums), tl.load(scales)
        x_QP, B_QN = tokens(x, sxt, chunk * Q, T, q, p, P), tokens(B, sBt, chunk * Q, T, q, n, N)
        log_decay = (c - tl.load(cums - 1, mask=q > 0, other=0.0)).to(tl.float32)
        cap = due_cap(caps, h, H, i * Q + q, T, every, offset, other_every, other_offset)
        inner = product(x_QP, tl.trans(x_QP), FULL) * product(B_QN, tl.trans(B_QN), FULL)
        own = s * s * tl.sum(tl.where(q[:, None] == q[None, :], inner, 0.0), 1)
        grow = tl.exp(tl.sum(tl.maximum(log_decay, 0.0)))
        n2, logs = tl.sum(S * S), q * 0.0
        if (tl.sqrt(n2) + tl.sum(tl.sqrt(own))) * grow * 1.001 > tl.min(cap):  # otherwise no cap can be reached
            u = tl.sum(product(B_QN, tl.trans(S.to(B_QN.dtype)), FULL) * x_QP, 1)
            before = due_cap(caps, h, H, i * Q + q - 1, T, every, offset, other_every, other_offset)
            before = tl.where(q > 0, before * before, MOST)
            earlier = q[None, :] < q[:, None]
            decay = tl.exp(tl.where(earlier, c[:, None] - c[None, :], 0.0).to(tl.float32))
            K = tl.where(earlier, inner * decay * (2.0 * s)[:, None] * s[None, :], 0.0)
            starts = 2.0 * s * tl.exp(c.to(tl.float32)) * u
            logs = clip_chunk(K, starts, own, tl.exp(2.0 * log_decay), n2, cap, before, q, FULL)
        tl.store(factors + at * Q + q, tl.where(logs > LEAST, tl.exp(logs), 0.0))
        kept = tl.sum(logs)
        weight = s * tl.exp((total - c).to(tl.float32) + (kept - tl.cumsum(logs, 0) + logs))
        S *= tl.exp(total.to(tl.float32) + kept)
        S = add_product((tl.trans(x_QP) * weight[None, :]).to(x_QP.dtype), B_QN, S, FULL)


@Launched
@triton.jit
def cut_pieces(factors, cum, scale, totals, wild, steep, pieces, piece_chunks, chunks, segment_chunks, segments,
               Q: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The factors (B,H,pieces) after pieces made part of the gates (`chunk_gates` of prepare.py), in place. A segment
    that is cut back by more than exp(-steep) at once is wild. Grid (pieces / BLOCK, B * H)."""
    row = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = piece < pieces
    chunk = (piece + 1) * piece_chunks - 1
    at = row * chunks + chunk
    token = at * Q + Q - 1
    r = tl.load(factors + row * pieces + piece, mask=here, other=1.0)
    logs = tl.where(r > 0.0, tl.log(r), tl.where(r == 0.0, LEAST, r))  # NaN stays
    logs = tl.where(logs < LEAST, LEAST, logs)
    tl.store(cum + token, tl.load(cum + token, mask=here, other=0.0) + logs, mask=here)
    tl.store(totals + at, tl.load(totals + at, mask=here, other=0.0) + logs, mask=here)
    tl.store(scale + token, tl.load(scale + token, mask=here, other=0.0) * r, mask=here)
    far = here & (logs < -steep)
    tl.atomic_max(wild + row * segments + chunk // segment_chunks, far.to(tl.int32), mask=far)


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
