"""Are the accused heads guilty? Cap them alone, at their largest norms in training, and measure the loss again.

    recovered(heads) = (loss without - loss with those heads capped) / (loss without - loss of recomputing)

The loss is the mean over positions (L/2, L] of some slices of a text; recomputing from the last T tokens (T the
training length) is what a model that only forgets would reach. As many heads drawn from the rest say how much of it any
heads would recover; where fewer are left, all of them do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rnn_longctx.config import format_length
from rnn_longctx.measure.stream import tail_loss
from rnn_longctx.models.restart import Restart
from rnn_longctx.recurrence.policy import Cap, ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.models.lm import Mamba2LM

Head = tuple[int, int]  # layer, head
GOAL = 0.8  # of the lost loss
EVERY = 64  # tokens between two caps


@contextmanager
def capped(model: Mamba2LM, heads: Iterable[Head], norms: Sequence[Sequence[float]]) -> Iterator[None]:
    """Inside the block the states of these heads are capped at their norms[layer][head], every 64 tokens; no others."""
    wanted, before = set(heads), [m.policy for m in model.mixers]
    try:
        for layer, mixer in enumerate(model.mixers):
            limits = [norms[layer][h] if (layer, h) in wanted else float("inf") for h in range(mixer.heads)]
            if min(limits) < float("inf"):
                mixer.policy = mixer.policy.then(ScanPolicy(caps=(Cap(tuple(limits), EVERY),)))
        yield
    finally:
        for mixer, policy in zip(model.mixers, before):
            mixer.policy = policy


@dataclass(frozen=True)
class Ablation:
    """What capping showed.

    Attributes:
        length: tokens read; losses are over the second half.
        without, recompute: loss without a remedy and of recomputing from the last T tokens, nats per token.
        fewest: the fewest heads, worst first, whose capping recovers GOAL of the difference; all that were accused
            where they do not.
        recovered: by those; all_accused: by all that were accused.
        others: by as many heads drawn from the rest, a value a draw; by all of the rest, one value, where they are no
            more than `fewest`; empty where none are left, or nothing is lost.
        drawn: heads a draw.
    Where `without` is not above `recompute`, nothing is lost, and where one of them is no number no share is either: no
    head is capped, and `fewest` is empty.
    """

    length: int
    without: float
    recompute: float
    fewest: list[Head]
    recovered: float
    all_accused: float
    others: list[float]
    drawn: int = 0

    def __str__(self) -> str:
        losses = f"{self.without:.3f} against {self.recompute:.3f} nats per token"
        if not math.isfinite(self.without - self.recompute):
            which = "of recomputing " if math.isfinite(self.without) else ""
            return (
                f"the loss {which}is not a number at {format_length(self.length)}: what capping recovers cannot be said"
            )
        if self.without <= self.recompute:
            return f"nothing is lost at {format_length(self.length)} that capping could recover ({losses})"
        if not self.fewest:
            return "no head is accused: nothing to cap"
        heads = "heads" if len(self.fewest) > 1 else "head"
        others = "no others are left to draw from"
        if self.others and self.drawn < len(self.fewest):
            others = f"the {self.drawn} that are left recover {self.others[0]:.0%}"
        elif self.others:
            others = f"as many drawn from the rest recover {max(self.others):.0%} at most of {len(self.others)} draw"
            others += "s" * (len(self.others) > 1)
        return f"capping {len(self.fewest)} {heads} recovers {self.recovered:.0%} of the lost loss ({losses}); {others}"


def ablate(model: Mamba2LM, ids: Tensor, ranked: Sequence[Head], norms: Sequence[Sequence[float]], train_length: int,
           draws: int = 5, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Ablation:  # fmt: skip
    """Cap the accused heads and measure.

    Args:
        ids: (B, L + 1), slices of a text.
        ranked: the accused, worst first (`rnn_longctx.probes.onset.accused`).
        norms: [layer][head], what to cap at.
        draws: how many times other heads are drawn, as many as `fewest`.
        say: called with a line a measurement.
    """
    without = float(tail_loss(model, ids).mean())
    kept, model.restart = model.restart, Restart(every=max(1, train_length // 2), overlap=max(1, train_length // 2))
    try:
        again = float(tail_loss(model, ids).mean())
    finally:
        model.restart = kept
    length = ids.shape[1] - 1
    say(f"without a remedy {without:.4f}, recomputing {again:.4f}")
    if not ranked or not math.isfinite(without - again) or without <= again:
        return Ablation(length, without, again, [], 0.0, 0.0, [])
    known: dict[int, float] = {}

    def recovered(heads: Sequence[Head], which: str) -> float:
        with capped(model, heads, norms):
            loss = float(tail_loss(model, ids).mean())
        share = (without - loss) / (without - again)
        say(f"{which}, capped: {loss:.4f}, recovers {share:.0%}")
        return share

    def worst(count: int) -> float:
        if count not in known:
            which = f"all {count} accused" if count == len(ranked) else f"the worst {count} of the accused"
            known[count] = recovered(ranked[:count], which)
        return known[count]

    everything = worst(len(ranked))
    low, high = 0, len(ranked)  # by bisection: more heads recover more
    while everything >= GOAL and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if worst(middle) >= GOAL else (middle, high)
    chosen = list(ranked[:high])
    rest = [(i, h) for i, m in enumerate(model.mixers) for h in range(m.heads) if (i, h) not in set(chosen)]
    rng = np.random.default_rng(seed)
    size = min(len(chosen), len(rest))
    others = []
    for _ in range(min(draws, math.comb(len(rest), size)) if rest else 0):  # no more than there are choices
        which = f"{size} drawn from the rest" if size < len(rest) else f"the {size} that are left"
        others.append(recovered([rest[i] for i in rng.choice(len(rest), size, replace=False)], which))
    return Ablation(length, without, again, chosen, worst(high), everything, others, size)
