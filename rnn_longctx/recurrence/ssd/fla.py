"""The scan with a decay a channel by the kernels of flash-linear-attention (fla) for gated linear attention: bfloat16
and float16 on a GPU, states float32, gradients too."""

from __future__ import annotations

from torch import Tensor

from rnn_longctx.recurrence.backends import Call, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.fla import Rows, unreadable
from rnn_longctx.recurrence.gates import DeltaGates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd import pytorch

LEAST = 16  # channels of keys and values that a product of matrices has on a GPU


def refuses(policy: ScanPolicy, call: Call | None) -> str | None:
    """Return what these kernels do not follow, or None."""
    if policy.caps or policy.window is not None:
        return "caps no states and has no window"
    if call is None:
        return None
    if not call.per_channel:
        return "has one decay a channel, not one a head"
    if min(call.headdim, call.d_state) < LEAST:
        return f"reads heads of {LEAST} channels and more, not {call.headdim} x {call.d_state}"
    return unreadable(call)


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """See `Backend.run`."""
    inputs, carry = reading.inputs, reading.carry
    if inputs.x.shape[1] == 1:
        return pytorch.run(reading)
    from fla.ops.gla import chunk_gla

    gates = reading.gates.worked_out(carry.state.dtype, reading.policy, reading.mask)
    assert not isinstance(gates, DeltaGates)
    x, heads, rows = inputs.x, inputs.x.shape[2], Rows.of(reading)
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (inputs.B, inputs.C))
    scaled = (x * gates.input_scale[..., None]).to(x.dtype)
    q, k, v, g = rows.flat(C, B, scaled, gates.log_decay.float())
    settings = {"scale": 1.0, "output_final_state": True, "state_v_first": True}
    y, end = chunk_gla(q, k, v, g, initial_state=rows.states, cu_seqlens=rows.edges, **settings)
    y, D = y.view(x.shape), inputs.D
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None]).to(x.dtype)
    total = pytorch.log_decay_total(carry.log_decay, gates.log_decay, reading.reset)
    return y.to(x.dtype), ScanCarry(end[rows.last], carry.position, total)
