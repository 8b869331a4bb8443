"""Which blocks the kernels run with, and their launches. Tensors in, tensors out; no policy is read here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rnn_longctx.ssd.kernels import backward, forward, prepare

LIMIT = 60.0  # nats by which a factor of `chunk_scan` may leave 1; bfloat16 and float32 end at exp(88)
STEEP = 20.0  # nats by which a cap may cut a state back at once before the segment counts as wild
DESCRIBED = 2**27  # elements of x from which describing the arrays to the copy engine pays


@dataclass(frozen=True)
class Blocks:
    Q: int  # tokens a chunk
    BP: int  # rows of the state that a program holds
    BN: int  # its columns: all of d_state
    warps: int
    stages: int


class Prepared(NamedTuple):
    """What forward and backward share. float32 but for gram, and for the sums of float32 inputs, which are float64."""

    cum: Tensor  # (B, H, chunks, Q) running sums of log-decay
    scale: Tensor  # (B, H, chunks, Q) input scales
    totals: Tensor  # (B, H, chunks) log-decay of a chunk, FLOOR at a token at least
    spent: Tensor  # (B, H, chunks) the same without FLOOR
    gram: Tensor  # (B, G, chunks, Q, Q): C_t . B_s at [s, t], in the inputs' type
    wild: Tensor  # (B, H, segments) int32
    segment_chunks: int


@cache
def blocks(headdim: int, d_state: int, dtype: torch.dtype, every: int | None = None) -> Blocks:
    """Fixed by shape and type, not searched for: a new shape costs one compilation and no timing. `every` tokens a cap
    applies: whole chunks."""
    c = _blocks(headdim, d_state, dtype)
    return c if every is None else replace(c, Q=min(c.Q, every & -every))


def _blocks(headdim: int, d_state: int, dtype: torch.dtype) -> Blocks:
    BN = max(16, triton.next_power_of_2(d_state))
    BP = min(max(16, triton.next_power_of_2(headdim)), 64)
    if dtype == torch.float32:
        return Blocks(32, min(BP, 32 if BN <= 128 else 16), BN, 4, 1)
    if BN >= 256:
        return Blocks(32, BP, BN, 8, 2 if BN == 256 else 1)
    return Blocks(64, BP, BN, 4, 2)


@cache
def _slots(device: torch.device) -> int:
    """Programs of `chunk_scan` that run at once: two on a processor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(maxsize=4096)
def segment_chunks(rows: int, chunks: int, device: torch.device) -> int:
    """Chunks a segment, for `rows` programs a segment: the count of segments that leaves the fewest slots idle, with
    2% added for each since a segment's first state must be found; never under 4 chunks."""
    slots = _slots(device)
    best = min(range(1, 65), key=lambda n: (-(-rows * n // slots) * slots / (rows * n)) * (1 + 0.02 * n))
    return max(-(-chunks // best), min(4, chunks))


def prepare_chunks(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, table: Tensor,
                   pad: Tensor | None, drop: Tensor | None, low: float, high: float, softplus: bool, headdim: int,
                   c: Blocks, per_segment: int | None = None, capped: bool = False) -> Prepared:  # fmt: skip
    batch, length, heads = dt.shape
    groups, d_state = B.shape[2:]
    limit = LIMIT - STEEP if capped else LIMIT
    chunks = triton.cdiv(length, c.Q)
    size = per_segment or segment_chunks(batch * heads * triton.cdiv(headdim, c.BP), chunks, dt.device)
    segments = triton.cdiv(chunks, size)
    empty = partial(torch.empty, dtype=torch.float32, device=dt.device)
    sums = torch.float64 if B.dtype == torch.float32 else torch.float32
    cum, totals = empty(batch, heads, chunks, c.Q, dtype=sums), empty(batch, heads, chunks, dtype=sums)
    scale, spent = empty(batch, heads, chunks, c.Q), empty(batch, heads, chunks)
    wild = torch.zeros(batch, heads, segments, dtype=torch.int32, device=dt.device)
    gram = torch.empty(batch, groups, chunks, c.Q, c.Q, dtype=B.dtype, device=dt.device)
    BH = min(32, triton.next_power_of_2(heads))
    prepare.prepare_chunk[(chunks, groups + triton.cdiv(heads, BH), batch)](
        dt, A, table if dt_bias is None else dt_bias, table, table if pad is None else pad, B, C,
        table if drop is None else drop, cum, scale, totals, spent, wild, gram, low, high, limit,
        *dt.stride(), *B.stride()[:3], *C.stride()[:3], length, heads, d_state, groups, chunks, size, segments,
        Q=c.Q, BH=BH, BN=c.BN, HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus, HAS_PAD=pad is not None,
        HAS_DROP=drop is not None, FULL=B.dtype == torch.float32, num_warps=4,
    )  # fmt: skip
    return Prepared(cum, scale, totals, spent, gram, wild, size)


PIECES = 256  # that a chain of caps takes up at once: their states are what it costs in memory


def cap_factors(x: Tensor, B: Tensor, A: Tensor, table: Tensor, initial: Tensor, low: float, caps: Tensor, every: int,
                ready: Prepared, c: Blocks) -> Tensor:  # fmt: skip
    """(B, H, T // every): the factor by which the state is cut back to `caps` (H) after every `every`-th token. A piece
    of `every` tokens is whole chunks; what each piece adds is found side by side, and only the chain walks in order."""
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    pieces, piece_chunks, chunks = length // every, every // c.Q, ready.totals.shape[2]
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    factors, S = empty(batch, heads, pieces), initial.clone()
    for first in range(0, pieces, PIECES):
        count = min(PIECES, pieces - first)
        states, ends = empty(batch, heads, count, headdim, d_state), empty(batch, heads, count)
        forward.segment_states[(count, heads, batch * triton.cdiv(headdim, c.BP))](
            x, B, A, table, table, ready.cum, ready.scale, ready.totals, states, ends, *x.stride()[:3],
            *B.stride()[:3], low, length, heads, headdim, d_state, groups, chunks, piece_chunks, count + 1,
            first * piece_chunks, Q=c.Q, BP=c.BP, BN=c.BN, HAS_DROP=False, FULL=x.dtype == torch.float32,
            num_warps=c.warps,
        )  # fmt: skip
        BP = max(16, triton.next_power_of_2(headdim))
        forward.cap_chain[(batch * heads,)](
            states, ends, caps, S, factors, heads, headdim, d_state, count, first, pieces, BP=BP, BN=c.BN,
            num_warps=min(16, max(4, BP * c.BN // 1024)),
        )  # fmt: skip
    return factors


def cut_back(ready: Prepared, factors: Tensor, every: int) -> None:
    """Make the factors part of the gates, in place: a capped recurrence is a plain one with other gates."""
    Q = ready.cum.shape[3]
    last = slice(every // Q - 1, factors.shape[2] * (every // Q), every // Q)  # the chunks that pieces end with
    logs = factors.log()
    ready.cum[:, :, last, -1] += logs
    ready.totals[:, :, last] += logs
    ready.scale[:, :, last, -1] *= factors
    ready.wild.logical_or_(logs.amin(2, keepdim=True) < -STEEP)


def scan_forward(x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, A: Tensor, table: Tensor, drop: Tensor | None,
                 initial: Tensor, low: float, ready: Prepared, c: Blocks) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B,T,H,P) as x and the final state (B,H,P,N), float32."""
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    chunks, segments = ready.totals.shape[2], ready.wild.shape[2]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    states = empty(batch, heads, segments - 1, headdim, d_state)
    final = empty(batch, heads, headdim, d_state)
    full, parts = x.dtype == torch.float32, batch * triton.cdiv(headdim, c.BP)
    shared = {"Q": c.Q, "BP": c.BP, "BN": c.BN, "HAS_DROP": drop is not None, "FULL": full, "num_warps": c.warps}
    sizes = (length, heads, headdim, d_state, groups, chunks, ready.segment_chunks, segments)
    mark = table if drop is None else drop
    ends = empty(batch, heads, segments - 1)
    if segments > 1:
        forward.segment_states[(segments - 1, heads, parts)](
            x, B, A, table, mark, ready.cum, ready.scale, ready.totals, states, ends, *x.stride()[:3], *B.stride()[:3],
            low, *sizes, 0, **shared,
        )  # fmt: skip
    Ds = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
    strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *y.stride()[:3], *Ds)
    for wild in (False, True):
        gram, arrays, described = ready.gram, (x, B, C, y), False
        if not wild and x.numel() >= DESCRIBED and all(_describable(t) for t in arrays):
            described = True
            gram = TensorDescriptor.from_tensor(gram.flatten(2, 3).transpose(1, 2), [1, c.Q, 1, c.Q])
            widths = (c.BP, c.BN, c.BN, c.BP)
            arrays = tuple(TensorDescriptor.from_tensor(t, [1, c.Q, 1, w]) for t, w in zip(arrays, widths))
        forward.chunk_scan[(segments, heads, parts)](
            *arrays[:3], gram, arrays[3], ready.cum, ready.scale, ready.totals, table if D is None else D, mark,
            initial, states, ends, final, ready.wild, *strides, *sizes, **shared,
            HAS_D=D is not None, WILD=wild, TMA=described, STAGES=c.stages,
        )  # fmt: skip
    return y, final


def _describable(t: Tensor) -> bool:
    """Whether Hopper's copy engine can read it: 16-byte strides, in 16-bit types (float32 tiles leave no room)."""
    if t.device.type != "cuda" or torch.cuda.get_device_capability(t.device)[0] < 9:
        return False
    bytes_ = t.element_size()
    return bytes_ == 2 and t.data_ptr() % 16 == 0 and all(s > 0 and s * bytes_ % 16 == 0 for s in t.stride()[:-1])


class Grads(NamedTuple):
    x: Tensor  # as x
    dt: Tensor  # as dt
    A: Tensor  # (H) float32, and so the rest
    B: Tensor  # (B, T, G, N)
    C: Tensor
    D: Tensor  # (H, P)
    dt_bias: Tensor  # (H)
    initial: Tensor  # (B, H, P, N)


BACKWARD_CHUNKS = 16  # a segment; each costs two states (P, N) in float32
SLAB = 2**29  # bytes that the states and their gradients at a slab's chunks may take


def scan_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
                  table: Tensor, pad: Tensor | None, drop: Tensor | None, initial: Tensor, low: float,
                  high: float, softplus: bool, dy: Tensor, dfinal: Tensor, c: Blocks,
                  factors: Tensor | None = None, every: int | None = None) -> Grads:  # fmt: skip
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    ready = prepare_chunks(dt, A, B, C, dt_bias, table, pad, drop, low, high, softplus, headdim, c, BACKWARD_CHUNKS)
    if factors is not None and every is not None:
        cut_back(ready, factors, every)
    chunks, segments, size = ready.totals.shape[2], ready.wild.shape[2], ready.segment_chunks
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    full, blocks_P = x.dtype == torch.float32, triton.cdiv(headdim, c.BP)
    parts, PN = batch * blocks_P, headdim * d_state
    shared = {"Q": c.Q, "BP": c.BP, "BN": c.BN, "HAS_DROP": drop is not None, "FULL": full, "num_warps": c.warps}
    sizes = (length, heads, headdim, d_state, groups, chunks, size, segments)
    mark, folded = table if drop is None else drop, (batch * heads, triton.cdiv(PN, 1024))
    states, ends = empty(batch, heads, segments - 1, headdim, d_state), empty(batch, heads, segments)
    if segments > 1:
        forward.segment_states[(segments - 1, heads, parts)](
            x, B, A, table, mark, ready.cum, ready.scale, ready.totals, states, ends, *x.stride()[:3], *B.stride()[:3],
            low, *sizes, 0, **shared,
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
    while batch * groups * splits * width < 4 * _slots(x.device) and splits < heads // groups:
        splits *= 2
    at_chunks = torch.empty(2, batch, heads, blocks_P, width, c.BP, c.BN, dtype=x.dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dB, dC = empty(2, splits, batch, length, groups, d_state)
    gates, dtotal = empty(2, blocks_P, batch, heads, chunks * c.Q), empty(blocks_P, batch, heads, chunks)
    dD, dD_chunks = empty(heads, headdim).zero_(), empty(batch, width, heads, headdim)
    of_x, of_B, of_C, of_y = (t.stride()[:3] for t in (x, B, C, dy))
    of_D = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
    halves = {**shared, "num_warps": GRAD_WARPS, "STAGES": GRAD_STAGES or c.stages, "BH": triton.next_power_of_2(heads)}
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
                gates[0], *of_x, *of_B, *of_C, *of_y, *where, **halves, WILD=wild,
            )  # fmt: skip
        for wild in (False, True):
            backward.input_grads[grid](
                x, B, ready.gram, dy, ready.cum, ready.scale, ready.totals, table if D is None else D, mark, ready.wild,
                at_chunks[1], dtotal, dx, dB, *gates, dD_chunks, *of_x, *of_B, *of_y, *of_D, *where, **halves,
                WILD=wild, HAS_D=D is not None,
            )  # fmt: skip
        if D is not None:
            dD += dD_chunks[:, :count].sum((0, 1))
    of_gates = gates.sum(1) if blocks_P > 1 else gates[:, 0]  # (2, B, H, chunks * Q)
    if factors is not None and every is not None:  # the gradient to the scale before it was cut back
        of_gates[1, ..., every - 1 : factors.shape[2] * every : every] *= factors
    BT, BH = 128, min(8, triton.next_power_of_2(heads))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    sums = empty(2, batch, triton.cdiv(length, BT), heads)
    backward.gate_grads[(triton.cdiv(length, BT), triton.cdiv(heads, BH), batch)](
        dt, A, table if dt_bias is None else dt_bias, table, table if pad is None else pad, *of_gates, ddt, *sums,
        low, high, *dt.stride(), length, heads, chunks * c.Q, BT=BT, BH=BH, HAS_BIAS=dt_bias is not None,
        SOFTPLUS=softplus, HAS_PAD=pad is not None, num_warps=4,
    )  # fmt: skip
    dA, dbias = (part.sum((0, 1)) for part in sums)
    return Grads(dx, ddt, dA, dB.sum(0), dC.sum(0), dD, dbias, first)


GRAD_STAGES = 0
GRAD_WARPS = 8  # of the kernels that sum over heads in registers
