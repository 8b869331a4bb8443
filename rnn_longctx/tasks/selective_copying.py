"""Selective copying (Mamba, arXiv 2312.00752, after arXiv 2010.13326): data stand anywhere among tokens of noise, and
are said again in their order behind a sign at the end.

    . . 5 . . . 9 . 5 . . | 5 9 5        16 data in 4,096 tokens there, of 16 ids

There a model says all data from tokens of noise alone; here, as a language model does, each behind the right ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.tasks.base import TASKS, Example, TooShort
from rnn_longctx.tasks.symbols import SymbolTask, at_least

NOISE, SIGN, FIRST = 1, 2, 3  # ids: noise, the sign to say the data, and the first of the data


@TASKS.register
@dataclass(frozen=True)
class SelectiveCopying(SymbolTask):
    """copied: how many data; vocab_size: ids, of which 0 is none, 1 noise and 2 the sign. The score is the share of the
    data that are right."""

    name = "selective-copying"

    copied: int = 16
    vocab_size: int = 16

    def __post_init__(self) -> None:
        at_least(self, copied=(self.copied, 1), vocab_size=(self.vocab_size, FIRST + 2))

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        if length < 2 * self.copied + 1:
            raise TooShort(f"selective copying of {self.copied} data", 2 * self.copied + 1, length)
        data, noise = rng.integers(FIRST, self.vocab_size, self.copied), length - self.copied - 1
        ids = np.full(length, NOISE)
        places = np.sort(rng.choice(noise, self.copied, replace=False))
        ids[places] = data
        ids[noise], ids[noise + 1 :] = SIGN, data
        sources = tuple((place,) for place in places.tolist())
        return Example(ids, np.arange(length) > noise, about={"copied": self.copied}, sources=sources)

    def right(self, reply: np.ndarray, example: Example, tokenizer: Tokenizer) -> float:
        return float((reply == example.ids[example.answers]).mean())

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - FIRST)
