"""What a shard of a stream alone adds to the state at its end, and to the gradient of the state at its beginning,
without the outputs between: the first passes of forward and backward (`forward.segment_states`,
`backward.segment_grads`) over every segment, folded. Heads that forget are left early."""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.ssd.kernels import backward, forward, launch
from rnn_longctx.recurrence.ssd.operands import Operands


def shard_sum(
    x: Tensor, gates: SteppedGates, B: Tensor, table: Tensor, drop: Tensor | None, back: bool
) -> tuple[Tensor, Tensor]:
    """Return (B,H,P,N) float32 and log-decay (B,H) float64. back: x is the gradient of the outputs, B is C; otherwise
    the tokens must be whole chunks."""
    dt, A, (low, high) = gates.dt, gates.A, gates.dt_limit
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    c = launch.blocks(headdim, d_state, x.dtype, 0)
    # with products of B that nobody asks for: a twentieth of what the states take
    state, limits = table, (low, high)  # the state is not read
    o = Operands(x, dt, A, B, B, None, gates.dt_bias, state, table, None, drop, None, *limits, gates.softplus, 0, [], 0)
    ready = launch.prepare_chunks(o, c)
    chunks, segments, size = ready.totals.shape[2], ready.wild.shape[2], ready.segment_chunks
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    parts, ends = empty(batch, heads, segments, headdim, d_state), empty(batch, heads, segments)
    full = x.dtype == torch.float32
    shared = {"Q": c.Q, "BP": c.BP, "BN": c.BN, "HAS_DROP": drop is not None, "FULL": full, "num_warps": c.warps}
    grid, sizes = (segments, heads, batch * triton.cdiv(headdim, c.BP)), (length, heads, headdim, d_state, groups)
    mark, strides = table if drop is None else drop, (*x.stride()[:3], *B.stride()[:3])
    inputs = (x, B, A, table, mark, ready.cum)
    if back:
        backward.segment_grads[grid](
            *inputs, ready.totals, parts, ends, *strides, low, *sizes, chunks, size, segments, **shared
        )
        after = ends.cumsum(2)
    else:  # segments end with the last chunk, and the first may be shorter
        arrays = (*inputs, ready.scale, ready.totals, parts, ends, table)
        walk = (chunks, size, segments + 1, chunks - segments * size)
        forward.segment_states[grid](*arrays, *strides, low, *sizes, *walk, HAS_CAPS=False, **shared)
        parts, after = parts.flip(2), ends.flip(2).cumsum(2)
    weight = torch.nn.functional.pad(after[..., :-1], (1, 0)).exp()
    return (parts * weight[..., None, None]).sum(2), ready.spent.sum(2, dtype=torch.float64)
