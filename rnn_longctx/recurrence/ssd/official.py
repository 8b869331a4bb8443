"""mamba-ssm's own scan as a backend: to compare with, never chosen unless it is named."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Call
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import gates
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
    return None


def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool,
        dt_limit: tuple[float, float], D: Tensor | None, policy: ScanPolicy, carry: ScanCarry, reset: Tensor | None,
        mask: Tensor | None, counts: Tensor | None, drop: Tensor | None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if reset is not None or mask is not None:
        raise InputError("backend 'mamba_ssm' reads whole rows: no padding, no documents in a row")
    if x.shape[0] * x.shape[1] * max(t.stride(1) for t in (x, dt, B, C)) >= MOST:
        raise InputError(f"backend 'mamba_ssm' counts in int32: {x.shape[1]} tokens are too many for one call")
    y, state = mamba_chunk_scan_combined(
        x, dt, A, B, C, 128, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
        initial_states=carry.state, return_final_states=True,
    )  # fmt: skip
    bias = None if dt_bias is None else dt_bias.float()
    log_decay, _ = gates(dt.float(), A.float(), dt_bias=bias, dt_softplus=dt_softplus, dt_limit=dt_limit, policy=policy)
    total = carry.log_decay + log_decay.sum(1, dtype=torch.float64)
    return y, ScanCarry(state.float(), carry.position, total)
