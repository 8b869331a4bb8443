"""T_recall: the longest context whose recall is shown to reach a target (Stuffed Mamba, arXiv 2410.07145, takes 95%).

"Shown" means that the lower end of the 95% binomial interval (Wilson's) of the answers at that length is at least the
target: a length that fails is not shown to be below it. What is reported follows from the answers alone, so a table
gives it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rnn_longctx.config import format_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.stats import wilson

Answers = tuple[int, int]  # right, asked
LOOK = 20  # prompts asked first: most lengths that fail have failed by then


class Recall(NamedTuple):
    """`passes`: the longest length shown, None if the shortest measured fails; `fails`: the shortest that is not shown,
    None if none was met, so that T_recall is at least `passes`, the longest measured. Lengths in tokens; `right` of
    `asked` answers at `passes` (at `fails` where nothing passes)."""

    passes: int | None
    fails: int | None
    right: int
    asked: int

    def __str__(self) -> str:
        said = f"{self.right}/{self.asked}"
        if self.passes is None:
            return f"below {format_length(self.fails or 0)} (the shortest measured; {said})"
        if self.fails is None:
            return f"at least {format_length(self.passes)} (the longest measured; {said})"
        return f"{format_length(self.passes)} ({said}; fails at {format_length(self.fails)})"


def shown(right: int, asked: int, target: float) -> bool:
    """Whether so many right answers show a recall of `target`."""
    return wilson(right, asked).low >= target


def samples_for(width: float, target: float) -> int:
    """Prompts a length: the fewest whole rounds of ten depths whose interval at an accuracy of `target` is at most
    `width` wide, and enough to show `target` if every answer is right. Raises InputError: not between 0 and 1."""
    if not (0 < width < 1 and 0 < target < 1):
        raise InputError(f"width and recall lie between 0 and 1, got {width} and {target}")
    n = 10
    while True:
        at = wilson(round(target * n), n)
        if shown(n, n, target) and at.high - at.low <= width:
            return n
        n += 10


def recall_of(measured: Mapping[int, Answers], target: float) -> Recall | None:
    """What answers at some lengths show: the longest length that passes below the shortest that fails, or None.

    A longer length that passes again is no part of it: a model that must be lucky with its length does not recall.
    Nothing is said of a length left at a first look for another target's sake, which leaves this one open. What most
    prompts were asked of is taken for a whole sample: where that is the first look of every length, all of them."""
    if not measured:
        return None
    most = max(asked for _, asked in measured.values())
    measured = {n: answers for n, answers in measured.items() if not _open(*answers, target, most)}
    fails = min((n for n, answers in measured.items() if not shown(*answers, target)), default=None)
    passes = max((n for n in measured if fails is None or n < fails), default=None)
    right, asked = measured[passes if passes is not None else fails]  # type: ignore[index]
    return Recall(passes, fails, right, asked)


def _open(right: int, asked: int, target: float, n: int) -> bool:
    """Whether `target` may lie above or below what was seen, and more prompts, `n`, might have shown it."""
    if asked >= n or shown(right, asked, target):
        return False
    return shown(n - (asked - right), n, target) and wilson(right, asked).high >= target


def search(
    ask: Callable[[int, int], Answers],
    fits: Callable[[int], bool],
    start: int,
    limit: int,
    target: float,
    n: int,
    resolution: float = 0.125,
) -> dict[int, Answers]:
    """Find T_recall: double (or halve) from `start`, then bisect until the gap is at most `resolution` of what passes.

    Args:
        ask: (length, prompts) to the answers; asked again for more prompts, the first ones count too.
        fits: whether a prompt fits into a length; what is too short is not asked.
        limit: the longest length asked; nothing is said about longer ones.
        n: prompts a length; a length that can no longer show the target after LOOK of them is left at that.
    Returns:
        the answers at every length asked, for `recall_of`.
    """
    measured: dict[int, Answers] = {}
    allowed = max(wrong for wrong in range(n + 1) if shown(n - wrong, n, target))

    def passes(length: int) -> bool:
        right, asked = ask(length, min(LOOK, n))
        if asked - right <= allowed and asked < n:
            right, asked = ask(length, n)
        measured[length] = right, asked
        return shown(right, asked, target)

    length = min(start, limit)
    while not fits(length) and length < limit:
        length = min(2 * length, limit)
    if not fits(length):
        raise InputError(f"no prompt fits into {format_length(limit)} tokens")
    low, high = 0, math.inf
    if passes(length):
        low = length
        while low < limit and high == math.inf:
            length = min(2 * low, limit)
            low, high = (length, high) if passes(length) else (low, length)
    else:
        high = length
        while low == 0 and fits(int(high) // 2):
            length = int(high) // 2
            low, high = (length, high) if passes(length) else (low, length)
    while low and high < math.inf and high - low > max(1.0, resolution * low):
        length = (low + int(high)) // 2
        low, high = (length, high) if passes(length) else (low, length)
    return measured
