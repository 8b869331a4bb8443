"""The gates of the recurrence, from what a layer computes and what its policy says."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.recurrence.policy import ScanPolicy, per_head


def gates(dt: Tensor, A: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float],
          policy: ScanPolicy, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log_decay (B,T,H) or (B,T,H,N) and input_scale (B,T,H), in the dtype of `A`'s computation (at least float32).

    Mamba-2 (arXiv 2405.21060): dt = clamp(softplus(dt + dt_bias), dt_limit), log_decay = dt * A, input_scale = dt;
    then the policy's affine parts. Where `mask` (B,T) is False both are 0: the token changes nothing.
    """
    dt = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit != (0.0, float("inf")) or not dt_softplus:  # softplus is above 0 by itself
        dt = dt.clamp(*dt_limit)
    heads = dt.shape[-1]
    per_channel = A.ndim == 2
    log_decay = dt[..., None] * A if per_channel else dt * A
    scale = dt
    if policy.changes_gates:
        mul, add, gain = (per_head(v, heads, dt) for v in (policy.mul, policy.add, policy.gain))
        if per_channel:
            mul, add = (v if isinstance(v, float) else v[:, None] for v in (mul, add))
        log_decay = mul * log_decay + add
        scale = gain * scale
    if policy.min_dt != 0.0:
        keep = dt >= per_head(policy.min_dt, heads, dt)
        log_decay, scale = log_decay * (keep[..., None] if per_channel else keep), scale * keep
    if mask is not None:
        real = mask[..., None]
        log_decay, scale = log_decay * (real[..., None] if per_channel else real), scale * real
    return log_decay, scale
