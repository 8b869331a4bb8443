"""Launches that find the factors of norm caps and make them part of the gates (`recurrence.ssd.kernels.caps`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor

from rnn_longctx.recurrence.ssd.kernels import caps as caps_
from rnn_longctx.recurrence.ssd.kernels.forward import segment_states
from rnn_longctx.recurrence.ssd.kernels.launch import LIMIT, Blocks, Prepared
from rnn_longctx.recurrence.ssd.operands import Operands

STEEP = 15.0  # nats by which a cap may cut a state back at once before the segment counts as wild
GROUP = 2**27  # bytes of states that a chain of caps takes up at once


def cap_factors(o: Operands, S: Tensor, ready: Prepared, c: Blocks) -> Tensor:
    """Return (B, H, T // every): the factor by which the state is cut back to the first cap after every `every`-th
    token, 1 for heads without a cap.

    A piece of `every` tokens is whole chunks; what each adds is found side by side, and only the chain walks in order.
    S: the state before, for the chain to move on."""
    assert o.caps is not None
    x, B, table, caps, every = o.x, o.B, o.table, o.caps[0], o.every
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    pieces, piece_chunks, chunks = length // every, every // c.Q, ready.totals.shape[2]
    factors = torch.ones(batch, heads, pieces, dtype=torch.float32, device=x.device)
    most = max(1, GROUP // (batch * heads * headdim * d_state * x.element_size()))
    BP = max(16, triton.next_power_of_2(headdim))
    inputs = (x, B, o.A, table, table, ready.cum, ready.scale, ready.totals)
    strides, shape = (*x.stride()[:3], *B.stride()[:3]), (length, heads, headdim, d_state, groups, chunks, piece_chunks)
    full = x.dtype == torch.float32
    shared = {"Q": c.Q, "BP": c.BP, "BN": c.BN, "HAS_DROP": False, "HAS_CAPS": True, "FULL": full, "num_warps": c.warps}
    stages, warps = chain_stages(BP * c.BN, x.dtype), min(16, max(4, BP * c.BN // 1024))
    for first in range(0, pieces, most):
        count = min(most, pieces - first)
        # in the inputs' type: only the norm of thousands of numbers, each rounded by itself, is asked for
        states = torch.empty(batch, heads, count, headdim, d_state, dtype=x.dtype, device=x.device)
        ends = torch.empty(batch, heads, count, dtype=torch.float32, device=x.device)
        segment_states[(count, heads, batch * triton.cdiv(headdim, c.BP))](
            *inputs, states, ends, caps, *strides, o.low, *shape, count + 1, first * piece_chunks, **shared
        )
        chain, sizes = (states, ends, caps, S, factors), (heads, headdim, d_state, count, first, pieces)
        caps_.cap_chain[(batch * heads,)](*chain, *sizes, BP=BP, BN=c.BN, STAGES=stages, num_warps=warps)
    return factors


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # always the same: memory is kept by stream


class Beside:
    """A second stream, that goes ahead of the first one; on a CPU there is but one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = _second(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self) -> AbstractContextManager:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def join(self, *made: Tensor) -> None:
        """The first stream waits for what the second holds by now, and will read what was made there."""
        if self.stream is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self.stream)
            for t in made:
                t.record_stream(here)


def chain_stages(size: int, dtype: torch.dtype) -> int:
    """Pieces of `size` numbers that `cap_chain` has on their way at once: 48 KiB of shared memory, 64 at most."""
    return 1 + max(1, min(3, 3 * 2**14 // (size * dtype.itemsize)))


def token_factors(o: Operands, ready: Prepared, c: Blocks) -> Tensor:
    """Return (B, H, chunks, Q): the factor by which each token's state is cut back. The operands have 1 or 2 caps, and
    each applies after token t where its own of `due` divides position + t + 1."""
    assert o.caps is not None
    x, B, caps, due = o.x, o.B, o.caps, [(k, o.position) for k in o.due]
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    chunks, BP = ready.totals.shape[2], max(16, triton.next_power_of_2(headdim))
    if len(due) == 1:
        caps, due = torch.cat([caps, torch.full_like(caps, float("inf"))]), [*due, (1, 0)]
    (every, offset), (other_every, other_offset) = ((k, position % k) for k, position in due)
    factors = torch.empty_like(ready.scale)
    inputs = (x, B, ready.cum, ready.scale, ready.totals, caps, o.initial, factors)
    strides, sizes = (*x.stride()[:3], *B.stride()[:3]), (length, heads, headdim, d_state, groups, chunks)
    steps, full = (every, offset, other_every, other_offset), x.dtype == torch.float32
    warps = token_warps(BP, c.BN, x.dtype)
    caps_.cap_tokens[(batch * heads,)](
        *inputs, *strides, *sizes, *steps, Q=c.Q, BP=BP, BN=c.BN, FULL=full, num_warps=warps
    )
    return factors


def token_warps(BP: int, BN: int, dtype: torch.dtype) -> int:
    """Every warp takes every step, so that more than the tiles need only stand in each other's way."""
    return 8 if BP * BN * dtype.itemsize > 2**14 else 4


def cut_back(ready: Prepared, factors: Tensor, every: int) -> None:
    """Make the factors part of the gates, in place: a capped recurrence is a plain one with other gates."""
    batch, heads, chunks, Q = ready.cum.shape
    pieces, BLOCK = factors.shape[2], 128
    gates, sizes = _gates(ready), (pieces, every // Q, chunks, ready.segment_chunks, ready.wild.shape[2])
    caps_.cut_pieces[(triton.cdiv(pieces, BLOCK), batch * heads)](
        factors, *gates, STEEP, *sizes, Q=Q, BLOCK=BLOCK, num_warps=4
    )


def cut_back_tokens(ready: Prepared, factors: Tensor) -> None:
    """The same for factors (B, H, chunks, Q) of every token."""
    batch, heads, chunks, Q = factors.shape
    rows, ROWS = batch * heads * chunks, 16
    gates, sizes = _gates(ready), (rows, chunks, ready.segment_chunks, ready.wild.shape[2])
    caps_.cut_tokens[(triton.cdiv(rows, ROWS),)](factors, *gates, LIMIT, *sizes, Q=Q, ROWS=ROWS, num_warps=4)


def _gates(ready: Prepared) -> tuple[Tensor, ...]:
    return ready.cum, ready.scale, ready.totals, ready.wild
