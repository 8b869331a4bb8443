"""The definition of the delta rule: one token after another in float64, every rule of a `ScanPolicy` spelled out.

    S_t = S_{t-1} diag(a_t) - erase_t (S' read_t) along_t^T + input_scale_t * x_t B_t^T
    y_t = S_t C_t  (+ D * x_t)

Gated DeltaNet (arXiv 2412.06464, eq. 10) and KDA (arXiv 2510.26692, eq. 1): S' = S_{t-1} diag(a_t), read = along = B_t,
erase = input_scale = beta. RWKV-7 (arXiv 2503.14456, eq. 17): S' = S_{t-1}. Slow on purpose. Nothing here is shared
with the backends that are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.policy import PLAIN, PerHead, ScanPolicy
from rnn_longctx.recurrence.span import WHOLE, Span


def scan(
    inputs: ScanInputs,
    gates: DeltaGates,
    span: Span = WHOLE,
    *,
    policy: ScanPolicy = PLAIN,
    state: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole recurrence, of rows that begin here or go on from `state` (B,H,P,N) after `position` (B,) tokens.

    Padding (`span.mask`) neither reads, decays, erases nor counts.
    Returns: y (B,T,H,P), final states (B,H,P,N), log-decay of the last row summed over these tokens (B,H) or
        (B,H,N); float64.
    """
    mask, reset = span.mask, span.reset
    x, B, C, D = inputs.x.double(), inputs.B.double(), inputs.C.double(), inputs.D
    read, along = (B if t is None else t.double() for t in (gates.read, gates.along))
    erases = (gates.input_scale if gates.erase is None else gates.erase).double()
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
            for t in range(length):
                if mask is not None and not mask[b, t]:
                    y[b, t, h] = S @ C[b, t, g]
                    continue
                if reset is not None and reset[b, t]:
                    S, log_total, count = start[h], x.new_zeros(d_state), 0
                if policy.reset is not None and count > 0 and count % policy.reset == 0:
                    S = start[h]
                count += 1
                log_decay = _of(policy.mul, h) * gates.log_decay[b, t, h].double() + _of(policy.add, h)
                log_decay = log_decay.expand(d_state)
                log_total = log_total + log_decay
                erase = _of(policy.erase, h) * erases[b, t, h]
                erase = torch.clamp(erase, min=_of(policy.least_erase, h)) if policy.least_erase != 0.0 else erase
                write = _of(policy.gain, h) * gates.input_scale[b, t, h].double()
                decayed = S * torch.exp(log_decay)
                held = (decayed if gates.decay_first else S) @ read[b, t, g]
                S = decayed - erase * torch.outer(held, along[b, t, g]) + write * torch.outer(x[b, t, h], B[b, t, g])
                for cap in policy.caps:
                    norm = S.norm()
                    if count % cap.every == 0 and norm > _of(cap.norm, h):
                        S = S * (_of(cap.norm, h) / norm).detach()
                y[b, t, h] = S @ C[b, t, g]
            final[b, h], total[b, h] = S, log_total
    if D is not None:
        y = y + (D.double() if D.ndim == 2 else D.double()[:, None]) * x
    return y, final, total if gates.per_channel else total[..., 0]


def _of(value: PerHead, h: int) -> float:
    return value[h] if isinstance(value, tuple) else value
