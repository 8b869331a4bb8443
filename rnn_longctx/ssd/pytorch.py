"""The scan in PyTorch as a backend: every policy, any device and floating type."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.ssd.carry import ScanCarry
from rnn_longctx.ssd.chunked import chunked_scan
from rnn_longctx.ssd.gates import gates
from rnn_longctx.ssd.policy import ScanPolicy
from rnn_longctx.ssd.step import step


def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool,
        dt_limit: tuple[float, float], D: Tensor | None, policy: ScanPolicy, carry: ScanCarry, reset: Tensor | None,
        mask: Tensor | None, counts: Tensor | None, drop: Tensor | None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    inputs, dtype = x, carry.state.dtype
    if counts is None and policy.caps:
        counts = carry.position[:, None] + torch.arange(1, x.shape[1] + 1)
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    dt_bias = None if dt_bias is None else dt_bias.to(dtype)
    log_decay, scale = gates(
        dt, A, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, policy=policy, mask=mask
    )
    read = step if x.shape[1] == 1 and policy.window is None else chunked_scan
    y, new = read(x, log_decay, scale, B, C, policy=policy, carry=carry, counts=counts, drop=drop)
    if D is not None:
        y = torch.addcmul(y, x, (D if D.ndim == 2 else D[:, None]).to(dtype))
    new.log_decay = _total(carry.log_decay, log_decay, reset)
    return y.to(inputs.dtype), new


@torch.no_grad()
def _total(before: Tensor, log_decay: Tensor, reset: Tensor | None) -> Tensor:
    if reset is not None:
        began = reset.to(log_decay.device).long().cumsum(1)
        kept = began == began[:, -1:]  # tokens after a row's last reset
        log_decay = log_decay * kept.view(*kept.shape, *(1,) * (log_decay.ndim - 2))
        before = torch.where(reset.to(before.device).any(1).view(-1, *(1,) * (before.ndim - 1)), 0.0, before)
    return before + log_decay.sum(1, dtype=torch.float64)
