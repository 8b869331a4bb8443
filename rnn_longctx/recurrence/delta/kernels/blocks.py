"""The states of a delta rule from chunk to chunk in two levels, blocks of chunks and chunks in blocks: Triton kernels.

One walk over all chunks of a long text (see `kernels.states` for a chunk) is a chain of thousands of steps, and keeps
few of a GPU's processors busy. But what a block of chunks makes of the state before it is affine,

    S <- S M + U        M (N, N) is what the block makes of the identity if it writes nothing, U (P, N) what of zeros

So all blocks are walked side by side for M and U, the blocks are chained, a product each, and all blocks are walked
side by side again, from the states that they begin with. A norm cap at the end of each block is a factor of that chain.

What is kept for the whole text passes through every product of the chain. They are of bfloat16, with both matrices
split into two numbers (16 bits); tf32 has 10 bits, and tensor cores cut float32 down to them, always to less. Of 256
blocks in which half of the channels are never erased, the first is 2e-5 off, the second 4e-2 (2e-3 if it rounded).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnn_longctx.recurrence.delta.kernels.chunk import CHUNK, after, written
from rnn_longctx.recurrence.triton import interpreted

WIDEST = 128  # channels of keys: the chain holds a block's whole M
TILE = 64  # rows of a state that a program walks with
ROWS = (16, 32, 64)  # rows of a state that a program of the chain may hold, the first that lets all run at once

SIZES = ["T", "first", "every", "blocks"]  # nothing is aligned by them: one build serves all


@triton.jit(do_not_specialize=SIZES)
def _walk(
    k_ptr, w_ptr, u_ptr, g_ptr, v_ptr, h_ptr, state_ptr, move_ptr,
    T, first, every, blocks,
    G: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, PER_CHANNEL: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """BP rows of one head's state through one block of one row. k, w, u, g, v', h as in `kernels.states`; the first
    block is of `first` chunks, those behind it of `every`. state (B,blocks,H,P,N) float32, move (B,blocks,H,2,N,N)
    bfloat16. With MOVES: makes U (in state) and M (in move, as two numbers to be added); without: reads from the states
    that blocks begin with, and makes h and v'."""
    of_values: tl.constexpr = (P + BP - 1) // BP
    tiles: tl.constexpr = of_values + ((N + BP - 1) // BP if MOVES else 0)
    program = tl.program_id(0).to(tl.int64)
    tile, lane = (program % tiles).to(tl.int32), program // tiles
    head, block = lane % H, lane // H  # of all rows
    row, j = block // blocks, (block % blocks).to(tl.int32)
    chunks = tl.cdiv(T, C)
    of_move = tile >= of_values
    p = tl.where(of_move, tile - of_values, tile) * BP + tl.arange(0, BP)
    n, c = tl.arange(0, BN), tl.arange(0, C)
    in_p, in_n = p < tl.where(of_move, 0, P), n < N
    whole = in_p[:, None] & in_n[None, :]
    at = p[:, None] * N + n[None, :]
    if MOVES:
        S = tl.where(p[:, None] == n[None, :], tl.where(of_move, 1.0, 0.0), 0.0)
    else:
        S = tl.load(state_ptr + lane * P * N + at, mask=whole, other=0.0)  # (BP, BN)
    for i in range(tl.maximum(first + (j - 1) * every, 0), tl.minimum(first + j * every, chunks)):
        t = row * T + tl.cast(i, tl.int64) * C + c
        real = i * C + c < T
        of_keys, of_rows = real[:, None] & in_n[None, :], real[:, None] & in_p[None, :]
        v = written(w_ptr, u_ptr, S, t, head, p, n, of_keys, of_rows, H, P, N)
        if not MOVES:
            tl.store(h_ptr + ((row * chunks + i) * H + head) * P * N + at, S.to(h_ptr.dtype.element_ty), mask=whole)
            tl.store(v_ptr + (t[:, None] * H + head) * P + p[None, :], v.to(v_ptr.dtype.element_ty), mask=of_rows)
        last = row * T + tl.minimum(tl.cast(i, tl.int64) * C + C, T) - 1
        S = after(k_ptr, g_ptr, S, v, t, last, real, head, n, in_n, of_keys, G, H, N, PER_CHANNEL)
    if MOVES:
        tl.store(state_ptr + lane * P * N + at, S, mask=whole)
        high = S.to(move_ptr.dtype.element_ty)
        square = (p < tl.where(of_move, N, 0))[:, None] & in_n[None, :]
        tl.store(move_ptr + lane * 2 * N * N + at, high, mask=square)
        tl.store(move_ptr + lane * 2 * N * N + N * N + at, (S - high.to(tl.float32)).to(high.dtype), mask=square)


@triton.jit
def _factor(sums_ptr, cap, PARTS: tl.constexpr, BPARTS: tl.constexpr):
    """By what a head's state is multiplied, once all its programs have said the sum of their squares, -1 until then."""
    i = tl.arange(0, BPARTS)
    sums = tl.load(sums_ptr + i, mask=i < PARTS, other=0.0, volatile=True)
    while tl.min(sums, 0) < 0.0:
        sums = tl.load(sums_ptr + i, mask=i < PARTS, other=0.0, volatile=True)
    norm = tl.sqrt(tl.sum(sums, 0))
    return tl.where(norm > cap, cap / norm, 1.0)


@triton.jit(do_not_specialize=SIZES)
def _chain(
    state_ptr, move_ptr, start_ptr, end_ptr, cap_ptr, factor_ptr, sum_ptr,
    T, first, every, blocks,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, BPARTS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """BP rows of one head's state from block to block: in state (as in `_walk`) U becomes the state that each block
    begins with. start and end (B,H,P,N); sum (B,H,blocks,PARTS), -1 in all. Programs of one head wait for one another's
    squares while they multiply the next M, with what they hold before the cap: the factor of a state may come later."""
    program = tl.program_id(0).to(tl.int64)
    part, lane = (program % PARTS).to(tl.int32), program // PARTS
    row, head = lane // H, lane % H
    p, n, k = part * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, BN)
    inside = (p < P)[:, None] & (n < N)[None, :]
    square = (k < N)[:, None] & (n < N)[None, :]
    at, at_move = p[:, None] * N + n[None, :], k[:, None] * N + n[None, :]
    move_ptr += (row * blocks * H + head) * 2 * N * N
    sum_ptr += lane * blocks * PARTS
    factor_ptr += (row * tl.cdiv(T, C) + first - 1) * H + head  # of the first block's last chunk
    S = tl.load(start_ptr + lane * P * N + at, mask=inside, other=0.0)
    high_M = tl.load(move_ptr + at_move, mask=square, other=0.0)
    low_M = tl.load(move_ptr + N * N + at_move, mask=square, other=0.0)
    if CAPPED:
        cap = tl.load(cap_ptr + head)
    factor = 1.0
    for j in range(blocks):
        here = state_ptr + ((row * blocks + j) * H + head) * P * N + at
        U = tl.load(here, mask=inside, other=0.0)
        high = S.to(high_M.dtype)
        low = (S - high.to(tl.float32)).to(high_M.dtype)
        moved = tl.dot(high, high_M, tl.dot(high, low_M, tl.dot(low, high_M)))
        move_ptr += H * 2 * N * N  # the next block's M is on its way while the factor is waited for
        more = (k < tl.where(j + 1 < blocks, N, 0))[:, None] & (n < N)[None, :]
        high_M = tl.load(move_ptr + at_move, mask=more, other=0.0)
        low_M = tl.load(move_ptr + N * N + at_move, mask=more, other=0.0)
        if CAPPED:
            before = sum_ptr + (j - 1) * PARTS
            if j > 0:
                factor = _factor(before, cap, PARTS, BPARTS)
                tl.store(factor_ptr + tl.cast(j - 1, tl.int64) * every * H, factor, mask=part == 0)
        tl.store(here, S * factor, mask=inside)
        S = moved * factor + U
        if CAPPED:
            tl.store(sum_ptr + j * PARTS + part, tl.sum(S * S))
    if CAPPED:
        ends = (first + (blocks - 1) * every) * C
        if ends <= T:  # the last block is whole
            factor = _factor(sum_ptr + (blocks - 1) * PARTS, cap, PARTS, BPARTS)
            tl.store(factor_ptr + tl.cast(blocks - 1, tl.int64) * every * H, factor, mask=part == 0)
            S *= factor
    tl.store(end_ptr + lane * P * N + at, S, mask=inside)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def chain_rows(lanes: int, headdim: int, device: torch.device) -> int | None:
    """Return how many rows of a state a program of the chain holds, with `lanes` heads of all rows of a batch, or None
    where the programs would not all run at once, so that some would wait for others that cannot begin."""
    if interpreted():  # programs run one after another
        return triton.next_power_of_2(headdim)
    return next((n for n in ROWS if lanes * triton.cdiv(headdim, n) <= _processors(device)), None)


def pays(u: Tensor, every: int) -> bool:
    """Return whether blocks of `every` chunks are read sooner than all chunks in one walk: they are read twice and M is
    made, which pays where the one walk is long and keeps less than half of a GPU's processors busy."""
    batch, length, heads, headdim = u.shape
    busy = batch * heads * triton.cdiv(headdim, TILE)
    return 2 * busy <= _processors(u.device) and length >= 8 * every * CHUNK


def states_by_blocks(
    k: Tensor, w: Tensor, u: Tensor, g: Tensor, start: Tensor, first: int, every: int, caps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Walk over the chunks of T tokens in two levels.

    Args:
        k, w, u, g: as in `kernels.states`; all contiguous, N of at most WIDEST.
        start: (B, H, P, N) float32; `chain_rows` must not be None for it.
        first, every: chunks of the first block and of those behind it; the last may end early.
        caps: (H) float32, norms that hold at the end of every whole block, or None.
    Returns:
        as `kernels.states.capped_states`; without caps no factors.
    """
    batch, length, heads, headdim = u.shape
    d_state, chunks = w.shape[3], triton.cdiv(length, CHUNK)
    blocks = 1 + max(0, triton.cdiv(chunks - first, every))
    states = start.new_empty(batch, blocks, heads, headdim, d_state)
    half = torch.float16 if interpreted() else torch.bfloat16  # the interpreter multiplies no bfloat16
    moves = start.new_empty(batch, blocks, heads, 2, d_state, d_state, dtype=half)
    h, v, end = u.new_empty(batch, chunks, heads, headdim, d_state), torch.empty_like(u), torch.empty_like(start)
    BP, BN = (max(16, triton.next_power_of_2(size)) for size in (headdim, d_state))
    rows = chain_rows(batch * heads, headdim, u.device)
    assert rows is not None
    steps = (length, first, every, blocks)

    def walk(moving: bool) -> None:
        tile = min(TILE, BP)
        tiles = triton.cdiv(headdim, tile) + (triton.cdiv(d_state, tile) if moving else 0)
        _walk[(tiles * heads * blocks * batch,)](
            k, w, u, g, v, h, states, moves, *steps, k.shape[2], heads, headdim, d_state, tile, BN, CHUNK,
            g.ndim == 4, moving, num_warps=4, num_stages=2,
        )  # fmt: skip

    walk(moving=True)
    rows = max(16, min(rows, BP))
    parts = triton.cdiv(headdim, rows)
    factors, sums = None, start
    if caps is not None:
        factors = start.new_ones(batch, chunks, heads)
        sums = start.new_full((batch, heads, blocks, parts), -1.0)
    _chain[(parts * heads * batch,)](
        states, moves, start, end, start if caps is None else caps, start if factors is None else factors, sums,
        *steps, heads, headdim, d_state, rows, BN, CHUNK, parts, triton.next_power_of_2(parts), caps is not None,
        num_warps=8, num_stages=1, launch_cooperative_grid=caps is not None and parts > 1,
    )  # fmt: skip
    walk(moving=False)
    return h, v, end, factors
