"""The scan in PyTorch: streaming, differentiable, on any device.

A call of T tokens is cut into pieces: at most CHUNK tokens long, and cut wherever some row's state is dropped
(document boundaries) or capped (every k tokens). Inside a piece the recurrence is a masked matrix product, the
state-space duality of arXiv 2405.21060 (section 6):

    y_t = exp(cum_t) C_t S_0 + sum_{s <= t} exp(cum_t - cum_s) w_s (C_t . B_s) x_s,   cum = cumsum(log_decay)

Where a piece forgets less than exp(-FACTOR) the exponentials are split into factors, which lets the heads of a group
share their products; where it forgets more, differences are masked before the exponential, and nothing overflows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd.caps import capped_gates, clip_factor, row_caps
from rnn_longctx.recurrence.ssd.channels import states
from rnn_longctx.recurrence.ssd.window import window_scan

CHUNK = 64  # the best on CPU among 32, 64, 128, 256
BLOCK = 16  # pieces that are worked out together; a block's memory is that of its inputs times d_state / CHUNK
CHUNK_PER_CHANNEL = 16  # the decays of a piece are (H, c, c, N) numbers there, but for heads of headdim 1
NUMBERS = 2**26  # of the states of a piece, where all are kept at once on a GPU (headdim 1)
FACTOR = 60.0  # nats; exp(60) = 1e26 leaves float32 room for a factor of 1e12
# Caps that apply more often than this are found token by token inside a piece instead of cutting it.
DENSE_CAP = 32
Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, log_decay, scale, B, C of some tokens


def chunked_scan(
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
    """Scan T tokens with their gates worked out.

    Args: x (B,T,H,P), gates (B,T,H[,N]) and (B,T,H), B and C (B,T,G,N), all of one floating dtype;
        counts (B,T) int64 on the CPU, tokens read by each row up to and with t (None if the policy needs none);
        drop (B,T) bool on the CPU, True where the state is dropped before the token.
    Returns: y (B,T,H,P) and the carry (its position and log_decay are the caller's).
    """
    if policy.window is not None:
        return window_scan(x, gates, B, C, size=policy.window, carry=carry, drop=drop, piece=piece)
    log_decay, scale, length = gates.log_decay, gates.input_scale, x.shape[1]
    caps = row_caps(policy, counts, x.shape[2], x) if policy.caps else None  # (B, T, H), inf where none applies
    dense = any(cap.every < DENSE_CAP for cap in policy.caps)
    drops = [] if drop is None else [t for t in drop.any(0).nonzero().flatten().tolist() if t > 0]
    capped = [] if caps is None or dense else (torch.isfinite(caps).any(2).any(0).nonzero().flatten() + 1).tolist()

    state, outputs = carry.state, []
    start = policy.start_state(state) if drop is not None else None
    edges = _edges({length, *drops}, capped, None if log_decay.ndim == 4 else CHUNK)
    # split, not slices: the gradient of each slice would be as large as the whole
    parts = _split((x, log_decay, scale, B, C), [u - t for t, u in pairwise(edges)])
    tokens: Tokens
    for (t, u), tokens in zip(pairwise(edges), parts, strict=True):
        if drop is not None and start is not None and drop[:, t].any():
            state = torch.where(drop[:, t].to(state.device)[:, None, None, None], start, state)
        if caps is not None and dense:
            y, state = _densely_capped(*tokens, state, caps[:, t:u])
        else:
            y, state = uncut(*tokens, state, None if caps is None else caps[:, t:u])
        outputs.append(y)
    return _joined(outputs), ScanCarry(state, carry.position, carry.log_decay)


def _edges(ends: set[int], capped: list[int], grid: int | None) -> list[int]:
    """Return where tokens are cut, from 0 on: at `ends`, and behind capped tokens, but where `grid` tokens after the
    last cut, or a multiple of them, pieces end anyway (None: nowhere)."""
    edges = [0]
    for end in sorted({*ends, *capped}):
        if end in ends or grid is None or (end - edges[-1]) % grid:
            edges.append(end)
    return edges


def _joined(outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def _split(tensors: tuple[Tensor, ...], sizes: list[int]) -> Iterator[Any]:
    return zip(*(v.split(sizes, 1) for v in tensors), strict=True)


def _sizes(length: int, most: int) -> list[int]:
    return [most] * (length // most) + ([length % most] if length % most else [])


def _longest(x: Tensor, log_decay: Tensor) -> int:
    """Return how many tokens a piece holds."""
    if log_decay.ndim < 4 or (x.shape[3] == 1 and not x.is_cuda):
        return CHUNK
    if x.shape[3] > 1:
        return CHUNK_PER_CHANNEL
    return max(CHUNK, NUMBERS // (log_decay.numel() // log_decay.shape[1]))


def _densely_capped(
    x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor, caps: Tensor
) -> tuple[Tensor, Tensor]:
    """Caps found token by token: each piece hangs on the capped state that the one before it leaves."""
    outputs = []
    sizes = _sizes(x.shape[1], _longest(x, log_decay))
    for some, ld, w, b, c, cap in _split((x, log_decay, scale, B, C, caps), sizes):
        ld, w = capped_gates(some, ld, w, b, state, cap)
        y, state = piece(some, ld, w, b, c, state)
        outputs.append(y)
    return _joined(outputs), state


def uncut(
    x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor, caps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens with nothing in between, any number, but for caps (B,T,H) as `_edges` leaves them: outputs (B,T,H,P) and
    the state after them."""
    outputs = []
    per_channel = log_decay.ndim == 4
    whole = 0 if per_channel else x.shape[1] // CHUNK * CHUNK  # in blocks of whole pieces, then what is left
    sizes = _sizes(whole, BLOCK * CHUNK) + _sizes(x.shape[1] - whole, _longest(x, log_decay))
    tokens: Tokens
    for size, end, tokens in zip(sizes, accumulate(sizes), _split((x, log_decay, scale, B, C), sizes), strict=True):
        if per_channel or size % CHUNK:
            y, state = _piece_and_cap(*tokens, state, None if caps is None else caps[:, end - 1])
        else:
            y, state = block(*tokens, state, None if caps is None else caps[:, end - size : end][:, CHUNK - 1 :: CHUNK])
        outputs.append(y)
    return _joined(outputs), state


def block(
    x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor, caps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """n whole pieces of CHUNK tokens: what does not hang on the state, for all of them in one product. caps (B,n,H) are
    in force after the pieces."""
    n = x.shape[1] // CHUNK
    cum = log_decay.unflatten(1, (n, CHUNK)).cumsum(2)  # (B, n, c, H)
    if n == 1 or float(cum.detach().abs().amax()) >= FACTOR:
        outputs = []
        tokens: Tokens
        for i, tokens in enumerate(_split((x, log_decay, scale, B, C), [CHUNK] * n)):
            y, state = _piece_and_cap(*tokens, state, None if caps is None else caps[:, i])
            outputs.append(y)
        return _joined(outputs), state
    batch, _, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    grow = cum.exp()
    weighted = x * (scale.unflatten(1, (n, CHUNK)) * (-cum).exp()).flatten(1, 2)[..., None]
    weighted, B, C = (_by_group(v, n, groups) for v in (weighted, B, C))  # (B*n*G, c, R*P or N)
    y = (C @ B.mT).tril_() @ weighted
    added = (weighted.mT @ B).view(batch, n, heads, headdim, d_state)
    last = grow[:, :, -1, :, None, None]  # (B, n, H, 1, 1)
    before, clipped = [], []
    for i, (added_by_one, decay) in enumerate(zip(added.unbind(1), last.unbind(1), strict=True)):
        before.append(state)
        state = _scaled(state + added_by_one, decay)
        if caps is not None:
            clipped.append(clip_factor(state, caps[:, i]))  # (B, H)
            state = _scaled(state, clipped[-1][..., None, None])
    states = torch.stack(before, 1).view(batch * n * groups, -1, d_state)
    y = (
        y.baddbmm_(C, states.mT)
        .view(batch, n, groups, CHUNK, -1)
        .transpose(2, 3)
        .reshape(batch, n, CHUNK, heads, headdim)
    )
    if clipped:  # the output of a piece's last token is of the state that was capped
        grow = torch.cat([grow[:, :, :-1], grow[:, :, -1:] * torch.stack(clipped, 1)[:, :, None]], 2)
    return _scaled(y, grow[..., None]).flatten(1, 2), state


def _scaled(v: Tensor, factor: Tensor) -> Tensor:
    """Return v times the factor, in v's own memory where no gradient needs v as it was."""
    return v * factor if v.requires_grad else v.mul_(factor)


def _by_group(v: Tensor, n: int, groups: int) -> Tensor:
    """(B, n*c, G or H, X) to (B*n*G, c, everything else)."""
    v = v.reshape(v.shape[0], n, CHUNK, groups, -1).transpose(2, 3)
    return v.reshape(-1, CHUNK, v.shape[-1])


def _piece_and_cap(
    x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor, cap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`piece`, with cap (B,H) in force after its last token."""
    y, state = piece(x, log_decay, scale, B, C, state)
    if cap is None or not torch.isfinite(cap).any():
        return y, state
    r = clip_factor(state, cap)  # (B, H)
    return torch.cat([y[:, :-1], y[:, -1:] * r[:, None, :, None]], 1), state * r[..., None, None]


def piece(x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One piece of c tokens from `state` (B,H,P,N): outputs (B,c,H,P) and the state after it."""
    if log_decay.ndim == 4:
        return (_piece_per_channel if x.shape[3] > 1 else _piece_of_channels)(x, log_decay, scale, B, C, state)
    cum = log_decay.cumsum(1)  # (B, c, H)
    if float(cum.detach().abs().amax()) < FACTOR:
        return _piece_factored(x, cum, scale, B, C, state)
    return _piece_masked(x, cum, scale, B, C, state)


def _piece_factored(
    x: Tensor, cum: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """exp(cum_t - cum_s) as exp(cum_t) * exp(-cum_s): the heads of a group then share one masked product. All terms
    of a sum are scaled alike, so nothing is lost as long as neither factor leaves the range of floats."""
    batch, c, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    flat = (batch * groups, c, -1)
    B, C = (t.transpose(1, 2).reshape(flat) for t in (B, C))  # (B*G, c, N)
    weighted = x * (scale * (-cum).exp())[..., None]
    weighted = weighted.unflatten(2, (groups, -1)).transpose(1, 2).reshape(flat)  # (B*G, c, R*P)
    state = state.reshape(batch * groups, -1, d_state)  # (B*G, R*P, N)
    y = torch.baddbmm(C @ state.mT, (C @ B.mT).tril(), weighted)
    y = y.view(batch, groups, c, -1).transpose(1, 2).reshape(batch, c, heads, headdim) * cum.exp()[..., None]
    state = torch.baddbmm(state, weighted.mT, B).view(batch, heads, headdim, d_state)
    return y, state * cum[:, -1].exp()[..., None, None]


def _piece_masked(x: Tensor, cum: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same for decays of any size: differences first, masked, then the exponential; (c, c) weights a head."""
    c, heads, groups = *x.shape[1:3], B.shape[2]
    cum, scale = cum.transpose(1, 2), scale.transpose(1, 2)  # (B, H, c)
    x, C = x.transpose(1, 2), C.transpose(1, 2)  # (B, H, c, P), (B, G, c, N)
    B = B.transpose(1, 2)
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(_above(c, x.device), float("-inf")).exp()
    inner = (C @ B.mT).repeat_interleave(heads // groups, 1)
    y = (decay * scale[..., None, :] * inner) @ x
    C, B = (t.repeat_interleave(heads // groups, 1) for t in (C, B))  # (B, H, c, N)
    y = y + (C @ state.mT) * cum.exp()[..., None]
    left = scale * (cum[..., -1:] - cum).exp()  # (B, H, c)
    state = state * cum[..., -1].exp()[..., None, None] + (x * left[..., None]).mT @ B
    return y.transpose(1, 2), state


def _piece_per_channel(
    x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
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


def _piece_of_channels(
    x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Heads of headdim 1 (Mamba-1). Decays between all pairs of tokens would be c times as many numbers as the states:
    so the states are worked out."""
    batch, c, heads, groups = *x.shape[:3], B.shape[2]
    by_group = (batch, c, groups, heads // groups, -1)
    added = ((x * scale[..., None]).reshape(by_group) * B[:, :, :, None]).view(log_decay.shape)  # (B, c, H, N)
    after = states(log_decay.exp(), added, state[:, :, 0])
    y = after.view(by_group) @ C[..., None]  # (B, c, G, H / G, 1)
    return y.reshape(x.shape), after[:, -1, :, None]


def _above(c: int, device: torch.device) -> Tensor:
    return torch.ones(c, c, dtype=torch.bool, device=device).triu(1)
