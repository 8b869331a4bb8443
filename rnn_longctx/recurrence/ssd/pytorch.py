"""The scan in PyTorch as a backend: every policy, any device and floating type, stepped gates and given ones."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.recurrence.backends import Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import DeltaGates, Gates, SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd.chunked import chunked_scan
from rnn_longctx.recurrence.ssd.step import step


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """See `Backend.run`."""
    inputs, policy, carry, counts = reading.inputs, reading.policy, reading.carry, reading.counts
    dtype, length = carry.state.dtype, inputs.x.shape[1]
    if counts is None and policy.caps:
        counts = carry.position[:, None] + torch.arange(1, length + 1, device="cpu")
    x, B, C, D = inputs.x.to(dtype), inputs.B.to(dtype), inputs.C.to(dtype), inputs.D
    gates = reading.gates.worked_out(dtype, policy, reading.mask)
    assert not isinstance(gates, DeltaGates)
    read = step if length == 1 and policy.window is None else chunked_scan
    y, new = read(x, gates, B, C, policy=policy, carry=carry, counts=counts, drop=reading.drop)
    if D is not None:
        y = y.addcmul_(x, (D if D.ndim == 2 else D[:, None]).to(dtype))
    new.log_decay = log_decay_total(carry.log_decay, gates.log_decay, reading.reset)
    return y.to(inputs.x.dtype), new


@torch.no_grad()
def log_decay_total(before: Tensor, log_decay: Tensor, reset: Tensor | None) -> Tensor:
    """Return the log-decay (B,H[,N]) float64 since each row's last document began: `before`, and after it log_decay
    (B,T,H[,N])."""
    if reset is not None:
        begun = reset.to(log_decay.device).long().cumsum(1)
        last = begun == begun[:, -1:]  # tokens after a row's last reset
        log_decay = log_decay * last.view(*last.shape, *(1,) * (log_decay.ndim - 2))
        before = torch.where(reset.to(before.device).any(1).view(-1, *(1,) * (before.ndim - 1)), 0.0, before)
    return before + log_decay.sum(1, dtype=torch.float64)


PIECE = 4096  # tokens weighed at once by `shard_sum`


@torch.no_grad()
def shard_sum(
    x: Tensor,
    gates: Gates | SteppedGates,
    B: Tensor,
    *,
    policy: ScanPolicy,
    drop: Tensor | None,
    dtype: torch.dtype,
    back: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what T tokens alone add to the state after them,

        sum_s input_scale_s exp(total - cum_s) x_s B_s^T,   cum = cumsum(log_decay),

    or, `back`, of dy as x and C as B, what their outputs add to the gradient of the state before: sum_t exp(cum_t) dy_t
    C_t^T. One decay a head, no padding; drop (B,T) bool on the CPU.
    Returns: (B,H,P,N) of `dtype`, and total (B,H) float64.
    """
    numbers = gates.worked_out(dtype, policy)
    cum = numbers.log_decay.cumsum(1, dtype=torch.float64)
    weight = cum.exp() if back else (cum[:, -1:] - cum).exp() * numbers.input_scale
    if drop is not None:
        drops = drop.to(x.device).cumsum(1)
        weight = weight * (drops == (0 if back else drops[:, -1:]))[..., None]
    batch, _, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    total = x.new_zeros(batch, groups, heads // groups * headdim, d_state, dtype=dtype)
    for x_piece, w, b in zip(x.split(PIECE, 1), weight.to(dtype).split(PIECE, 1), B.split(PIECE, 1)):
        weighed = (x_piece.to(dtype) * w[..., None]).unflatten(2, (groups, -1)).flatten(3)  # (B, c, G, H/G * P)
        total += weighed.permute(0, 2, 3, 1) @ b.to(dtype).transpose(1, 2)
    return total.view(batch, heads, headdim, d_state), cum[:, -1]
