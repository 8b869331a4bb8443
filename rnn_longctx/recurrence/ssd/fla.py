"""The scan by the kernels of flash-linear-attention (fla) for gated linear attention: bfloat16 and float16 on a GPU,
states float32, gradients too.

`chunk_gla` reads a decay a channel, `chunk_simple_gla` gates that are given with one decay a head. fla refuses the
gradients of the second on Hopper with Triton 3.4 to 3.7.0, where they would be wrong: a gradient is taken through the
first there, with the same decay in all channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    if call.stepped and not call.per_channel:
        return "reads one decay a head where gates are given, not worked out of a step dt"
    if min(call.headdim, call.d_state) < LEAST:
        return f"reads heads of {LEAST} channels and more, not {call.headdim} x {call.d_state}"
    if not call.per_channel and (call.headdim % 2 or call.d_state % 2):  # its gradients in 16 bits
        return f"reads one decay a head of an even number of channels, not {call.headdim} x {call.d_state}"
    return unreadable(call)


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """See `Backend.run`."""
    inputs, carry = reading.inputs, reading.carry
    if inputs.x.shape[1] == 1:
        return pytorch.run(reading)
    gates = reading.gates.worked_out(carry.state.dtype, reading.policy, reading.mask)
    assert not isinstance(gates, DeltaGates)
    x, heads, rows = inputs.x, inputs.x.shape[2], Rows.of(reading)
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (inputs.B, inputs.C))
    scaled = (x * gates.input_scale[..., None]).to(x.dtype)
    read, log_decay = _kernels(gates.log_decay.float(), B.shape[3], reading.graded)
    q, k, v, g = rows.flat(C, B, scaled, log_decay)
    settings = {"scale": 1.0, "output_final_state": True, "state_v_first": True}
    y, end = read(q, k, v, g, initial_state=rows.states, cu_seqlens=rows.edges, **settings)
    y, D = y.view(x.shape), inputs.D
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None]).to(x.dtype)
    total = pytorch.log_decay_total(carry.log_decay, gates.log_decay, reading.reset)
    return y.to(x.dtype), ScanCarry(end[rows.last], carry.position, total)


def _kernels(log_decay: Tensor, d_state: int, graded: bool) -> tuple[Callable[..., Any], Tensor]:
    """Return fla's function for log_decay (B, T, H) or (B, T, H, N), and the log-decays as it reads them."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if log_decay.ndim == 4:
        return chunk_gla, log_decay
    if graded and _refuses_gradients():
        return chunk_gla, log_decay[..., None].expand(*log_decay.shape, d_state)
    return chunk_simple_gla, log_decay


def _refuses_gradients() -> bool:
    """Return whether fla refuses the gradients of one decay a head on this machine."""
    from fla import utils

    return utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1
