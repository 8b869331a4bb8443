"""Launches of the gradients (`recurrence.ssd.kernels.backward`)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rnn_longctx.recurrence.ssd.kernels import backward, launch
from rnn_longctx.recurrence.ssd.kernels.forward import segment_states
from rnn_longctx.recurrence.ssd.kernels.launch_caps import cut_back, cut_back_tokens
from rnn_longctx.recurrence.ssd.operands import GradOperands


class Grads(NamedTuple):
    x: Tensor  # as x
    dt: Tensor  # as dt
    A: Tensor  # (H) float32, and so the rest
    B: Tensor  # (B, T, G, N)
    C: Tensor
    D: Tensor  # as D
    dt_bias: Tensor  # (H)
    initial: Tensor  # (B, H, P, N)


BACKWARD_CHUNKS = 16  # a segment, or twice as many; each costs two states (P, N) in float32
SLAB = 2**30  # bytes that the states and their gradients at a slab's chunks may take


def scan_backward(g: GradOperands) -> Grads:
    x, A, B, C, D, table, drop, every = g.x, g.A, g.B, g.C, g.D, g.table, g.drop, g.every
    dy, dfinal, factors = g.dy.contiguous(), g.dfinal.contiguous(), g.factors if g.factors.shape[2] else None
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    c = launch.blocks(headdim, d_state, x.dtype, every)
    many = batch * heads * triton.cdiv(length, 2 * BACKWARD_CHUNKS * c.Q) >= 2 * launch.slots(x.device)
    ready = launch.prepare_chunks(g, c, (1 + many) * BACKWARD_CHUNKS)
    if factors is not None:  # of pieces of `every` tokens, or of every token
        if every:
            cut_back(ready, factors, every)
        else:
            cut_back_tokens(ready, factors)
    chunks, segments, size = ready.totals.shape[2], ready.wild.shape[2], ready.segment_chunks
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    full, blocks_P = x.dtype == torch.float32, triton.cdiv(headdim, c.BP)
    parts, PN = batch * blocks_P, headdim * d_state
    shared = {"Q": c.Q, "BP": c.BP, "BN": c.BN, "HAS_DROP": drop is not None, "FULL": full, "num_warps": c.warps}
    sizes = (length, heads, headdim, d_state, groups, chunks, size, segments)
    mark, folded = table if drop is None else drop, (batch * heads, triton.cdiv(PN, 1024))
    cum, scale, totals, wild_segments = ready.cum, ready.scale, ready.totals, ready.wild
    of_x, of_B, of_C, of_y = (t.stride()[:3] for t in (x, B, C, dy))
    states, ends = empty(batch, heads, segments - 1, headdim, d_state), empty(batch, heads, segments)
    arrays: tuple[Any, ...]
    if segments > 1:
        arrays = (x, B, A, table, mark, cum, scale, totals, states, ends, table)
        segment_states[(segments - 1, heads, parts)](*arrays, *of_x, *of_B, g.low, *sizes, 0, HAS_CAPS=False, **shared)
        backward.fold_states[folded](g.initial, states, ends, segments, PN, 1024)
    grads = empty(batch, heads, segments, headdim, d_state)
    arrays = (dy, C, A, table, mark, cum, totals, grads, ends)
    backward.segment_grads[(segments, heads, parts)](*arrays, *of_y, *of_C, g.low, *sizes, **shared)
    first = empty(batch, heads, headdim, d_state)
    backward.fold_grads[folded](dfinal, grads, ends, first, segments, PN, 1024)

    slab = min(segments, max(1, SLAB // (2 * parts * heads * size * c.BP * c.BN * x.element_size())))
    width, splits = min(slab * size, chunks), 1
    while batch * groups * splits * width < 3 * launch.slots(x.device) and splits < heads // groups:
        splits *= 2
    at_chunks = torch.empty(2, batch, heads, blocks_P, width, c.BP, c.BN, dtype=x.dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dB, dC = (empty(splits, batch, length, groups, d_state) for _ in range(2))
    gates, dtotal = empty(2, blocks_P, batch, heads, chunks * c.Q), empty(blocks_P, batch, heads, chunks)
    has_D = D is not None and D.ndim == 1
    dD, skip = empty(blocks_P, batch, heads, chunks if has_D else 0), D if has_D else table
    halves = {**shared, "STAGES": c.stages, "BH": triton.next_power_of_2(heads)}
    for at in range(0, segments, slab):
        here = min(slab, segments - at)
        arrays = (x, B, mark, cum, scale, totals, wild_segments, g.initial, states, at_chunks[0])
        backward.chunk_states[(here, heads, parts)](*arrays, *of_x, *of_B, *sizes, at, width, **shared)
        arrays = (dy, C, mark, cum, totals, wild_segments, grads, *at_chunks, dtotal)
        backward.chunk_state_grads[(here, heads, parts)](*arrays, *of_y, *of_C, *sizes, at, width, **shared)
        count = min(here * size, chunks - at * size)
        grid, where = (count, splits * groups, batch), (*sizes, at * size, width, splits)
        arrays = (x, B, C, ready.gram, dy, cum, scale, totals, mark, wild_segments, at_chunks[0], dB, dC, *gates)
        for wild in (False, True):
            backward.output_grads[grid](*arrays, *of_x, *of_B, *of_C, *of_y, *where, **halves, WILD=wild)
        inputs = (x, B, ready.gram, dy, cum, scale, totals, skip, mark, wild_segments, at_chunks[1])
        arrays = (*inputs, dtotal, dx, dB, *gates, dD)
        for wild in (False, True):
            backward.input_grads[grid](*arrays, *of_x, *of_B, *of_y, *where, **halves, WILD=wild, HAS_D=has_D)
    if D is not None and D.ndim == 2:  # rare: a pass of its own
        dx += dy * D.to(dy.dtype)
        dD = (dy.float() * x).sum((0, 1))
    else:
        dD = dD.sum((0, 1, 3))
    of_gates = gates.sum(1) if blocks_P > 1 else gates[:, 0]  # (2, B, H, chunks * Q)
    if factors is not None:  # the gradient to the scale before it was cut back
        if every:
            of_gates[1, ..., every - 1 : factors.shape[2] * every : every] *= factors
        else:
            of_gates[1] *= factors.flatten(2)
    ddt, sums = _gate_grads(g, of_gates)
    dA, dbias = (part.sum((0, 1)) for part in sums)
    dB, dC = (part.sum(0) if splits > 1 else part[0] for part in (dB, dC))
    return Grads(dx, ddt, dA, dB, dC, dD, dbias, first)


def _gate_grads(g: GradOperands, of_gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of dt, and those of A and dt_bias (2, B, blocks of tokens, H), from those of log-decay and
    scale (2, B, H, tokens)."""
    dt, table, (batch, length, heads) = g.dt, g.table, g.dt.shape
    BT, BH = 128, min(8, triton.next_power_of_2(heads))
    grid = (triton.cdiv(length, BT), triton.cdiv(heads, BH), batch)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    sums = torch.empty(2, batch, grid[0], heads, dtype=torch.float32, device=dt.device)
    bias, pad = (table if t is None else t for t in (g.dt_bias, g.pad))
    given = {"HAS_BIAS": g.dt_bias is not None, "SOFTPLUS": g.softplus, "HAS_PAD": g.pad is not None}
    arrays, sizes = (dt, g.A, bias, table, pad, *of_gates, ddt, *sums), (length, heads, of_gates.shape[3])
    backward.gate_grads[grid](*arrays, g.low, g.high, *dt.stride(), *sizes, BT=BT, BH=BH, **given, num_warps=4)
    return ddt, sums
