"""The definition: one token after another in float64, every rule of a `ScanPolicy` spelled out.

    S_t = a_t * S_{t-1} + w_t * x_t B_t^T        a_t = exp(log_decay_t), w_t = input_scale_t
    y_t = S_t C_t  (+ D * x_t)

Mamba-2 (arXiv 2405.21060, eq. 16): log_decay = dt * A, input_scale = dt, dt = clamp(softplus(dt + dt_bias), dt_limit).
Slow on purpose. Nothing here is shared with the backends that are tested against it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.recurrence.policy import PLAIN, PerHead, ScanPolicy


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None = None,
         dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, math.inf), D: Tensor | None = None,
         policy: ScanPolicy = PLAIN, reset: Tensor | None = None, mask: Tensor | None = None,
         state: Tensor | None = None, position: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The whole recurrence, of rows that begin here or go on from `state` (B,H,P,N) after `position` (B,) tokens.

    Args: x (B,T,H,P), dt (B,T,H), A (H) or (H,N), B and C (B,T,G,N), dt_bias (H), D (H) or (H,P),
        reset (B,T) bool: a new row (document) begins at this token; mask (B,T) bool: False is padding, which
        neither reads, decays nor counts.
    Returns: y (B,T,H,P), final states (B,H,P,N), log-decay of the last row summed over these tokens (B,H) or
        (B,H,N); float64.
    """
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    y = torch.zeros_like(x)
    final = x.new_zeros(batch, heads, headdim, d_state)
    total = x.new_zeros(batch, heads, d_state)
    start = x.new_zeros(heads, headdim, d_state) if policy.start is None else x.new_tensor(policy.start)

    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            S, log_total, count = start[h], x.new_zeros(d_state), 0
            if position is not None and state is not None and position[b] > 0:
                S, count = state[b, h].double(), int(position[b])
            held: list[tuple[Tensor, Tensor]] = []  # (input, log-decay) of the window, oldest first
            for t in range(length):
                if mask is not None and not mask[b, t]:
                    y[b, t, h] = S @ C[b, t, g]
                    continue
                if reset is not None and reset[b, t]:
                    S, log_total, count, held = start[h], x.new_zeros(d_state), 0, []
                step = dt[b, t, h] + (dt_bias.double()[h] if dt_bias is not None else 0.0)
                step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
                keep = 1.0 if step >= _of(policy.min_dt, h) else 0.0
                log_decay = keep * (_of(policy.mul, h) * step * A[h] + _of(policy.add, h)).expand(d_state)
                scale = keep * _of(policy.gain, h) * step
                if policy.reset is not None and count > 0 and count % policy.reset == 0:
                    S, held = start[h], []
                count += 1
                log_total = log_total + log_decay
                update = scale * torch.outer(x[b, t, h], B[b, t, g])
                if policy.window is None:
                    S = torch.exp(log_decay) * S + update
                else:  # the last r inputs alone, each decayed by what came after it
                    held = [*held, (update, log_decay)][-policy.window :]
                    S, after = torch.zeros_like(S), x.new_zeros(d_state)
                    for update, log_decay in reversed(held):
                        S, after = S + torch.exp(after) * update, after + log_decay
                for cap in policy.caps:
                    norm = S.norm()
                    if count % cap.every == 0 and norm > _of(cap.norm, h):
                        S = S * (_of(cap.norm, h) / norm).detach()
                y[b, t, h] = S @ C[b, t, g]
            final[b, h], total[b, h] = S, log_total
    if D is not None:
        y = y + (D.double() if D.ndim == 2 else D.double()[:, None]) * x
    return y, final, total if A.ndim == 2 else total[..., 0]


def _of(value: PerHead, head: int) -> float:
    return value if isinstance(value, float) else value[head]
