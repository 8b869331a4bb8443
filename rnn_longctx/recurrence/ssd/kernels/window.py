"""What a sliding window of r tokens adds to a scan of the stream's blocks of r tokens, each begun at zero.

A token at offset o of its block sees, beside its own block up to o, the block before from offset o + 1 on. With head_t
the log-decay of its block up to and with it, and tail_s that of the block before after its token s,

    y_t += exp(head_t) sum over s with offset(s) > o of exp(tail_s) scale_s (C_t . B_s) x_s

Two blocks are cut into the same chunks of Q tokens, so the sum is a state, of the whole chunks after this one, and a
masked product with one chunk. Chunks that are beyond the horizon (`forward.reach`), from either side, are not read.

1. `block_spans`: log-decays between chunks and the edges of their block, and the chunks within reach of each edge.
2. `add_block_before`: blocks whose predecessor lies in the same call. Chunks are walked backwards, S in registers.
3. `add_carried`: tokens whose block before lies in the carry, which holds states at its chunks: all chunks at once.
4. `turn_block`: what the carry holds of a block that later tokens see.

Rows are blocks: x (rows, r, H, P) is a view of the stream. Offsets are int64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnn_longctx.recurrence.ssd.kernels.forward import reach, tile
from rnn_longctx.recurrence.ssd.kernels.launch import Blocks, Prepared
from rnn_longctx.recurrence.ssd.kernels.launcher import Launched
from rnn_longctx.recurrence.ssd.kernels.prepare import add_product, product
from rnn_longctx.recurrence.ssd.operands import Operands

SPAN = 128  # chunks whose log-decays are summed at once
WARPS = 4


@Launched
@triton.jit
def block_spans(A, table, totals, until, rest, near, kept, low, H, chunks, SPAN: tl.constexpr):
    """Of each row and head: until, rest (rows,H,chunks), log-decay of the chunks before and after each; near, how
    many chunks still hear what was before the block; kept, the first chunk that is still heard after it.
    Grid (H, rows)."""
    h, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    horizon = reach(A, table, h, H, low)
    at, i = (row * H + h) * chunks, tl.arange(0, SPAN)
    none = tl.zeros((SPAN,), totals.dtype.element_ty)
    passed, count = tl.sum(none, 0), tl.sum(tl.zeros((SPAN,), tl.int32), 0)
    for first in range(0, chunks, SPAN):
        inside = first + i < chunks
        total = tl.load(totals + at + first + i - 1, mask=inside & (first + i > 0), other=0.0)
        sums = passed + tl.cumsum(total, 0)
        tl.store(until + at + first + i, sums, mask=inside)
        count += tl.sum((inside & ((sums <= horizon) == 0)).to(tl.int32), 0)  # a NaN is heard
        passed += tl.sum(total, 0)
    tl.store(near + row * H + h, count)

    passed, count = tl.sum(none, 0), tl.sum(tl.zeros((SPAN,), tl.int32), 0)
    for first in range(0, chunks, SPAN):  # from the last chunk on
        inside = first + i < chunks
        total = tl.load(totals + at + chunks - first - i, mask=inside & (first + i > 0), other=0.0)
        sums = passed + tl.cumsum(total, 0)
        tl.store(rest + at + chunks - 1 - first - i, sums, mask=inside)
        count += tl.sum((inside & ((sums <= horizon) == 0)).to(tl.int32), 0)
        passed += tl.sum(total, 0)
    tl.store(kept + row * H + h, chunks - count)


@triton.jit
def decayed(x, scale, cum, totals, rest, sxb, sxt, sxh, k, h, H, chunk, column, T, P, chunks,
            Q: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """(BP, Q) float32: a chunk's inputs times their scale, decayed to the end of block k."""
    at = (k * H + h) * chunks + chunk
    q = tl.arange(0, Q)
    left = tl.load(totals + at) - tl.load(cum + at * Q + q) + tl.load(rest + at)
    x_QP = tile(x, sxb, sxt, sxh, k, chunk * Q, h, column, T, P, Q, BP, False)
    return tl.trans(x_QP).to(tl.float32) * (tl.load(scale + at * Q + q) * tl.exp(left.to(tl.float32)))[None, :]


@Launched
@triton.jit
def add_block_before(x, B, C, y, cum, scale, totals, until, rest, near, kept,
                     sxb, sxt, sxh, sBb, sBt, sBg, sCb, sCt, sCg, syb, syt, syh, T, H, P, N, G, chunks, blocks,
                     Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    """y of every block but the first of `blocks` that follow each other. T is r. Grid (H, P / BP, pairs of blocks)."""
    h, pair = tl.program_id(0).to(tl.int64), tl.program_id(2)
    column = tl.program_id(1) * BP
    k = (pair // (blocks - 1) * blocks + pair % (blocks - 1)).to(tl.int64)  # the block before; k + 1 is read
    q, p, g = tl.arange(0, Q), column + tl.arange(0, BP), h // (H // G)
    heard = tl.load(near + (k + 1) * H + h)
    nothing = tl.load(kept + k * H + h)

    S = tl.zeros((BP, BN), tl.float32)
    first = tl.maximum(heard, nothing)
    for i in tl.range(0, chunks - first, num_stages=STAGES):  # chunks that no token of their own offsets needs
        chunk = chunks - 1 - i
        Z = decayed(x, scale, cum, totals, rest, sxb, sxt, sxh, k, h, H, chunk, column, T, P, chunks, Q, BP)
        B_QN = tile(B, sBb, sBt, sBg, k, chunk * Q, g, 0, T, N, Q, BN, False)
        S = add_product(Z.to(B_QN.dtype), B_QN, S, FULL)
    for i in tl.range(0, heard, num_stages=STAGES):
        chunk = heard - 1 - i
        B_QN = tile(B, sBb, sBt, sBg, k, chunk * Q, g, 0, T, N, Q, BN, False)
        C_QN = tile(C, sCb, sCt, sCg, k + 1, chunk * Q, g, 0, T, N, Q, BN, False)
        Z = decayed(x, scale, cum, totals, rest, sxb, sxt, sxh, k, h, H, chunk, column, T, P, chunks, Q, BP)
        Z = Z.to(B_QN.dtype)
        inner = product(B_QN, tl.trans(C_QN), FULL)
        inner = tl.where(q[:, None] > q[None, :], inner, 0.0).to(B_QN.dtype)
        Y = add_product(Z, inner, product(S.to(B_QN.dtype), tl.trans(C_QN), FULL), FULL)  # (P, Q)
        S = add_product(Z, B_QN, S, FULL)
        at = ((k + 1) * H + h) * chunks + chunk
        Y *= tl.exp((tl.load(until + at) + tl.load(cum + at * Q + q)).to(tl.float32))[None, :]
        t = h * 0 + chunk * Q + q  # 64-bit
        here = y + (k + 1) * syb + h * syh + t[:, None] * syt + p[None, :]
        inside = (t < T)[:, None] & (p < P)[None, :]
        y_QP = tl.load(here, mask=inside, other=0.0).to(tl.float32) + tl.trans(Y)
        tl.store(here, y_QP.to(y.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def add_carried(C, y, A, table, cum, until, head, x_before, B_before, states, sCb, sCt, sCg, syb, syt, syh, low,
                T, offset, size, H, P, N, G, chunks, blocks, held,
                Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr,
                EACH: tl.constexpr):  # fmt: skip
    """y of T tokens from `offset` of their block on, the first of `blocks` blocks in a row. The carry: head (B,H),
    log-decay of the block's tokens before these; x_before (B,r,H,P), B_before (B,r,G,N), and at every EACH-th token
    the `held` states (B,held,H,P,N). C and y begin at the first of the T tokens.
    Grid (chunks that hold the tokens, H, B * P / BP)."""
    parts = tl.cdiv(P, BP)
    h, b = tl.program_id(1).to(tl.int64), (tl.program_id(2) // parts).to(tl.int64)
    q, p, n = tl.arange(0, Q), tl.program_id(2) % parts * BP + tl.arange(0, BP), tl.arange(0, BN)
    g = h // (H // G)
    chunk = offset // Q + tl.program_id(0)
    o = h * 0 + chunk * Q + q  # 64-bit
    t = o - offset
    ours = (t >= 0) & (t < T)
    at = (b * blocks * H + h) * chunks
    into = tl.load(until + at + t // Q, mask=ours, other=0.0) + tl.load(cum + at * Q + t, mask=ours, other=0.0)
    into = (into + tl.load(head + b * H + h)).to(tl.float32)
    if tl.max(tl.where(ours & ((into <= reach(A, table, h, H, low)) == 0), 1, 0), 0) == 0:
        return
    C_QN = tl.load(
        C + b * sCb + g * sCg + t[:, None] * sCt + n[None, :], mask=ours[:, None] & (n < N)[None, :], other=0.0
    )
    dtype: tl.constexpr = C_QN.dtype
    state = chunk * Q // EACH
    S = tl.load(
        states + ((b * held + state) * H + h) * P * N + p[:, None] * N + n[None, :],
        mask=(p < P)[:, None] & (n < N)[None, :],
        other=0.0,
    ).to(tl.float32)
    if EACH > Q:
        for later in tl.range(chunk + 1, (state + 1) * (EACH // Q), num_stages=1):  # up to where the state begins
            x_QP = carried_rows(x_before, b, later, h, H, size, p, P, Q, dtype)
            B_QN = carried_rows(B_before, b, later, g, G, size, n, N, Q, dtype)
            S = add_product(tl.trans(x_QP), B_QN, S, FULL)
    x_QP = carried_rows(x_before, b, chunk, h, H, size, p, P, Q, dtype)
    B_QN = carried_rows(B_before, b, chunk, g, G, size, n, N, Q, dtype)
    inner = product(B_QN, tl.trans(C_QN), FULL)
    inner = tl.where(q[:, None] > q[None, :], inner, 0.0).to(dtype)
    Y = add_product(tl.trans(x_QP), inner, product(S.to(dtype), tl.trans(C_QN), FULL), FULL)
    Y *= tl.exp(into)[None, :]
    here = y + b * blocks * syb + h * syh + t[:, None] * syt + p[None, :]
    inside = ours[:, None] & (p < P)[None, :]
    y_QP = tl.load(here, mask=inside, other=0.0).to(tl.float32) + tl.trans(Y)
    tl.store(here, y_QP.to(y.dtype.element_ty), mask=inside)


@triton.jit
def carried_rows(source, b, chunk, h, H, size, column, columns, Q: tl.constexpr, dtype: tl.constexpr):
    """A chunk of rows of a contiguous (B, r, H, columns)."""
    o = b * 0 + chunk * Q + tl.arange(0, Q)  # 64-bit
    at = ((b * size + o) * H + h) * columns
    inside = (o < size)[:, None] & (column < columns)[None, :]
    return tl.load(source + at[:, None] + column[None, :], mask=inside, other=0.0).to(dtype)


@Launched
@triton.jit
def turn_block(x, B, cum, scale, totals, rest, x_before, states, sxb, sxt, sxh, sBb, sBt, sBg,
               T, H, P, N, G, chunks, blocks, held,
               Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr, EACH: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """Of the last of `blocks` blocks in a row: x_before (B,r,H,P), its inputs decayed to its end, and states
    (B,held,H,P,N), [:, i] what its tokens from (i + 1) * EACH on add up to there. Grid (H, P / BP, B)."""
    h, b, column = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.program_id(1) * BP
    p, n, q = column + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    k, g = b * blocks + blocks - 1, h // (H // G)
    inside = (p[:, None] < P) & (n[None, :] < N)
    S = tl.zeros((BP, BN), tl.float32)
    for i in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - i
        state = h * 0 + chunk * Q // EACH
        here = ((b * held + state) * H + h) * P * N + p[:, None] * N + n[None, :]
        tl.store(states + here, S, mask=inside & ((i == 0) | ((chunk + 1) * Q % EACH == 0)))
        B_QN = tile(B, sBb, sBt, sBg, k, chunk * Q, g, 0, T, N, Q, BN, False)
        Z = decayed(x, scale, cum, totals, rest, sxb, sxt, sxh, k, h, H, chunk, column, T, P, chunks, Q, BP)
        t = h * 0 + chunk * Q + q  # 64-bit
        tl.store(
            x_before + ((b * T + t) * H + h)[:, None] * P + p[None, :],
            tl.trans(Z),
            mask=(t < T)[:, None] & (p < P)[None, :],
        )
        S = add_product(Z.to(B_QN.dtype), B_QN, S, FULL)


class Spans:
    """What is in reach of what, in the chunks of a scan (`ready`): the outputs of `block_spans`."""

    def __init__(self, o: Operands, ready: Prepared) -> None:
        rows, heads, chunks = ready.totals.shape
        self.ready = ready
        self.until, self.rest = torch.empty_like(ready.totals), torch.empty_like(ready.totals)
        self.near, self.kept = torch.empty(2, rows, heads, dtype=torch.int32, device=o.x.device)
        arrays = (o.A, o.table, ready.totals, self.until, self.rest, self.near, self.kept)
        block_spans[(heads, rows)](*arrays, o.low, heads, chunks, SPAN=SPAN, num_warps=4)


def pairs(o: Operands, y: Tensor, spans: Spans, blocks: int, c: Blocks) -> None:
    """Add to y (rows,r,H,P), rows of `blocks` blocks each, what they see of the block before, within the row."""
    x, B, C, ready = o.x, o.B, o.C, spans.ready
    rows, size, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    if blocks == 1:
        return
    arrays = (x, B, C, y, ready.cum, ready.scale, ready.totals, spans.until, spans.rest, spans.near, spans.kept)
    strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *y.stride()[:3])
    sizes = (size, heads, headdim, d_state, groups, ready.totals.shape[2], blocks)
    tiles = {"Q": c.Q, "BP": c.BP, "BN": c.BN, "FULL": x.dtype == torch.float32, "STAGES": c.stages}
    grid = (heads, triton.cdiv(headdim, c.BP), rows // blocks * (blocks - 1))
    add_block_before[grid](*arrays, *strides, *sizes, **tiles, num_warps=WARPS)


class Carried(NamedTuple):
    """The block in the carry, as `add_carried` reads it, and at which offset of the next one tokens follow."""

    head: Tensor  # (B, H) log-decay of the block's tokens before these
    x_before: Tensor  # (B, r, H, P)
    B_before: Tensor  # (B, r, G, N)
    states: Tensor  # (B, held, H, P, N)
    each: int  # tokens from one of the states to the next
    offset: int


def carried(o: Operands, y: Tensor, before: Carried, spans: Spans, blocks: int, c: Blocks) -> None:
    """Add to y (rows,T,H,P), at the first of every `blocks` rows, what its tokens see of the block in the carry."""
    C, ready, offset, (length, heads, headdim) = o.C, spans.ready, before.offset, y.shape[1:]
    groups, d_state = C.shape[2:]
    batch, size = before.x_before.shape[:2]
    count = triton.cdiv(offset + length, c.Q) - offset // c.Q
    BP = min(c.BP, 32)
    held = [t.contiguous() for t in before[:4]]
    strides = (blocks * C.stride(0), *C.stride()[1:3], *y.stride()[:3])
    sizes = (heads, headdim, d_state, groups, ready.totals.shape[2], blocks, before.states.shape[1])
    tiles = {"Q": c.Q, "BP": BP, "BN": c.BN, "FULL": y.dtype == torch.float32, "EACH": before.each}
    arrays = (C, y, o.A, o.table, ready.cum, spans.until, *held)
    add_carried[(count, heads, batch * triton.cdiv(headdim, BP))](
        *arrays, *strides, o.low, length, offset, size, *sizes, **tiles, num_warps=WARPS
    )


def turned(o: Operands, spans: Spans, each: int, blocks: int, c: Blocks) -> tuple[Tensor, Tensor]:
    """Return x_before and states of the last of every `blocks` rows of x, see `turn_block`."""
    x, B, ready = o.x, o.B, spans.ready
    rows, size, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    batch, held = rows // blocks, triton.cdiv(size, each)
    x_before = torch.empty(batch, size, heads, headdim, dtype=torch.float32, device=x.device)
    states = torch.empty(batch, held, heads, headdim, d_state, dtype=torch.float32, device=x.device)
    BP = min(c.BP, 16)  # few rows and many programs: one block is walked here, in order
    arrays = (x, B, ready.cum, ready.scale, ready.totals, spans.rest, x_before, states)
    strides = (*x.stride()[:3], *B.stride()[:3])
    sizes = (size, heads, headdim, d_state, groups, ready.totals.shape[2], blocks, held)
    tiles = {"Q": c.Q, "BP": BP, "BN": c.BN, "FULL": x.dtype == torch.float32, "EACH": each, "STAGES": c.stages}
    grid = (heads, triton.cdiv(headdim, BP), batch)
    turn_block[grid](*arrays, *strides, *sizes, **tiles, num_warps=c.warps)
    return x_before, states
