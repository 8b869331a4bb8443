"""The delta rule in PyTorch as a backend: every policy that it follows, any device and floating type."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.recurrence.backends import Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.delta.chunked import chunked_scan
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.ssd.pytorch import log_decay_total


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """See `Backend.run`."""
    policy, carry, counts = reading.policy, reading.carry, reading.counts
    dtype, length = carry.state.dtype, reading.inputs.x.shape[1]
    if counts is None and policy.caps:
        counts = carry.position[:, None] + torch.arange(1, length + 1, device="cpu")
    gates = reading.gates.worked_out(dtype, policy, reading.mask)
    assert isinstance(gates, DeltaGates)
    x, B, C = (t.to(dtype) for t in (reading.inputs.x, reading.inputs.B, reading.inputs.C))
    y, new = chunked_scan(ScanInputs(x, B, C), gates, policy=policy, carry=carry, counts=counts, drop=reading.drop)
    if (D := reading.inputs.D) is not None:
        y = torch.addcmul(y, x, (D if D.ndim == 2 else D[:, None]).to(dtype))
    new.log_decay = log_decay_total(carry.log_decay, gates.log_decay, reading.reset)
    return y.to(reading.inputs.x.dtype), new
