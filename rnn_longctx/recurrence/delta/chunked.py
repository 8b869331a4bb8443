"""The delta rule in PyTorch: streaming, differentiable, on any device.

A call of T tokens is cut wherever some row's state is dropped or capped, and between the cuts into chunks. Let
cum = cumsum(log_decay) within a chunk that begins with the state S_0, and write what a chunk adds to the state as
e_t along_t^T + w_t x_t B_t^T. What is erased at t hangs on what was added before it,

    e_t = -erase_t (S_0 r_t + sum_{s < t} [(along_s . r_ts) e_s + (B_s . r_ts) w_s x_s])

with r_t = read_t exp(cum_t), r_ts = read_t exp(cum_t - cum_s), and cum_{t-1} for cum_t where the read comes before the
decay. That is one triangular system of equations a chunk, (I + L) E = ..., the WY form of DeltaNet (arXiv 2406.06484,
section 3). Its matrix knows nothing of S_0 and is made for several chunks at once. Where along is the key,
e_t + w_t x_t is one unknown.

How exp(cum_t - cum_s) becomes products of matrices, `rnn_longctx.recurrence.delta.decayed` says.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.delta.decayed import LIMITS, decayed
from rnn_longctx.recurrence.delta.walk import by_head, walk
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd.caps import clip_factor, row_caps

CHUNK = 64
BLOCK = 64  # chunks, of all rows and heads, whose products are made at once: what they need should lie in a cache
DENSE_CAP = 8  # caps that apply more often than this are found token after token
GROWTH = 8.0  # nats in a chunk: what grows more is read token after token, as factors are cut off below (`decayed`)


def chunked_scan(
    inputs: ScanInputs,
    gates: DeltaGates,
    *,
    policy: ScanPolicy,
    carry: ScanCarry,
    counts: Tensor | None,
    drop: Tensor | None,
) -> tuple[Tensor, ScanCarry]:
    """Read T tokens with their gates worked out.

    Args: inputs x (B,T,H,P), B and C (B,T,G,N); gates (B,T,H[,N]), all of one floating dtype; counts (B,T) int64 on the
        CPU, tokens read by each row up to and with t (None if the policy needs none); drop (B,T) bool on the CPU, True
        where the state is dropped before the token.
    Returns: y (B,T,H,P) without D's part, and the carry (its position and log_decay are the caller's).
    """
    length, heads = inputs.x.shape[1:3]
    caps = row_caps(policy, counts, heads, inputs.x) if policy.caps else None  # (B, T, H), inf where none applies
    dense = any(cap.every < DENSE_CAP for cap in policy.caps)
    if dense or length == 1 or float(gates.log_decay.detach().amax()) * CHUNK > GROWTH:
        start = policy.start_state(carry.state) if drop is not None else None
        y, state = walk(inputs, gates, carry.state, caps, drop, start)
        return y, ScanCarry(state, carry.position, carry.log_decay)
    ends = {length}
    if caps is not None:
        ends |= {t + 1 for t in torch.isfinite(caps).flatten(2).any(2).any(0).nonzero().flatten().tolist()}
    if drop is not None:
        ends |= {t for t in drop.any(0).nonzero().flatten().tolist() if t > 0}
    state, outputs = carry.state, []
    for t, u in pairwise([0, *sorted(ends)]):
        if drop is not None and drop[:, t].any():
            begun = drop[:, t].to(state.device)[:, None, None, None]
            state = torch.where(begun, policy.start_state(state), state)
        y, state = uncut(inputs.tokens(t, u), gates.tokens(t, u), state)
        if caps is not None and torch.isfinite(caps[:, u - 1]).any():
            r = clip_factor(state, caps[:, u - 1])  # (B, H)
            state = state * r[..., None, None]
            y = torch.cat([y[:, :-1], y[:, -1:] * r[:, None, :, None]], 1)
        outputs.append(y)
    return _joined(outputs), ScanCarry(state, carry.position, carry.log_decay)


def uncut(inputs: ScanInputs, gates: DeltaGates, state: Tensor) -> tuple[Tensor, Tensor]:
    """Read any number of tokens with nothing in between: outputs (B,T,H,P) and the state after them."""
    batch, length, heads, _ = inputs.x.shape
    whole, most = length // CHUNK, max(1, BLOCK // (batch * heads))
    chunks = [min(most, whole - i) for i in range(0, whole, most)]
    sizes = [n * CHUNK for n in chunks]
    if length % CHUNK:
        chunks, sizes = [*chunks, 1], [*sizes, length % CHUNK]
    outputs: list[Tensor] = []
    tensors = (inputs.x, inputs.B, inputs.C, *gates.tensors)
    # (split, not sliced: the gradient of each slice would be as long as the whole)
    pieces = [[None] * len(sizes) if t is None else t.split(sizes, 1) for t in tensors]
    for n, x, B, C, *parts in zip(chunks, *pieces):
        y, state = block(ScanInputs(x, B, C), gates.from_tensors(*parts), state, n)
        outputs += y
    return _joined(outputs), state


def block(inputs: ScanInputs, gates: DeltaGates, state: Tensor, n: int) -> tuple[list[Tensor], Tensor]:
    """Read n chunks of one length c: what does not hang on the state for all of them in one product. Returns the
    outputs of each, (B, c, H, P), and the state after them."""
    batch, _, heads, _ = inputs.x.shape
    assert gates.erase is not None

    def chunks(t: Tensor) -> Tensor:
        """Return (n * B * H, c, ·) of (B, T, H or G, ·), or of (B, T, H)."""
        t = t if t.ndim == 4 else t[..., None]
        return by_head(t, heads).unflatten(1, (n, -1)).permute(1, 0, 3, 2, 4).flatten(0, 2).contiguous()

    def each(t: Tensor) -> tuple[Tensor, ...]:
        """Return (B * H, ·, ·) of every chunk."""
        return t.unflatten(0, (n, -1)).unbind()

    key, query, log_decay = chunks(inputs.B), chunks(inputs.C), chunks(gates.log_decay)
    values = chunks(inputs.x) * chunks(gates.input_scale)
    read = (key if gates.read is None else chunks(gates.read)) * chunks(gates.erase)
    cum = log_decay.cumsum(1)
    cum_read = cum if gates.decay_first else cum - log_decay
    # What is added is solved for, a row a token; where it is not added along the key, what is written has its own rows.
    if gates.along is None:
        within = decayed((read, query), (cum_read, cum), (key,), cum)
        (L,), (seen,) = within.products
        (writes,), right, added = within.rights, values, None
        seen = seen.tril_()
    else:
        within = decayed((read, query), (cum_read, cum), (chunks(gates.along), key), cum)
        (L, held), seen_of = within.products
        right, added = -(held.tril_(-1) @ values), each(values)
        seen, writes = torch.cat([t.tril_() for t in seen_of], -1), torch.cat(within.rights, 1)
    erases, sees = within.lefts
    # how a state enters the chunk's products, and goes on from their frame to its end
    enters, stays = within.begin.exp(), within.end.clamp(min=-2 * LIMITS[cum.dtype]).exp()
    leaves = (cum[:, -1:] - within.end).exp()
    S, outputs = state.flatten(0, 1), []
    of_chunks = zip(*(each(t) for t in (L, right, erases, sees, seen, writes, enters, stays, leaves)))
    for i, (L, right, erases, sees, seen, writes, enters, stays, leaves) in enumerate(of_chunks):
        entered = (S * enters).mT
        rows = torch.linalg.solve_triangular(
            L, torch.baddbmm(right, erases, entered, alpha=-1), upper=False, unitriangular=True
        )
        rows = rows if added is None else torch.cat([rows, added[i]], 1)  # (B * H, c or 2 c, P)
        y = torch.baddbmm(torch.bmm(sees, entered), seen, rows)
        outputs.append(y.unflatten(0, (batch, heads)).transpose(1, 2))
        S = torch.baddbmm(S * stays, rows.mT, writes) * leaves
    return outputs, S.unflatten(0, (batch, heads))


def _joined(outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
