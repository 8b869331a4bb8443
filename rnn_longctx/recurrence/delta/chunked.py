"""The delta rule in PyTorch: streaming, differentiable, on any device.

A call of T tokens is cut wherever some row's state is dropped or capped, and between the cuts into chunks. Let
cum = cumsum(log_decay) within a chunk that begins with the state S_0, and write what a chunk adds to the state as
e_t along_t^T + w_t x_t B_t^T. What is erased at t hangs on what was added before it,

    e_t = -erase_t (S_0 r_t + sum_{s < t} [(along_s . r_ts) e_s + (B_s . r_ts) w_s x_s])

with r_t = read_t exp(cum_t), r_ts = read_t exp(cum_t - cum_s), and cum_{t-1} for cum_t where the read comes before the
decay. That is one triangular system of equations a chunk, (I + L) E = ..., the WY form of DeltaNet (arXiv 2406.06484,
section 3). Its matrix knows nothing of S_0 and is made for several chunks at once. Where along is the key,
e_t + w_t x_t is one unknown.

exp(cum_t - cum_s) is split into two factors where a chunk forgets less than exp(-FACTOR). Where it forgets more, it is
split around the start of a sub-chunk, so that no factor is above 1; and inside a sub-chunk that forgets more than that,
the differences are taken first.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.delta.walk import by_head, walk
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd.caps import clip_factor, row_caps

CHUNK = 64
BLOCK = 4  # chunks whose products are made at once: what they need should lie in a cache
SUB_CHUNK = 16
FACTOR = 60.0  # nats; exp(60) = 1e26 leaves float32 room for a factor of 1e12
DENSE_CAP = 8  # caps that apply more often than this are found token after token


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
    if dense or length == 1:
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
    length, outputs, t = inputs.x.shape[1], [], 0
    while t < length:
        chunks = min(BLOCK, (length - t) // CHUNK)
        u = t + chunks * CHUNK if chunks else length
        y, state = block(inputs.tokens(t, u), gates.tokens(t, u), state, max(chunks, 1))
        outputs.append(y)
        t = u
    return _joined(outputs), state


def block(inputs: ScanInputs, gates: DeltaGates, state: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Read n chunks of one length: what does not hang on the state for all of them in one product."""
    batch, _, heads, _ = inputs.x.shape
    assert gates.erase is not None

    def chunks(t: Tensor) -> Tensor:
        """Return (n, B * H, c, ·) of (B, T, H or G, ·), or of (B, T, H)."""
        t = t if t.ndim == 4 else t[..., None]
        return by_head(t, heads).unflatten(1, (n, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    key, query, log_decay = chunks(inputs.B), chunks(inputs.C), chunks(gates.log_decay)
    values = chunks(inputs.x) * chunks(gates.input_scale)
    read = (key if gates.read is None else chunks(gates.read)) * chunks(gates.erase)
    cum = log_decay.cumsum(2)  # (n, B * H, c, N or 1)
    cum_read = cum if gates.decay_first else cum - log_decay
    kept = cum[:, :, -1:]
    # from the chunk's start: what of the state is erased, and what queries see of it; to its end: what stays of a token
    erases, sees, stays = read * cum_read.exp(), query * cum.exp(), (kept - cum).exp()
    products: _Split | _Pairs | _SubChunks
    if float(cum.detach().abs().amax()) < FACTOR:
        products = _Split(erases, sees, cum)
    else:
        products = (_SubChunks if gates.per_channel else _Pairs)(read, query, cum_read, cum)
    # What is added is solved for, a row a token; where it is not added along the key, what is written has its own rows.
    if gates.along is None:
        L, seen = products.with_tokens(key)
        right, added, writes = values, None, key * stays
    else:
        along = chunks(gates.along)
        (L, seen_erased), (held, seen_written) = products.with_tokens(along), products.with_tokens(key)
        right, added = -(held.tril(-1) @ values), values
        seen, writes = torch.cat([seen_erased, seen_written], -1), torch.cat([along * stays, key * stays], 2)
    S, kept, outputs = state.flatten(0, 1), kept.exp(), []
    for i in range(n):
        solved = torch.linalg.solve_triangular(
            L[i], torch.baddbmm(right[i], erases[i], S.mT, alpha=-1), upper=False, unitriangular=True
        )
        rows = solved if added is None else torch.cat([solved, added[i]], 1)  # (B * H, c or 2 c, P)
        outputs.append(torch.baddbmm(torch.bmm(sees[i], S.mT), seen[i], rows))
        S = torch.baddbmm(S * kept[i], rows.mT, writes[i])
    y = torch.stack(outputs).unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return y, S.unflatten(0, (batch, heads))


class _Split:
    """Inner products under the decays of a chunk, exp(cum_t - cum_s) split into exp(cum_t) and exp(-cum_s)."""

    def __init__(self, erases: Tensor, sees: Tensor, cum: Tensor):
        self.erases, self.sees, self.grow = erases, sees, (-cum).exp()

    def with_tokens(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each token t reads for erasing, and what its query sees, of a key at each s: (n, B * H, c, c). Of
        the first only what stands below the diagonal means something; the second is 0 above it."""
        grown = (key * self.grow).mT
        return self.erases @ grown, (self.sees @ grown).tril()


class _Pairs:
    """The same where a chunk forgets too much for that and has one decay a head: a factor a pair of tokens."""

    def __init__(self, read: Tensor, query: Tensor, cum_read: Tensor, cum: Tensor):
        self.read, self.query = read, query
        later = torch.ones(cum.shape[2], cum.shape[2], dtype=torch.bool, device=cum.device).triu(1)
        self.of_query = (cum - cum.mT).masked_fill(later, -torch.inf).exp()
        self.of_read = (
            self.of_query if cum_read is cum else (cum_read - cum.mT).masked_fill(~later.mT, -torch.inf).exp()
        )

    def with_tokens(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Split.with_tokens`."""
        return (self.read @ key.mT) * self.of_read, (self.query @ key.mT) * self.of_query


class _SubChunks:
    """The same with a decay a channel: split around the start of each sub-chunk."""

    def __init__(self, read: Tensor, query: Tensor, cum_read: Tensor, cum: Tensor):
        self.lefts, self.seen, self.cum = (read, query), (cum_read, cum), cum

    def with_tokens(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Split.with_tokens`."""
        c = key.shape[2]
        rows = [self._sub_chunk(key, b, min(b + SUB_CHUNK, c)) for b in range(0, c, SUB_CHUNK)]
        of_read, of_query = zip(*rows)
        return torch.cat(of_read, 2), torch.cat(of_query, 2).tril()

    def _sub_chunk(self, key: Tensor, b: int, e: int) -> list[Tensor]:
        """Return the products of the tokens from b up to and without e with the key at all s of the chunk."""
        start = self.cum[:, :, b - 1 : b] if b else torch.zeros_like(self.cum[:, :, :1])
        before = (key[:, :, :b] * (start - self.cum[:, :, :b]).exp()).mT
        within, near = self.cum[:, :, b:e] - start, key[:, :, b:e]
        after = key.new_zeros(*key.shape[:2], e - b, key.shape[2] - e)
        rows = []
        for left, cum in zip(self.lefts, self.seen):
            seen, tokens = cum[:, :, b:e] - start, left[:, :, b:e]
            if float(within.detach().abs().amax()) < FACTOR:
                inside = (tokens * seen.exp()) @ (near * (-within).exp()).mT
            else:
                inside = _differences_first(tokens, seen, near, within)
            rows.append(torch.cat([(tokens * seen.exp()) @ before, inside, after], -1))
        return rows


def _differences_first(left: Tensor, seen: Tensor, key: Tensor, cum: Tensor) -> Tensor:
    """Return the products inside a sub-chunk where no split is safe."""
    differences = seen[..., :, None, :] - cum[..., None, :, :]  # (n, B * H, t, s, N or 1)
    later = torch.ones(left.shape[2], left.shape[2], dtype=torch.bool, device=left.device).triu(1)[..., None]
    decays = differences.masked_fill(later, 0.0).clamp(max=FACTOR).exp()
    return (left[..., :, None, :] * key[..., None, :, :] * decays).sum(-1)


def _joined(outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
