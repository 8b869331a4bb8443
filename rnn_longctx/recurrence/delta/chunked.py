"""The delta rule in PyTorch: streaming, differentiable, on any device.

A call of T tokens is cut wherever some row's state is dropped or capped, and between the cuts into chunks. Let
cum = cumsum(log_decay) within a chunk that begins with the state S_0, and write what a chunk adds to the state as
e_t along_t^T + w_t x_t B_t^T. What is erased at t hangs on what was added before it,

    e_t = -erase_t (S_0 r_t + sum_{s < t} [(along_s . r_ts) e_s + (B_s . r_ts) w_s x_s])

with r_t = read_t exp(cum_t), r_ts = read_t exp(cum_t - cum_s), and cum_{t-1} for cum_t where the read comes before the
decay. That is one triangular system of equations a chunk, (I + L) E = ..., the WY form of DeltaNet (arXiv 2406.06484,
section 3); its matrix knows nothing of S_0, so it is solved for many chunks at once, and what is left to do from chunk
to chunk are three products with the state. Where along is the key, e_t + w_t x_t is one unknown.

Per channel, exp(cum_t - cum_s) stands inside the inner product. It is split into two factors around the start of a
sub-chunk, so that none is above 1; inside a sub-chunk factors are bounded by FACTOR, beyond which the differences are
taken first.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.delta.walk import walk
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd.caps import clip_factor, row_caps

CHUNK = 64
BLOCK = 16  # chunks whose equations are solved at once
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
    heads = inputs.x.shape[2]

    def chunks(t: Tensor) -> Tensor:  # (B, T, G or H[, ·]) to (B, n, H, c[, ·])
        t = t.unflatten(1, (n, -1)).transpose(2, 3)
        return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], 2)

    x, key, query, log_decay, write, erase = map(
        chunks, (inputs.x, inputs.B, inputs.C, gates.log_decay, gates.input_scale, gates.erase)
    )
    read = key if gates.read is None else chunks(gates.read)
    cum = log_decay.cumsum(3)
    cum_read = cum if gates.decay_first else cum - log_decay
    decays = _Decays(cum, cum_read)
    from_start = read * _wide(cum_read.exp()) * erase[..., None]  # (B, n, H, c, N): times S_0, what S_0 loses
    query_start = query * _wide(cum.exp())
    to_end = _wide((cum[..., -1:, :] - cum if gates.per_channel else cum[..., -1:] - cum).exp())
    values = x * write[..., None]
    lower = torch.ones(x.shape[3], x.shape[3], dtype=torch.bool, device=x.device).tril()
    strictly = lower.tril(-1)

    if gates.along is None:  # erased and written along the key: one unknown a token
        of_read, of_query = decays.products(read, query, key)
        L = (of_read * erase[..., None]).masked_fill(~strictly, 0.0)
        solved = _solve(L, torch.cat([values, from_start], -1))
        added, lost = solved.split([x.shape[-1], key.shape[-1]], -1)
        attention = of_query.masked_fill(~lower, 0.0)
        writes = key * to_end
    else:
        along = chunks(gates.along)
        read_along, query_along = decays.products(read, query, along)
        read_key, query_key = decays.products(read, query, key)
        L = (read_along * erase[..., None]).masked_fill(~strictly, 0.0)
        held = (read_key * erase[..., None]).masked_fill(~strictly, 0.0) @ values
        solved = _solve(L, torch.cat([-held, from_start], -1))
        erased, lost = solved.split([x.shape[-1], key.shape[-1]], -1)
        # the tokens of a chunk twice: first what they erase, then what they write
        added = torch.cat([erased, values], 3)
        lost = torch.cat([lost, torch.zeros_like(lost)], 3)
        attention = torch.cat([query_along.masked_fill(~lower, 0.0), query_key.masked_fill(~lower, 0.0)], -1)
        writes = torch.cat([along * to_end, key * to_end], 3)

    kept = cum[..., -1, :].exp()[..., None, :] if gates.per_channel else cum[..., -1].exp()[..., None, None]
    outputs = []
    for i in range(n):
        u = added[:, i] - lost[:, i] @ state.mT  # (B, H, c, P)
        outputs.append(query_start[:, i] @ state.mT + attention[:, i] @ u)
        state = state * kept[:, i] + u.mT @ writes[:, i]
    y = torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)
    return y, state


class _Decays:
    """Inner products under the decays of a chunk: of tokens t with tokens s before them, or with themselves.

    Args: cum, cum_read (B, n, H, c) or (B, n, H, c, N): the log-decay from the chunk's start up to and with a token, as
        queries see it, and as what is read before an erasure does. What stands above the diagonal is finite, no more.
    """

    def __init__(self, cum: Tensor, cum_read: Tensor):
        self.cum, self.cum_read = cum, cum_read
        self.per_channel = cum.ndim == 5
        if not self.per_channel:
            after = torch.ones(cum.shape[3], cum.shape[3], dtype=torch.bool, device=cum.device).triu(1)
            self.of_query = (cum[..., :, None] - cum[..., None, :]).masked_fill(after, 0.0).exp()
            self.of_read = (
                self.of_query
                if cum is cum_read
                else (cum_read[..., :, None] - cum[..., None, :]).masked_fill(~after.mT, 0.0).exp()
            )

    def products(self, read: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return read_t . key_s and query_t . key_s, decayed from s to t: twice (B, n, H, c, c)."""
        if not self.per_channel:
            return (read @ key.mT) * self.of_read, (query @ key.mT) * self.of_query
        c = key.shape[3]
        rows = [self._rows(read, query, key, b, min(b + SUB_CHUNK, c)) for b in range(0, c, SUB_CHUNK)]
        of_read, of_query = zip(*rows)
        return torch.cat(of_read, -2), torch.cat(of_query, -2)

    def _rows(self, read: Tensor, query: Tensor, key: Tensor, b: int, e: int) -> tuple[Tensor, Tensor]:
        """Return the products of the tokens t of one sub-chunk, from b up to and without e, with all s of the chunk."""
        zero = torch.zeros_like(self.cum[..., :1, :])
        start = self.cum[..., b - 1 : b, :] if b else zero  # (B, n, H, 1, N)
        seen = [cum[..., b:e, :] - start for cum in (self.cum_read, self.cum)]  # from the sub-chunk's start
        lefts = torch.cat([read[..., b:e, :] * seen[0].exp(), query[..., b:e, :] * seen[1].exp()], -2)
        before = lefts @ (key[..., :b, :] * (start - self.cum[..., :b, :]).exp()).mT
        own = self.cum[..., b:e, :] - start
        if float(own.detach().abs().amax()) < FACTOR:
            within = lefts @ (key[..., b:e, :] * (-own).exp()).mT
        else:
            within = torch.cat(
                [_masked(t[..., b:e, :], k, own, key[..., b:e, :]) for t, k in ((read, seen[0]), (query, seen[1]))], -2
            )
        after = within.new_zeros(*within.shape[:-1], key.shape[3] - e)
        whole = torch.cat([before, within, after], -1)
        return whole[..., : e - b, :], whole[..., e - b :, :]


def _masked(left: Tensor, seen: Tensor, own: Tensor, key: Tensor) -> Tensor:
    """Return the products inside a sub-chunk where decays are too hard to be split: the differences first."""
    differences = seen[..., :, None, :] - own[..., None, :, :]  # (B, n, H, t, s, N)
    after = torch.ones(left.shape[-2], left.shape[-2], dtype=torch.bool, device=left.device).triu(1)
    decays = differences.masked_fill(after[..., None] | (differences > FACTOR), 0.0).exp()
    return (left[..., :, None, :] * key[..., None, :, :] * decays).sum(-1)


def _solve(L: Tensor, right: Tensor) -> Tensor:
    """Return (I + L)^-1 right, of a strictly lower triangular L (..., c, c)."""
    return torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True)


def _wide(t: Tensor) -> Tensor:
    """Return decays (B, n, H, c) or (B, n, H, c, N) as a factor of (B, n, H, c, N)."""
    return t if t.ndim == 5 else t[..., None]


def _joined(outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
