"""Inner products of the tokens of a chunk under the decays between them,

    product[t, s] = sum_n left[t, n] exp(seen[t, n] - cum[s, n]) right[s, n]        for s <= t,

as products of matrices. The exponential is split into a factor for each side around the middle of what a channel
forgets in the chunk, so that no factor is beyond exp(LIMIT). Chunks that forget more than twice as much in some channel
are cut in halves: what the second half reads of the first is split at the edge between them, where both factors are at
most 1, and each half is a smaller chunk. Other chunks, of other heads or rows, are left whole.

In such chunks no factor is let below exp(-LIMIT): what is taken for it, 1e-14 in float32, is far below rounding, and
products of smaller ones would be denormal numbers, with which a CPU is tens of times slower. That asks for log-decays
that are at most 0, or grow by a few nats in all: whoever calls sees to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LIMITS = {torch.float32: 32.0, torch.float64: 300.0}  # nats; the square of its exponential is far from any overflow


@dataclass(frozen=True)
class Decayed:
    """The products of m chunks of c tokens, and the factors that a state before the chunk takes part with.

    Attributes:
        products: of each left with each right, (m, c, c). Above the diagonal stand finite numbers that mean nothing.
        lefts: (m, c, N) each, times exp(seen - begin).
        rights: (m, c, N) each, times exp(end - cum).
        begin, end: (m, 1, N or 1), without gradients: where they stand changes nothing.
    """

    products: list[list[Tensor]]
    lefts: list[Tensor]
    rights: list[Tensor]
    begin: Tensor
    end: Tensor


def decayed(
    lefts: Sequence[Tensor], seen: Sequence[Tensor], rights: Sequence[Tensor], cum: Tensor, *, state: bool = True
) -> Decayed:
    """Return the products of lefts (m, c, N) with rights (m, c, N).

    Args:
        seen: of each left, the log-decays (m, c, N or 1) summed until it reads: cum, or cum before the token's own.
        cum: log-decays (m, c, N or 1) summed over a chunk up to and with each token.
        state: whether the lefts read the state before the chunk, too, where the sum is 0.
    """
    limit = LIMITS[cum.dtype]
    with torch.no_grad():
        high, low = cum.amax(1, keepdim=True), cum.amin(1, keepdim=True)
        high = high.clamp(min=0.0) if state else high
        middle = (high + low) / 2
        begin, end = torch.maximum(middle, high - limit), torch.minimum(middle, low + limit)
        hard = ((high - low).amax((1, 2)) > 2 * limit).nonzero()[:, 0]
    safe = state and not len(
        hard
    )  # (without, a half's first token reads before its own decay, which `high` leaves out)

    def factor(nats: Tensor) -> Tensor:
        return nats.exp_() if safe else nats.clamp_(-limit, limit).exp_()

    shrink, grow = _each(lambda t: factor(t - begin), seen), factor(end - cum)
    scaled, grown = [left * f for left, f in zip(lefts, shrink)], [right * grow for right in rights]
    products = [[left @ right.mT for right in grown] for left in scaled]
    if len(hard):

        def take(t: Tensor) -> Tensor:
            return t if len(hard) == len(t) else t[hard]

        exact = _halved([take(t) for t in lefts], _each(take, seen), [take(t) for t in rights], take(cum))
        products = [[p.index_copy_(0, hard, e) for p, e in zip(*both)] for both in zip(products, exact)]
    return Decayed(products, scaled, grown, begin, end)


def _halved(
    lefts: Sequence[Tensor], seen: Sequence[Tensor], rights: Sequence[Tensor], cum: Tensor
) -> list[list[Tensor]]:
    """Return the same products from those of the halves of each chunk, of at least two tokens."""
    c, limit = cum.shape[1], LIMITS[cum.dtype]
    if c % 2:  # one more token, behind all others

        def longer(t: Tensor) -> Tensor:
            return torch.cat([t, t[:, -1:]], 1)

        products = _halved([longer(t) for t in lefts], _each(longer, seen), [longer(t) for t in rights], longer(cum))
        return [[p[:, :c, :c] for p in of_left] for of_left in products]

    def halves(t: Tensor) -> Tensor:
        return t.unflatten(1, (2, c // 2)).flatten(0, 1)

    def second(t: Tensor) -> Tensor:
        return t[:, c // 2 :]

    near = decayed(
        [halves(t) for t in lefts], _each(halves, seen), [halves(t) for t in rights], halves(cum), state=False
    )
    first, edge = slice(0, c // 2), cum[:, c // 2 - 1 : c // 2]
    shrink = _each(lambda t: (second(t) - edge).clamp_(-limit, limit).exp_(), seen)
    grow = (edge - cum[:, first]).clamp_(-limit, limit).exp_()
    before = [(right[:, first] * grow).mT for right in rights]
    return [
        [_joined(p.unflatten(0, (-1, 2)), (second(left) * f) @ earlier) for p, earlier in zip(of_left, before)]
        for left, f, of_left in zip(lefts, shrink, near.products)
    ]


def _joined(near: Tensor, far: Tensor) -> Tensor:
    """Return (m, c, c) of the products within both halves (m, 2, c / 2, c / 2), and of the second with the first."""
    first, second = near.unbind(1)
    return torch.cat([F.pad(first, (0, far.shape[2])), torch.cat([far, second], 2)], 1)


def _each(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what a function makes of each tensor, made once where all are one."""
    first = function(tensors[0])
    return [first, *(first if t is tensors[0] else function(t) for t in tensors[1:])]
