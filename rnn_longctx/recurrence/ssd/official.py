"""mamba-ssm's own scan as a backend: to compare with, never chosen unless it is named."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Call, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy

MOST = 2**31  # elements: its kernels count in int32, and read elsewhere beyond


def missing() -> str | None:
    if find_spec("mamba_ssm") is None:
        return "needs mamba-ssm, which is not installed"
    return None if torch.cuda.is_available() else "needs a CUDA device"


def refuses(policy: ScanPolicy, call: Call | None) -> str | None:
    if policy != ScanPolicy():
        return "knows no policy"
    if call is not None and (call.device.type != "cuda" or call.per_channel or call.dtype == torch.float64):
        return "reads tensors on a CUDA device, below float64, with one decay a head"
    if call is not None and not call.stepped:
        return "works the gates out of a step dt, and this layer gives them"
    return None


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """See `Backend.run`."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs, gates, carry = reading.inputs, reading.gates, reading.carry
    assert isinstance(gates, SteppedGates)
    if reading.reset is not None or reading.mask is not None:
        raise InputError("backend 'mamba_ssm' reads whole rows: no padding, no documents in a row")
    x, B, C = inputs.x, inputs.B, inputs.C
    if x.shape[0] * x.shape[1] * max(t.stride(1) for t in (x, gates.dt, B, C)) >= MOST:
        raise InputError(f"backend 'mamba_ssm' counts in int32: {x.shape[1]} tokens are too many for one call")
    y, state = mamba_chunk_scan_combined(
        x,
        gates.dt,
        gates.A,
        B,
        C,
        128,
        D=inputs.D,
        dt_bias=gates.dt_bias,
        dt_softplus=gates.softplus,
        dt_limit=gates.dt_limit,
        initial_states=carry.state,
        return_final_states=True,
    )
    total = carry.log_decay + gates.worked_out(torch.float32).log_decay.sum(1, dtype=torch.float64)
    return y, ScanCarry(state.float(), carry.position, total)
