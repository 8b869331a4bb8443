"""Planted correlations: a marker and the value behind it, and long after it the marker again, with a value that is most
often the same one.

    ... | 7 . . 4 . . . . 9 . . . | 7        the 7 behind the second | is asked for

A gap, the tokens from one marker to the other, is drawn log-uniformly: as many examples have one of 10 to 20 tokens as
of 1,000 to 2,000. What stands elsewhere is a blank, or (a share `noise` of it) a value drawn at random. The link holds
with probability `strength`, and otherwise the second value is another one: who has found the link is right in that
share of the examples, and nobody can do better. Depths are of the gap, on its logarithmic scale: 0 is the longest, 1
the shortest. The task is this project's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.spec import quiet
from rnn_longctx.tasks.base import TASKS, Example, TooShort, depth_of, spread_depth
from rnn_longctx.tasks.symbols import SymbolTask, at_least

BLANK, MARKER, FIRST = 1, 2, 3  # ids: a blank, the marker, and the first of the values
SHORTEST = 2  # tokens from a marker to the next: the value lies between them


@TASKS.register
@dataclass(frozen=True)
class Planted(SymbolTask):
    """gap: the longest, in tokens; unless given, the longest that there is room for. noise: share of the tokens between
    that are values, and no blanks; strength: probability that the link holds; vocab_size: ids, of which 0 is none, 1
    the blank and 2 the marker."""

    name = "planted"
    examples = ("planted", "planted:noise=0,strength=0.5", "planted:gap=20,noise=1")

    gap: int | None = quiet(None)
    noise: float = 0.5
    strength: float = 1.0
    vocab_size: int = 19

    def __post_init__(self) -> None:
        at_least(self, vocab_size=(self.vocab_size, FIRST + 2), gap=(self.longest(SHORTEST + 2), SHORTEST))
        for name in ("noise", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{self.name}: {name} is a share from 0 to 1, got {getattr(self, name)}")

    def longest(self, length: int) -> int:
        """Return the longest gap in an example of a length."""
        return length - 2 if self.gap is None else self.gap

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        longest = self.longest(length)
        if length < max(longest, SHORTEST) + 2:
            raise TooShort(
                f"a planted link of up to {max(longest, SHORTEST)} tokens", max(longest, SHORTEST) + 2, length
            )
        # floor of a log-uniform number between the shortest and one above the longest
        scale = math.log((longest + 1) / SHORTEST)
        gap = min(longest, int(SHORTEST * math.exp(scale * (1 - spread_depth(i, n, rng)))))
        values = rng.integers(FIRST, self.vocab_size, length)
        ids = np.where(rng.random(length) < self.noise, values, BLANK)
        first, holds = length - 2 - gap, rng.random() < self.strength
        ids[[first, -2]], ids[first + 1] = MARKER, values[first + 1]
        others = self.vocab_size - FIRST
        shift = 0 if holds else rng.integers(1, others)
        ids[-1] = FIRST + (values[first + 1] - FIRST + shift) % others
        about = {"gap": gap, "holds": float(holds)}
        return Example(ids, np.arange(length) == length - 1, depth_of(i, n), about, sources=((first + 1,),))

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - FIRST)
