"""One stream spread over the ranks of a process group, each with a stretch of it, in the order of their ranks.

The recurrence is linear in the state: with F what a stretch alone adds to the state at its end and L its log-decay,
the state that enters the next one is F + exp(L) S. So a layer reads (sequence-parallel scans: arXiv 2405.21060,
section 8.2)

1. F and L of every stretch, side by side (`Backend.stretch_sum`), and one all-gather of both;
2. the fold of those before a rank to the state S that enters its stretch, on every rank for itself;
3. the ordinary scan, from S.

The other way is to scan from zero and to add exp(cum_t) S C_t to the outputs afterwards. That reads and writes all
outputs once more, before a norm that the scan could have applied as it wrote them, and its gradient needs two more
products. Step 1 takes one product, 2 P N operations a token and head beside the scan's 4 P N and those inside chunks,
writes no outputs, and leaves a head as soon as what is unread has decayed to nothing.

Backwards the same holds: with g what the outputs of a stretch add to the gradient of the state before it, and dS that
of the state after it, the gradient of the state before it is g + exp(L) dS. One product and one all-gather of g, the
fold of the ranks behind, and the scan's own gradients from there: they hold what L owes to dt, A and dt_bias, because
the scan of each rank starts from its S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Call, choose
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import gates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.rows import row_counts
from rnn_longctx.recurrence.ssd import pytorch
from rnn_longctx.recurrence.ssd.scan import asked_of, scan, wide_of


def refusal(policy: ScanPolicy, documents: bool) -> str | None:
    """Why a policy cannot be followed over several ranks, in words, or None. documents: whether rows hold several."""
    if policy.caps:
        return "a norm cap depends on the state itself, so a stretch cannot be read before those before it"
    if policy.window is not None:
        return "a window's delay line is not handed from rank to rank"
    if policy.start is not None and (policy.reset is not None or documents):
        return "a stored initial state that a stretch begins again from is not part of what it adds"
    return None


@dataclass(frozen=True)
class Stretch:
    """The part that a rank holds of what one call reads: R ranks, B rows.

    Attributes:
        lengths: tokens of each rank.
        since: (R, B) int64 on the CPU, tokens from the last document that begins in a stretch on; -1 where none does.
        leads: a bool on the device, whether this rank is the first.
    """

    group: dist.ProcessGroup | None
    rank: int
    lengths: list[int]
    since: Tensor
    leads: Tensor

    @classmethod
    def of(cls, ids: Tensor, reset: Tensor | None, group: dist.ProcessGroup | None, least: int) -> Stretch:
        """ids, reset (B, T) of this rank. Collective. Raises InputError, on all ranks, if one has less than `least`
        tokens."""
        batch, length = ids.shape
        ahead = torch.arange(length, 0, -1, device=ids.device)  # tokens up to the end
        if reset is None or not length:
            since = torch.full((batch,), -1, device=ids.device)
        else:
            since = torch.where(reset, ahead, length + 1).amin(1)
            since = torch.where(since > length, -1, since)
        told = _gathered(group, torch.cat([since.new_tensor([length]), since]))[0].cpu()
        lengths, rank = told[:, 0].tolist(), dist.get_rank(group)
        if min(lengths) < least:
            raise InputError(f"each rank must hold {least} tokens or more, the stretches of this call have {lengths}")
        return cls(group, rank, lengths, told[:, 1:], torch.tensor(rank == 0, device=ids.device))

    @property
    def total(self) -> int:
        """Tokens that all ranks read."""
        return sum(self.lengths)

    def positions(self, first: Tensor) -> list[Tensor]:
        """R + 1 of (B,): where rows that stood at `first` stand before each stretch and after the last."""
        found = [first]
        for length, since in zip(self.lengths, self.since):
            found.append(torch.where(since >= 0, since, found[-1] + length))
        return found

    def edges(self, inputs: Tensor, taps: int, before: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a causal convolution of `taps` more inputs than outputs has before this stretch, and after the last one,
        both (B, channels, taps). inputs (B, T, channels); before: what it had before the first. Collective."""
        edge = inputs[:, inputs.shape[1] - taps :]
        if reset is not None:
            document = reset.long().cumsum(1)
            edge = edge * (document[:, document.shape[1] - taps :] == document[:, -1:])[..., None]
        edge = edge.transpose(1, 2)
        before = torch.zeros_like(edge) if before is None else before.to(edge.dtype)
        all_edges = _Everyone.apply(edge, self.group)
        # alike on every rank, so that the gradients' collectives are, too
        return torch.where(self.leads, before, all_edges[self.rank - 1]).contiguous(), all_edges[-1]

    def scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, policy: ScanPolicy,
             carry: ScanCarry | None, reset: Tensor | None, backend: str | None, dt_bias: Tensor | None,
             dt_limit: tuple[float, float], state_dtype: torch.dtype | None,
             **others: Any) -> tuple[Tensor, ScanCarry]:  # fmt: skip
        """`scan` of all stretches: its arguments and outputs are this rank's; carry and the carry that
        is returned, those before the first and after the last stretch, are the same on every rank. Collective, and so
        are its gradients. A (H); no padding."""
        asked = asked_of(x.dtype, state_dtype)
        wide = wide_of(asked)
        if carry is None:
            sizes = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
            carry = ScanCarry.start(*sizes, dtype=wide, device=x.device)
            carry.state = policy.start_state(carry.state)
        carry = carry.kept_in(wide)
        positions, drop = self.positions(carry.position), None
        if reset is not None or policy.reset is not None:
            drop = row_counts(positions[self.rank], x.shape[1], reset=reset, every=policy.reset)[1]
        chosen = choose(policy, backend, Call(x.device, asked, False, x.shape[3], B.shape[3]))
        gating: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": True, "dt_limit": dt_limit, "policy": policy}
        summing = {**gating, "function": chosen.stretch_sum or pytorch.stretch_sum, "dtype": wide, "drop": drop}

        with torch.no_grad():
            added, passed = _sum(x, dt, A, B, **summing)
            spent = passed if reset is None else _since(dt, A, reset, wide, gating)
            if drop is not None:
                passed = passed.masked_fill(drop.any(1).to(x.device)[:, None], float("-inf"))
            states, passed, totals = _gathered(self.group, added, passed, spent)
            passed = passed.exp().to(wide)[..., None, None]  # (R, B, H, 1, 1)
            state, log_decay = [carry.state], [carry.log_decay]  # before each stretch and after the last
            for r, begun in enumerate(self.since >= 0):
                state.append(torch.addcmul(states[r], state[-1], passed[r]))
                last = log_decay[-1]
                if bool(begun.any()):
                    last = last.masked_fill(begun.to(x.device)[:, None], 0.0)
                log_decay.append(last + totals[r])
        here = ScanCarry(torch.where(self.leads, carry.state, state[self.rank]), positions[self.rank],
                         log_decay[self.rank])  # fmt: skip
        y, own = scan(x, dt, A, B, C, policy=policy, carry=here, reset=reset, backend=backend, dt_bias=dt_bias,
                      dt_limit=dt_limit, state_dtype=state_dtype, **others)  # fmt: skip
        final = state[-1]
        if y.requires_grad:
            y, final = _Leave.apply(y, own.state, final, passed, dt, A, C, self, summing)
        return y, ScanCarry(final, positions[-1], log_decay[-1]).kept_in(state_dtype or wide)


class _Everyone(torch.autograd.Function):
    """(R, *shape) from a tensor of each rank; the gradient of each is the sum of what the ranks send back to it."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gathered(group, mine)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


class _Leave(torch.autograd.Function):
    """y as it is, and the state after the last stretch: the state `own` after this one gets its gradient from the
    outputs of the ranks behind, and from what every rank does with the last state."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, own: Tensor, final: Tensor, passed: Tensor, dt: Tensor, A: Tensor, C: Tensor,
                stretch: Stretch, summing: dict[str, Any]) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(passed, dt, A, C)
        ctx.stretch, ctx.summing, ctx.kept = stretch, summing, own.dtype
        return y.view_as(y), final.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple:
        passed, dt, A, C = ctx.saved_tensors
        mine, _ = _sum(dy, dt, A, C, **ctx.summing, back=True)
        sums, finals = _gathered(ctx.stretch.group, mine, dfinal.to(mine.dtype))
        grad = finals.sum(0)
        for r in range(len(sums) - 1, ctx.stretch.rank, -1):
            grad = torch.addcmul(sums[r], grad, passed[r])
        return dy, grad.to(ctx.kept), *[None] * 7


@torch.no_grad()
def _sum(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *, function: Any, back: bool = False,
         **settings: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        return function(x, dt, A, B, back=back, **settings)


def _since(dt: Tensor, A: Tensor, reset: Tensor, dtype: torch.dtype, gating: dict[str, Any]) -> Tensor:
    """Log-decay (B, H) float64 of each row since its last document began."""
    bias = gating["dt_bias"]
    log_decay, _ = gates(dt.to(dtype), A.to(dtype), **{**gating, "dt_bias": None if bias is None else bias.to(dtype)})
    return pytorch.spent(torch.zeros_like(log_decay[:, 0], dtype=torch.float64), log_decay, reset)


def _gathered(group: dist.ProcessGroup | None, *mine: Tensor) -> list[Tensor]:
    """Of each tensor (R, *shape), that of every rank, in one all-gather of their bytes."""
    sent = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in mine])
    got = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(got, sent, group)
    parts = torch.stack(got).split([t.nbytes for t in mine], 1)
    return [part.contiguous().view(t.dtype).view(-1, *t.shape) for part, t in zip(parts, mine)]
