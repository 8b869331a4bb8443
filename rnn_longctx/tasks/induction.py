"""Induction heads (Mamba, arXiv 2312.00752, after H3, arXiv 2212.14052): a marker stands once among random symbols, and
again at the end. What followed it the first time follows it again.

    4 9 3 | 7 2 7 5 9 4 ... 8 | 7        the second | asks for the 7 behind the first

Models are trained at 256 tokens there, with 16 ids, and asked for up to 2^20. The first marker may stand anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.tasks.base import TASKS, Example, TooShort, depth_of, spread_depth
from rnn_longctx.tasks.symbols import SymbolTask, at_least

MARKER, FIRST = 1, 2  # ids: the marker, and the first of the symbols


@TASKS.register
@dataclass(frozen=True)
class Induction(SymbolTask):
    """vocab_size: ids, of which 0 is none and 1 the marker."""

    name = "induction"

    vocab_size: int = 16

    def __post_init__(self) -> None:
        at_least(self, vocab_size=(self.vocab_size, FIRST + 2))

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        if length < 4:
            raise TooShort("a marker and its symbol, twice", 4, length)
        ids = rng.integers(FIRST, self.vocab_size, length)
        place = int(spread_depth(i, n, rng) * (length - 3))
        ids[[place, -2]] = MARKER
        ids[-1] = ids[place + 1]
        about = {"gap": length - 2 - place}
        return Example(ids, np.arange(length) == length - 1, depth_of(i, n), about, sources=((place + 1,),))

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - FIRST)
