"""Launches of the gradients (`recurrence.ssd.kernels.backward`)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rnn_longctx.recurrence.ssd.kernels import backward
from rnn_longctx.recurrence.ssd.kernels.forward import segment_states
from rnn_longctx.recurrence.ssd.kernels.launch import Blocks, prepare_chunks, slots
from rnn_longctx.recurrence.ssd.kernels.launch_caps import cut_back, cut_back_tokens


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


def scan_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
                  table: Tensor, pad: Tensor | None, drop: Tensor | None, initial: Tensor, low: float,
                  high: float, softplus: bool, dy: Tensor, dfinal: Tensor, c: Blocks,
                  factors: Tensor | None, every: int) -> Grads:  # fmt: skip
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    many = batch * heads * triton.cdiv(length, 2 * BACKWARD_CHUNKS * c.Q) >= 2 * slots(x.device)
    per_segment = (1 + many) * BACKWARD_CHUNKS
    ready = prepare_chunks(dt, A, B, C, dt_bias, table, pad, drop, low, high, softplus, headdim, c, per_segment)
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
    states, ends = empty(batch, heads, segments - 1, headdim, d_state), empty(batch, heads, segments)
    if segments > 1:
        segment_states[(segments - 1, heads, parts)](
            x, B, A, table, mark, ready.cum, ready.scale, ready.totals, states, ends, table, *x.stride()[:3],
            *B.stride()[:3], low, *sizes, 0, HAS_CAPS=False, **shared,
        )  # fmt: skip
        backward.fold_states[folded](initial, states, ends, segments, PN, 1024)
    grads = empty(batch, heads, segments, headdim, d_state)
    backward.segment_grads[(segments, heads, parts)](
        dy, C, A, table, mark, ready.cum, ready.totals, grads, ends, *dy.stride()[:3], *C.stride()[:3], low, *sizes,
        **shared,
    )  # fmt: skip
    first = empty(batch, heads, headdim, d_state)
    backward.fold_grads[folded](dfinal, grads, ends, first, segments, PN, 1024)

    slab = min(segments, max(1, SLAB // (2 * parts * heads * size * c.BP * c.BN * x.element_size())))
    width, splits = min(slab * size, chunks), 1
    while batch * groups * splits * width < 3 * slots(x.device) and splits < heads // groups:
        splits *= 2
    at_chunks = torch.empty(2, batch, heads, blocks_P, width, c.BP, c.BN, dtype=x.dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dB, dC = (empty(splits, batch, length, groups, d_state) for _ in range(2))
    gates, dtotal = empty(2, blocks_P, batch, heads, chunks * c.Q), empty(blocks_P, batch, heads, chunks)
    has_D = D is not None and D.ndim == 1
    dD = empty(blocks_P, batch, heads, chunks if has_D else 0)
    of_x, of_B, of_C, of_y = (t.stride()[:3] for t in (x, B, C, dy))
    halves = {**shared, "STAGES": c.stages, "BH": triton.next_power_of_2(heads)}
    for at in range(0, segments, slab):
        here = min(slab, segments - at)
        backward.chunk_states[(here, heads, parts)](
            x, B, mark, ready.cum, ready.scale, ready.totals, ready.wild, initial, states, at_chunks[0], *of_x, *of_B,
            *sizes, at, width, **shared,
        )  # fmt: skip
        backward.chunk_state_grads[(here, heads, parts)](
            dy, C, mark, ready.cum, ready.totals, ready.wild, grads, *at_chunks, dtotal, *of_y, *of_C, *sizes, at,
            width, **shared,
        )  # fmt: skip
        count = min(here * size, chunks - at * size)
        grid, where = (count, splits * groups, batch), (*sizes, at * size, width, splits)
        for wild in (False, True):
            backward.output_grads[grid](
                x, B, C, ready.gram, dy, ready.cum, ready.scale, ready.totals, mark, ready.wild, at_chunks[0], dB, dC,
                *gates, *of_x, *of_B, *of_C, *of_y, *where, **halves, WILD=wild,
            )  # fmt: skip
        for wild in (False, True):
            backward.input_grads[grid](
                x, B, ready.gram, dy, ready.cum, ready.scale, ready.totals, D if has_D else table, mark, ready.wild,
                at_chunks[1], dtotal, dx, dB , *gates, dD, *of_x, *of_B, *of_y, *where, **halves,
                WILD=wild, HAS_D=has_D,
            )  # fmt: skip
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
    BT, BH = 128, min(8, triton.next_power_of_2(heads))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    sums = empty(2, batch, triton.cdiv(length, BT), heads)
    backward.gate_grads[(triton.cdiv(length, BT), triton.cdiv(heads, BH), batch)](
        dt, A, table if dt_bias is None else dt_bias, table, table if pad is None else pad, *of_gates, ddt, *sums,
        low, high, *dt.stride(), length, heads, chunks * c.Q, BT=BT, BH=BH, HAS_BIAS=dt_bias is not None,
        SOFTPLUS=softplus, HAS_PAD=pad is not None, num_warps=4,
    )  # fmt: skip
    dA, dbias = (part.sum((0, 1)) for part in sums)
    dB, dC = (part.sum(0) if splits > 1 else part[0] for part in (dB, dC))
    return Grads(dx, ddt, dA, dB, dC, dD, dbias, first)
