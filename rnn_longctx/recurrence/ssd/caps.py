"""Norm caps: given the factors r_t by which tokens are clipped, a capped recurrence is a plain one,

    log_decay' = log_decay + log(r_t),   input_scale' = r_t * input_scale,   r_t = min(1, cap / ||S_t before the cap||)

so only finding the r_t is sequential, and it needs one scalar a token and head. Inside a piece the capped state is
S = sum_j v_j E_j with E_0 the state before the piece and E_s = x_s B_s^T, so with K the inner products of the E_j

    ||S_t||^2 = a^2 ||S_{t-1}||^2 + 2 a w (v . K_t) + w^2 K_tt,     then v <- r a v, v_t <- r w.

v only ever shrinks, so nothing overflows. The factors carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.recurrence.policy import ScanPolicy, per_head


def row_caps(policy: ScanPolicy, counts: Tensor | None, heads: int, like: Tensor) -> Tensor:
    """The cap in force after each token, (B, T, H); infinity where none applies.

    Capping at p and then at q is capping at min(p, q), so the order of caps does not matter here.
    """
    assert counts is not None
    caps = torch.full((*counts.shape, heads), float("inf"), dtype=like.dtype, device="cpu")
    for cap in policy.caps:
        norm = per_head(cap.norm, heads, caps)
        due = ((counts > 0) & (counts % cap.every == 0))[..., None]
        caps = torch.where(due, torch.minimum(caps, torch.as_tensor(norm, dtype=caps.dtype, device="cpu")), caps)
    return caps.to(like.device)


@torch.no_grad()
def clip_factor(state: Tensor, cap: Tensor) -> Tensor:
    """min(1, cap / ||S||_F) for states (..., P, N) and caps (...)."""
    norm = state.flatten(-2).norm(dim=-1)
    return torch.where(norm > cap, cap / norm, torch.ones_like(norm))


@torch.no_grad()
def _factors(x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, state: Tensor, caps: Tensor) -> Tensor:
    """r_t of every token of a piece, (B, c, H)."""
    batch, c, heads, _ = x.shape
    per_group = heads // B.shape[2]
    a = log_decay.exp()  # (B, c, H)
    # Nothing to find where the state cannot reach a cap: ||S_t|| <= ||S_0|| + sum of w ||x|| ||B||, decays at most 1.
    size = scale.abs() * x.norm(dim=-1) * B.norm(dim=-1).repeat_interleave(per_group, 2)
    norm_sq = state.flatten(-2).square().sum(-1)  # (B, H)
    grow = log_decay.clamp(min=0).cumsum(1).exp()
    if (grow * (norm_sq.sqrt()[:, None] + size.cumsum(1)) <= caps).all():
        return torch.ones_like(a)

    x, B = x.transpose(1, 2), B.transpose(1, 2).repeat_interleave(per_group, 1)  # (B, H, c, P), (B, H, c, N)
    inner = (x @ x.mT) * (B @ B.mT)  # <E_s, E_t>, (B, H, c, c)
    with_start = ((x @ state) * B).sum(-1)  # <E_0, E_t>, (B, H, c)
    # One contiguous row a token: K[t] = (<E_0, E_t>, <E_1, E_t>, ...)
    K = torch.cat([with_start[..., None], inner], -1).permute(2, 0, 1, 3).contiguous()  # (c, B, H, 1 + c)
    diagonal = inner.diagonal(dim1=-2, dim2=-1).permute(2, 0, 1)  # (c, B, H)
    a, w, cap = (t.transpose(0, 1).contiguous() for t in (a, scale, caps))  # (c, B, H)
    cap_sq, two_aw, a_sq, w_sq_K = cap.square(), 2 * a * w, a.square(), w.square() * diagonal
    v = x.new_zeros(batch, heads, 1 + c)
    v[..., 0] = 1
    r = torch.empty_like(a)
    for t in range(c):
        cross = torch.linalg.vecdot(v[..., : t + 1], K[t, ..., : t + 1])
        norm_sq = torch.addcmul(a_sq[t] * norm_sq + w_sq_K[t], two_aw[t], cross).clamp_(min=0)
        # norm_sq of 0 (and no cap, infinity) gives a factor of at least 1, which the minimum removes
        r_t = (cap_sq[t] / norm_sq).clamp_(max=1).sqrt_()
        v[..., : t + 1] *= (r_t * a[t])[..., None]
        v[..., t + 1] = r_t * w[t]
        norm_sq = norm_sq * r_t.square()
        r[t] = r_t
    return r.transpose(0, 1)


@torch.no_grad()
def _factors_per_channel(x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, state: Tensor, caps: Tensor) -> Tensor:
    """The same where every channel decays at its own rate: no scalar recurrence exists, so the state is walked."""
    heads = x.shape[2]
    B = B.repeat_interleave(heads // B.shape[2], 2)
    r = torch.ones_like(scale)
    for t in range(x.shape[1]):
        state = (
            state * log_decay[:, t].exp()[:, :, None] + (scale[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        )
        r[:, t] = clip_factor(state, caps[:, t])
        state = state * r[:, t, :, None, None]
    return r


def capped_gates(
    x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, state: Tensor, caps: Tensor
) -> tuple[Tensor, Tensor]:
    """The gates of a piece with its caps folded in; `caps` (B, c, H), infinity where none applies."""
    if log_decay.ndim == 4:
        r = _factors_per_channel(x, log_decay, scale, B, state, caps)
        return log_decay + r.log()[..., None], scale * r
    r = _factors(x, log_decay, scale, B, state, caps)
    return log_decay + r.log(), scale * r
