"""Which blocks the kernels run with, and their launches. Tensors in, tensors out; no policy is read here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rnn_longctx.recurrence.ssd.kernels import forward, prepare
from rnn_longctx.recurrence.ssd.operands import GradOperands, Operands

LIMIT = 60.0  # nats by which a factor of `chunk_scan` may leave 1 (15 more with caps); float32 ends at exp(88)
WILD_PARTS = 32  # programs of a wild segment, of 16 chunks at least
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
def blocks(headdim: int, d_state: int, dtype: torch.dtype, every: int) -> Blocks:
    """Fixed by shape and type, not searched for: a new shape costs one compilation and no timing. `every` (or 0)
    tokens a cap applies: whole chunks."""
    c = _blocks(headdim, d_state, dtype)
    return replace(c, Q=min(c.Q, every & -every)) if every else c


def _blocks(headdim: int, d_state: int, dtype: torch.dtype) -> Blocks:
    BN = max(16, triton.next_power_of_2(d_state))
    BP = min(max(16, triton.next_power_of_2(headdim)), 64)
    if dtype == torch.float32:
        return Blocks(32, min(BP, 32 if BN <= 128 else 16), BN, 4, 1)
    if BN >= 256:
        return Blocks(32, BP, BN, 8, 2 if BN == 256 else 1)
    return Blocks(64, BP, BN, 4, 2)


@cache
def slots(device: torch.device) -> int:
    """Programs of `chunk_scan` that run at once: two on a processor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(maxsize=4096)
def segment_chunks(rows: int, chunks: int, device: torch.device) -> int:
    """Chunks a segment, for `rows` programs a segment: the count of segments that leaves the fewest slots idle, with
    2% added for each since a segment's first state must be found; never under 4 chunks."""
    room = slots(device)
    best = min(range(1, 65), key=lambda n: (-(-rows * n // room) * room / (rows * n)) * (1 + 0.02 * n))
    return max(-(-chunks // best), min(4, chunks))


def prepare_chunks(o: Operands | GradOperands, c: Blocks, per_segment: int | None = None) -> Prepared:
    dt, B, C, (batch, length, heads), (groups, d_state) = o.dt, o.B, o.C, o.dt.shape, o.B.shape[2:]
    chunks = triton.cdiv(length, c.Q)
    size = per_segment or segment_chunks(batch * heads * triton.cdiv(o.x.shape[3], c.BP), chunks, dt.device)
    segments = triton.cdiv(chunks, size)
    empty = partial(torch.empty, dtype=torch.float32, device=dt.device)
    sums = torch.float64 if B.dtype == torch.float32 else torch.float32
    cum, totals = empty(batch, heads, chunks, c.Q, dtype=sums), empty(batch, heads, chunks, dtype=sums)
    scale, spent = empty(batch, heads, chunks, c.Q), empty(batch, heads, chunks)
    wild = torch.zeros(batch, heads, segments, dtype=torch.int32, device=dt.device)
    gram = torch.empty(batch, groups, chunks, c.Q, c.Q, dtype=B.dtype, device=dt.device)
    BH = min(32, triton.next_power_of_2(heads))
    table, bias, pad, drop = o.table, o.dt_bias, o.pad, o.drop
    biases, pads = table if bias is None else bias, table if pad is None else pad
    inputs = (dt, o.A, biases, table, pads, B, C, table if drop is None else drop)
    outputs = (cum, scale, totals, spent, wild, gram)
    strides = (*dt.stride(), *B.stride()[:3], *C.stride()[:3])
    sizes = (length, heads, d_state, groups, chunks, size, segments)
    tiles = {"Q": c.Q, "BH": BH, "BN": c.BN, "FULL": B.dtype == torch.float32, "num_warps": 4}
    given = {"HAS_BIAS": bias is not None, "HAS_PAD": pad is not None, "HAS_DROP": drop is not None}
    prepare.prepare_chunk[(chunks, groups + triton.cdiv(heads, BH), batch)](
        *inputs, *outputs, o.low, o.high, LIMIT, *strides, *sizes, **tiles, **given, SOFTPLUS=o.softplus
    )
    return Prepared(cum, scale, totals, spent, gram, wild, size)


def look_sums(x: Tensor, look: int) -> Tensor:
    """(3,B,H,T//look,P): room for sum, sum of squares and largest size of the rows of the state."""
    batch, length, heads, headdim = x.shape
    return torch.empty(3, batch, heads, length // look, headdim, dtype=torch.float32, device=x.device)


def gate_squares(x: Tensor, c: Blocks) -> Tensor:
    """(B,T,·): room for a gate's sums of squares, one a head and block of its rows."""
    batch, length, heads, headdim = x.shape
    parts = heads * triton.cdiv(headdim, c.BP)
    return torch.empty(batch, length, parts, dtype=torch.float32, device=x.device)


def scan_forward(
    o: Operands,
    initial: Tensor | None,
    ready: Prepared,
    c: Blocks,
    y: Tensor | None = None,
    sums: Tensor | None = None,
    look: int = 0,
    gate: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y (B,T,H,P) as x, or where it is to be written, and the final state (B,H,P,N), float32.

    Args:
        initial: the state before, in the place of the operands'. None: rows begin at zero and their final states are
            not made.
        sums: of `look_sums`, to be filled every `look` tokens.
        gate: z (B,T,H,P) and weight (H*P), to be applied to y, and room of `gate_squares`.
    """
    x, B, C, D, A, table, drop = o.x, o.B, o.C, o.D, o.A, o.table, o.drop
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    chunks, segments = ready.totals.shape[2], ready.wild.shape[2]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if y is None else y
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    states = empty(batch, heads, segments - 1, headdim, d_state)
    final = empty(0 if initial is None else batch, heads, headdim, d_state)
    full, parts = x.dtype == torch.float32, batch * triton.cdiv(headdim, c.BP)
    shared = {"Q": c.Q, "BP": c.BP, "BN": c.BN, "HAS_DROP": drop is not None, "FULL": full, "num_warps": c.warps}
    sizes = (length, heads, headdim, d_state, groups, chunks, ready.segment_chunks, segments)
    mark, decays = table if drop is None else drop, (ready.cum, ready.scale, ready.totals)
    ends = empty(batch, heads, segments - 1)
    if segments > 1:
        before, strides = (x, B, A, table, mark, *decays), (*x.stride()[:3], *B.stride()[:3])
        forward.segment_states[(segments - 1, heads, parts)](
            *before, states, ends, table, *strides, o.low, *sizes, 0, HAS_CAPS=False, **shared
        )
    Ds = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
    looks = (1, 1) if sums is None else (sums.shape[3], look // c.Q)
    z, weight, squares = (y, table, table) if gate is None else gate
    strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *y.stride()[:3], *z.stride()[:3], *Ds)
    skip, first = table if D is None else D, table if initial is None else initial
    looked = table if sums is None else sums
    given = {"HAS_D": D is not None, "HAS_LOOK": sums is not None, "HAS_GATE": gate is not None}
    options = {**shared, **given, "STAGES": c.stages, "ALONE": initial is None}
    for wild in (False, True):
        gram, arrays, described = ready.gram, (x, B, C, y, z), False
        if not wild and x.numel() >= DESCRIBED and all(_describable(t) for t in arrays):
            described = True
            gram = TensorDescriptor.from_tensor(gram.flatten(2, 3).transpose(1, 2), [1, c.Q, 1, c.Q])
            widths = (c.BP, c.BN, c.BN, c.BP, c.BP)
            arrays = tuple(TensorDescriptor.from_tensor(t, [1, c.Q, 1, w]) for t, w in zip(arrays, widths))
        pieces = min(WILD_PARTS, triton.cdiv(ready.segment_chunks, 16)) if wild else 1
        inputs = (*arrays[:3], gram, *arrays[3:], A, table, *decays, skip, mark, first)
        outputs = (states, ends, final, ready.wild, looked, weight, squares)
        forward.chunk_scan[(segments * pieces, heads, parts)](
            *inputs, *outputs, o.low, *strides, *sizes, pieces, *looks, **options, WILD=wild, TMA=described
        )
    return y, final


def _describable(t: Tensor) -> bool:
    """Whether Hopper's copy engine can read it: 16-byte strides, in 16-bit types (float32 tiles leave no room)."""
    if t.device.type != "cuda" or torch.cuda.get_device_capability(t.device)[0] < 9:
        return False
    bytes_ = t.element_size()
    return bytes_ == 2 and t.data_ptr() % 16 == 0 and all(s > 0 and s * bytes_ % 16 == 0 for s in t.stride()[:-1])
