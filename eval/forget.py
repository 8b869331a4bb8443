"""T_forget of a family: the smallest training length from which on its models hold their loss over a long context.

Stuffed Mamba (arXiv 2410.07145, v2 on): a model of training length T passes if its loss nowhere within the limit
exceeds twice the highest within T (`rnn_longctx.eval.stats.verdict`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rnn_longctx.config import format_length

Outcomes = Mapping[tuple[int, int], bool]  # (training length, seed): passes


class Forget(NamedTuple):
    """`passes`: the shortest training length above all that fail, None if the longest fails, so that T_forget is above
    `fails`; `fails`: the longest that fails, None if none does, so that T_forget is at most `passes`. In tokens."""

    passes: int | None
    fails: int | None

    def __str__(self) -> str:
        if self.passes is None:
            return f"above {format_length(self.fails or 0)} (the longest trained, which fails)"
        if self.fails is None:
            return f"at most {format_length(self.passes)} (the shortest trained, which passes)"
        return f"{format_length(self.passes)} (fails at {format_length(self.fails)})"


def majority(outcomes: Outcomes, length: int) -> bool | None:
    """Whether more than half of the seeds trained at this length pass; None: none was."""
    votes = [passes for (n, _), passes in outcomes.items() if n == length]
    return 2 * sum(votes) > len(votes) if votes else None


def forget_of(outcomes: Outcomes) -> Forget | None:
    """What models trained at some lengths show. None: no models."""
    votes = {n: majority(outcomes, n) for n, _ in outcomes}
    if not votes:
        return None
    fails = max((n for n, passes in votes.items() if not passes), default=None)
    return Forget(min((n for n in votes if fails is None or n > fails), default=None), fails)


def next_models(lengths: Sequence[int], seeds: Sequence[int], outcomes: Outcomes) -> list[tuple[int, int]]:
    """The (training length, seed) to train next, for one shape; empty when T_forget is found.

    The longest first (where it fails there is nothing to search, and recall is asked of it), then bisection with the
    first seed; where the outcome turns, and at the longest, the other seeds too, and a majority decides. It follows
    from the outcomes alone, so a search that was killed goes on.
    """
    grid = sorted(set(lengths))

    def seeded(*where: int) -> list[tuple[int, int]]:
        return [(n, seed) for n in dict.fromkeys(where) for seed in seeds if (n, seed) not in outcomes]

    if majority(outcomes, grid[-1]) is None:
        return [(grid[-1], seeds[0])]
    known = {(n, seed): passes for (n, seed), passes in outcomes.items() if n in grid and seed in seeds}
    forget = forget_of(known)
    if forget is None or forget.passes is None:
        return seeded(grid[-1])
    low, high = grid.index(forget.fails) if forget.fails in grid else -1, grid.index(forget.passes)
    if high - low > 1:
        return [(grid[(low + high) // 2], seeds[0])]
    return seeded(grid[high], *([grid[low]] if low >= 0 else []), grid[-1])
