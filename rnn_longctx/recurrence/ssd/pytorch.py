"""The scan in PyTorch as a backend: every policy, any device and floating type."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import gates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd.chunked import chunked_scan
from rnn_longctx.recurrence.ssd.step import step


def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool,
        dt_limit: tuple[float, float], D: Tensor | None, policy: ScanPolicy, carry: ScanCarry, reset: Tensor | None,
        mask: Tensor | None, counts: Tensor | None, drop: Tensor | None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    inputs, dtype = x, carry.state.dtype
    if counts is None and policy.caps:
        counts = carry.position[:, None] + torch.arange(1, x.shape[1] + 1, device="cpu")
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    dt_bias = None if dt_bias is None else dt_bias.to(dtype)
    log_decay, scale = gates(
        dt, A, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, policy=policy, mask=mask
    )
    read = step if x.shape[1] == 1 and policy.window is None else chunked_scan
    y, new = read(x, log_decay, scale, B, C, policy=policy, carry=carry, counts=counts, drop=drop)
    if D is not None:
        y = torch.addcmul(y, x, (D if D.ndim == 2 else D[:, None]).to(dtype))
    new.log_decay = spent(carry.log_decay, log_decay, reset)
    return y.to(inputs.dtype), new


@torch.no_grad()
def spent(before: Tensor, log_decay: Tensor, reset: Tensor | None) -> Tensor:
    """Log-decay (B,H[,N]) float64 since each row's last document began, after `before` and log_decay (B,T,H[,N])."""
    if reset is not None:
        began = reset.to(log_decay.device).long().cumsum(1)
        kept = began == began[:, -1:]  # tokens after a row's last reset
        log_decay = log_decay * kept.view(*kept.shape, *(1,) * (log_decay.ndim - 2))
        before = torch.where(reset.to(before.device).any(1).view(-1, *(1,) * (before.ndim - 1)), 0.0, before)
    return before + log_decay.sum(1, dtype=torch.float64)


PIECE = 4096  # tokens weighed at once by `stretch_sum`


@torch.no_grad()
def stretch_sum(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool,
                dt_limit: tuple[float, float], policy: ScanPolicy, drop: Tensor | None, dtype: torch.dtype,
                back: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What T tokens alone add to the state after them,

        sum_s input_scale_s exp(total - cum_s) x_s B_s^T,   cum = cumsum(log_decay),

    or, `back`, of dy as x and C as B, what their outputs add to the gradient of the state before: sum_t exp(cum_t) dy_t
    C_t^T. Inputs as for `run`, A (H), no padding; drop (B,T) bool on the CPU.
    Returns: (B,H,P,N) of `dtype`, and total (B,H) float64.
    """
    bias = None if dt_bias is None else dt_bias.to(dtype)
    log_decay, scale = gates(
        dt.to(dtype), A.to(dtype), dt_bias=bias, dt_softplus=dt_softplus, dt_limit=dt_limit, policy=policy
    )
    cum = log_decay.cumsum(1, dtype=torch.float64)
    weight = cum.exp() if back else (cum[:, -1:] - cum).exp() * scale
    if drop is not None:
        drops = drop.to(x.device).cumsum(1)
        weight = weight * (drops == (0 if back else drops[:, -1:]))[..., None]
    batch, _, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    found = x.new_zeros(batch, groups, heads // groups * headdim, d_state, dtype=dtype)
    for some, w, b in zip(x.split(PIECE, 1), weight.to(dtype).split(PIECE, 1), B.split(PIECE, 1)):
        weighed = (some.to(dtype) * w[..., None]).unflatten(2, (groups, -1)).flatten(3)  # (B, c, G, H/G * P)
        found += weighed.permute(0, 2, 3, 1) @ b.to(dtype).transpose(1, 2)
    return found.view(batch, heads, headdim, d_state), cum[:, -1]
