"""One stream spread over the ranks of a process group, each with a shard of it, in the order of their ranks.

The recurrence is linear in the state: with F what a shard alone adds to the state at its end and L its log-decay,
the state that enters the next one is F + exp(L) S. So a layer reads (sequence-parallel scans: arXiv 2405.21060,
section 8.2)

1. F and L of every shard, side by side (`Backend.shard_sum`), and one all-gather of both;
2. the fold of those before a rank to the state S that enters its shard, on every rank for itself;
3. the ordinary scan, from S.

The other way is to scan from zero and to add exp(cum_t) S C_t to the outputs afterwards. That reads and writes all
outputs once more, before a norm that the scan could have applied as it wrote them, and its gradient needs two more
products. Step 1 takes one product, 2 P N operations a token and head beside the scan's 4 P N and those inside chunks,
writes no outputs, and leaves a head as soon as what is unread has decayed to nothing.

Backwards the same holds: with g what the outputs of a shard add to the gradient of the state before it, and dS that
of the state after it, the gradient of the state before it is g + exp(L) dS. One product and one all-gather of g, the
fold of the ranks behind, and the scan's own gradients from there: they hold what L owes to dt, A and dt_bias, because
the scan of each rank starts from its S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Backend
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.rows import row_counts
from rnn_longctx.recurrence.shard import Shard, gather
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd import pytorch


def refusal(policy: ScanPolicy, documents: bool) -> str | None:
    """Return why a policy cannot be followed over several ranks, or None. documents: whether rows hold several."""
    if policy.caps:
        return "a norm cap depends on the state itself, so a rank cannot read its tokens before the ranks before it"
    if policy.window is not None:
        return "a window's delay line is not handed from rank to rank"
    if policy.start is not None and (policy.reset is not None or documents):
        return "a stored initial state that a row begins again from is not part of what a rank adds"
    return None


def sharded_scan(
    inputs: ScanInputs,
    gates: Gates | SteppedGates,
    span: Span,
    policy: ScanPolicy,
    carry: ScanCarry,
    backend: Backend,
    read: Callable[[ScanCarry], tuple[Tensor, ScanCarry]],
) -> tuple[Tensor, ScanCarry]:
    """The scan of all shards, of which `span.shard` is this rank's. See `recurrence.ssd.scan`.

    Args:
        carry: before the first shard; its state's type is that of all states.
        read: reads this rank's shard from a carry on.
    Raises:
        InputError: decays per channel.
    """
    if gates.per_channel:
        raise InputError("a stream over several ranks is read with one decay a head, not one a channel")
    x, reset, shard, wide = inputs.x, span.reset, span.shard, carry.state.dtype
    assert shard is not None
    positions, drop = shard.positions(carry.position), None
    if reset is not None or policy.reset is not None:
        drop = row_counts(positions[shard.rank], x.shape[1], reset=reset, every=policy.reset)[1]
    add = _Sum(backend.shard_sum or pytorch.shard_sum, policy, drop, wide)

    with torch.no_grad():
        added, passed = add(x, gates, inputs.B)
        own_total = passed if reset is None else _since(gates, reset, wide, policy)
        if drop is not None:
            passed = passed.masked_fill(drop.any(1).to(x.device)[:, None], float("-inf"))
        states, passed, totals = gather(shard.group, added, passed, own_total)
        passed = passed.exp().to(wide)[..., None, None]  # (R, B, H, 1, 1)
        state, log_decay = [carry.state], [carry.log_decay]  # before each shard and after the last
        for r, begun in enumerate(shard.since >= 0):
            state.append(torch.addcmul(states[r], state[-1], passed[r]))
            last = log_decay[-1]
            if bool(begun.any()):
                last = last.masked_fill(begun.to(x.device)[:, None], 0.0)
            log_decay.append(last + totals[r])
    here = torch.where(shard.leads, carry.state, state[shard.rank])
    y, after = read(ScanCarry(here, positions[shard.rank], log_decay[shard.rank]))
    final = state[-1]
    if y.requires_grad:
        y, final = _Leave.apply(y, after.state, final, shard, add, gates.from_tensors, passed, inputs.C, *gates.tensors)
    return y, ScanCarry(final, positions[-1], log_decay[-1])


class _Sum:
    """What a shard adds, under one policy: `pytorch.shard_sum` or a backend's own."""

    def __init__(self, function: Callable, policy: ScanPolicy, drop: Tensor | None, dtype: torch.dtype):
        self.function, self.policy, self.drop, self.dtype = function, policy, drop, dtype

    @torch.no_grad()
    def __call__(self, x: Tensor, gates: Gates | SteppedGates, B: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return self.function(x, gates, B, policy=self.policy, drop=self.drop, dtype=self.dtype, back=back)


class _Leave(torch.autograd.Function):
    """y as it is, and the state after the last shard: the state after this one gets its gradient from the outputs of
    the ranks behind, and from what every rank does with the last state."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        after: Tensor,
        final: Tensor,
        shard: Shard,
        add: _Sum,
        gates: Callable,
        *saved: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """gates: makes the gates of their tensors. saved: how much every shard leaves of a state, C, those tensors."""
        ctx.save_for_backward(*saved)
        ctx.shard, ctx.add, ctx.gates, ctx.dtype = shard, add, gates, after.dtype
        return y.view_as(y), final.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple:
        passed, C, *tensors = ctx.saved_tensors
        gates = ctx.gates(*tensors)
        added, _ = ctx.add(dy, gates, C, back=True)
        sums, finals = gather(ctx.shard.group, added, dfinal.to(added.dtype))
        grad = finals.sum(0)
        for r in range(len(sums) - 1, ctx.shard.rank, -1):
            grad = torch.addcmul(sums[r], grad, passed[r])
        return dy, grad.to(ctx.dtype), *[None] * (6 + len(tensors))


def _since(gates: Gates | SteppedGates, reset: Tensor, dtype: torch.dtype, policy: ScanPolicy) -> Tensor:
    """Return the log-decay (B, H) float64 of each row since its last document began."""
    log_decay = gates.worked_out(dtype, policy).log_decay
    before = torch.zeros_like(log_decay[:, 0], dtype=torch.float64)
    return pytorch.log_decay_total(before, log_decay, reset)
