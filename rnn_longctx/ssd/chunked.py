"""The scan in PyTorch: streaming, differentiable, on any device.

A stretch of T tokens is cut into pieces: at most CHUNK tokens long, and cut wherever some row's state is dropped
(document boundaries) or capped (every k tokens). Inside a piece the recurrence is a masked matrix product, the
state-space duality of arXiv 2405.21060 (section 6):

    y_t = exp(cum_t) C_t S_0 + sum_{s <= t} exp(cum_t - cum_s) w_s (C_t . B_s) x_s,   cum = cumsum(log_decay)

Only differences of sums inside a piece are exponentiated, masked before the exponential, so nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.ssd.caps import capped_gates, clip_factor, row_caps
from rnn_longctx.ssd.carry import ScanCarry
from rnn_longctx.ssd.policy import ScanPolicy
from rnn_longctx.ssd.window import window_scan

CHUNK = 64  # the best on CPU among 32, 64, 128, 256
CHUNK_PER_CHANNEL = 16  # the decays of a piece are (H, c, c, N) numbers there
# Caps that apply more often than this are found token by token inside a piece instead of cutting it.
DENSE_CAP = 32


def chunked_scan(x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, *, policy: ScanPolicy,
                 carry: ScanCarry, counts: Tensor | None, drop: Tensor | None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    """Scan a stretch with its gates worked out.

    Args: x (B,T,H,P), log_decay (B,T,H[,N]), scale (B,T,H), B and C (B,T,G,N), all of one floating dtype;
        counts (B,T) int64 on the CPU, tokens read by each row up to and with t (None if the policy needs none);
        drop (B,T) bool on the CPU, True where the state is dropped before the token.
    Returns: y (B,T,H,P) and the carry (its position and log_decay are the caller's).
    """
    if policy.window is not None:
        return window_scan(x, log_decay, scale, B, C, size=policy.window, carry=carry, drop=drop, piece=piece)
    length = x.shape[1]
    caps = row_caps(policy, counts, x.shape[2], x) if policy.caps else None  # (B, T, H), inf where none applies
    dense = any(cap.every < DENSE_CAP for cap in policy.caps)
    ends = {length}
    if caps is not None and not dense:
        ends |= {t + 1 for t in torch.isfinite(caps).flatten(2).any(2).any(0).nonzero().flatten().tolist()}
    if drop is not None:
        ends |= {t for t in drop.any(0).nonzero().flatten().tolist() if t > 0}

    state, outputs = carry.state, []
    start = policy.start_state(state) if drop is not None else None
    chunk = CHUNK if log_decay.ndim == 3 else CHUNK_PER_CHANNEL
    t = 0
    for end in sorted(ends):
        while t < end:
            u = min(end, t + chunk)
            if drop is not None and start is not None and drop[:, t].any():
                state = torch.where(drop[:, t].to(state.device)[:, None, None, None], start, state)
            part = x[:, t:u], log_decay[:, t:u], scale[:, t:u], B[:, t:u], C[:, t:u]
            if caps is not None and dense:
                ld, w = capped_gates(*part[:4], state, caps[:, t:u])
                y, state = piece(part[0], ld, w, *part[3:], state)
            else:
                y, state = piece(*part, state)
                if caps is not None and u == end and torch.isfinite(caps[:, u - 1]).any():
                    r = clip_factor(state, caps[:, u - 1])  # (B, H)
                    state = state * r[..., None, None]
                    y = torch.cat([y[:, :-1], y[:, -1:] * r[:, None, :, None]], 1)
            outputs.append(y)
            t = u
    return torch.cat(outputs, 1), ScanCarry(state, carry.position, carry.log_decay)


def piece(x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One piece of c tokens from `state` (B,H,P,N): outputs (B,c,H,P) and the state after it."""
    if log_decay.ndim == 4:
        return _piece_per_channel(x, log_decay, scale, B, C, state)
    batch, c, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    per_group = heads // groups
    wide = per_group * headdim  # R*P: the heads of a group side by side, so that they share one product with B or C

    cum = log_decay.transpose(1, 2).cumsum(-1)  # (B, H, c)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (B, G, c, N)
    x_heads = x.transpose(1, 2)  # (B, H, c, P)

    # within the piece
    weights = (cum[..., :, None] - cum[..., None, :]).masked_fill(_above(c, x.device), float("-inf")).exp()
    weights = weights * scale.transpose(1, 2)[..., None, :]  # (B, H, c, c)
    weights = weights.view(batch, groups, per_group, c, c) * (C @ B.mT)[:, :, None]
    y = weights.view(batch, heads, c, c) @ x_heads  # (B, H, c, P)

    # from the state before it: C (c, N) @ S^T (N, R*P)
    before = C @ state.view(batch, groups, wide, d_state).mT  # (B, G, c, R*P)
    before = before.view(batch, groups, c, per_group, headdim).transpose(2, 3).reshape(batch, heads, c, headdim)
    y = y + before * cum.exp()[..., None]

    # the state after it: (R*P, c) @ B (c, N)
    left = scale.transpose(1, 2) * (cum[..., -1:] - cum).exp()  # (B, H, c)
    weighted = (x_heads * left[..., None]).transpose(2, 3).reshape(batch, groups, wide, c)
    added = (weighted @ B).view(batch, heads, headdim, d_state)
    state = state * cum[..., -1].exp()[..., None, None] + added
    return y.transpose(1, 2), state


def _piece_per_channel(x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor,
                       state: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    c, heads = x.shape[1:3]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))  # (B, c, H, N)
    cum = log_decay.cumsum(1)  # (B, c, H, N)
    decay = cum[:, :, None] - cum[:, None]  # (B, t, s, H, N)
    decay = decay.masked_fill(_above(c, x.device)[:, :, None, None], float("-inf")).exp()
    weights = torch.einsum("bthn,btshn,bshn->bhts", C, decay, B * scale[..., None])
    y = torch.einsum("bhts,bshp->bthp", weights, x)
    y = y + torch.einsum("bthn,bhpn->bthp", C * cum.exp(), state)
    left = B * (cum[:, -1:] - cum).exp() * scale[..., None]
    state = state * cum[:, -1].exp()[:, :, None] + torch.einsum("bshp,bshn->bhpn", x, left)
    return y, state


def _above(c: int, device: torch.device) -> Tensor:
    return torch.ones(c, c, dtype=torch.bool, device=device).triu(1)
