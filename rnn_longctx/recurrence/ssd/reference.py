"""The definition: one token after another in float64, every rule of a `ScanPolicy` spelled out.

    S_t = a_t * S_{t-1} + w_t * x_t B_t^T        a_t = exp(log_decay_t), w_t = input_scale_t
    y_t = S_t C_t  (+ D * x_t)

Mamba-2 (arXiv 2405.21060, eq. 16): log_decay = dt * A, input_scale = dt, dt = clamp(softplus(dt + dt_bias), dt_limit).
Slow on purpose. Nothing here is shared with the backends that are tested against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.gates import Gates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.policy import PLAIN, PerHead, ScanPolicy
from rnn_longctx.recurrence.span import WHOLE, Span


def scan(
    inputs: ScanInputs,
    gates: Gates | SteppedGates,
    span: Span = WHOLE,
    *,
    policy: ScanPolicy = PLAIN,
    state: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole recurrence, of rows that begin here or go on from `state` (B,H,P,N) after `position` (B,) tokens.

    Padding (`span.mask`) neither reads, decays nor counts.
    Returns: y (B,T,H,P), final states (B,H,P,N), log-decay of the last row summed over these tokens (B,H) or
        (B,H,N); float64.
    """
    mask, reset = span.mask, span.reset
    x, B, C, D = inputs.x.double(), inputs.B.double(), inputs.C.double(), inputs.D
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
                log_decay, scale = _gates_of(gates, policy, b, t, h)
                log_decay = log_decay.expand(d_state)
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
    return y, final, total if gates.per_channel else total[..., 0]


def _gates_of(gates: Gates | SteppedGates, policy: ScanPolicy, b: int, t: int, h: int) -> tuple[Tensor, Tensor]:
    """Return the log-decay, () or (N), and the input scale, (), of one token and head under a policy, in float64."""
    mul, add, gain, min_dt = (_of(v, h) for v in (policy.mul, policy.add, policy.gain, policy.min_dt))
    if isinstance(gates, Gates):
        if min_dt != 0.0:
            raise InputError("min_dt leaves out tokens by their step dt, and given gates have no step")
        return mul * gates.log_decay[b, t, h].double() + add, gain * gates.input_scale[b, t, h].double()
    step = gates.dt[b, t, h].double() + (gates.dt_bias[h].double() if gates.dt_bias is not None else 0.0)
    step = (F.softplus(step) if gates.softplus else step).clamp(*gates.dt_limit)
    keep = 1.0 if step >= min_dt else 0.0
    return keep * (mul * step * gates.A[h].double() + add), keep * gain * step


def _of(value: PerHead, head: int) -> float:
    return value if isinstance(value, float) else value[head]
