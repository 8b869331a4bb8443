"""One token: the recurrence as it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd.caps import clip_factor, row_caps


def step(
    x: Tensor,
    gates: Gates,
    B: Tensor,
    C: Tensor,
    *,
    policy: ScanPolicy,
    carry: ScanCarry,
    counts: Tensor | None,
    drop: Tensor | None,
) -> tuple[Tensor, ScanCarry]:
    """As `chunked_scan` with T = 1 and no window; shapes with the T axis."""
    batch, _, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    log_decay, scale, state = gates.log_decay, gates.input_scale, carry.state
    if drop is not None:
        state = torch.where(drop.to(state.device)[..., None, None], policy.start_state(state), state)
    decay = log_decay[:, 0].exp()
    decay = decay[:, :, None] if log_decay.ndim == 4 else decay[..., None, None]
    xw = (x[:, 0] * scale[:, 0, :, None]).view(batch, groups, -1, 1)  # (B, G, R*P, 1)
    state = state * decay + (xw * B[:, 0, :, None]).view(batch, heads, headdim, d_state)
    if policy.caps:
        r = clip_factor(state, row_caps(policy, counts, heads, x)[:, 0])
        state = state * r[..., None, None]
    y = state.view(batch, groups, -1, d_state) @ C[:, 0, :, :, None]  # (B, G, R*P, 1)
    return y.view(batch, 1, heads, headdim), ScanCarry(state, carry.position, carry.log_decay)
