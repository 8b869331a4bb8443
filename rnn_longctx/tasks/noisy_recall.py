"""Noisy recall (MAD, arXiv 2403.17844): associative recall with tokens of noise between the pairs, which are neither
keys nor values.

    k1 v1 ~ ~ k2 v2 ~ ... ~ k2 v2 ~ k1 v1        the second v2 and v1 are asked for

First all pairs, then every key is asked for, as in `mqar`; noise stands anywhere but between a key and its value, and
takes what the pairs leave of the length: a share of 1 - 4 * pairs / length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnn_longctx.config import counted
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.base import TASKS, Example, TooShort, followed
from rnn_longctx.tasks.mqar import mqar_batch
from rnn_longctx.tasks.symbols import SymbolTask, at_least


@TASKS.register
@dataclass(frozen=True)
class NoisyRecall(SymbolTask):
    """pairs: of a key and a value; noises: ids of noise, the last of vocab_size; the ids before them are keys, then as
    many values, but for 0, which is none. The score is the share of answers that are right."""

    name = "noisy-recall"

    pairs: int = 8
    noises: int = 16
    vocab_size: int = 256

    def __post_init__(self) -> None:
        at_least(self, pairs=(self.pairs, 1), noises=(self.noises, 1))
        if self.pairs > self.keys:
            most = f"a vocabulary of {self.vocab_size} with {self.noises} ids of noise has {max(0, self.keys)} keys"
            raise InputError(f"{self.name}: {counted(self.pairs, 'pair')}: {most}")

    @property
    def keys(self) -> int:
        """The number of different keys, and of values."""
        return (self.vocab_size - self.noises - 1) // 2

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        if length < 4 * self.pairs:
            raise TooShort(f"{self.name} of {counted(self.pairs, 'pair')}", 4 * self.pairs, length)
        (ids,), (answers,) = mqar_batch(rng, 1, self.pairs, 2 * self.keys)
        pairs, noise = 2 * self.pairs, length - 4 * self.pairs
        before = np.sort(rng.choice(pairs + noise, pairs, replace=False)) - np.arange(pairs)  # noise before each pair
        places = np.arange(2 * pairs) + np.repeat(before, 2)
        longer = rng.integers(self.vocab_size - self.noises, self.vocab_size, length)
        where = np.zeros(length, dtype=bool)
        longer[places], where[places] = 1 + ids, answers
        about = {"pairs": self.pairs, "noise": noise / length}
        return Example(longer, where, about=about, sources=followed(longer, where))

    def right(self, reply: np.ndarray, example: Example, tokenizer: Tokenizer) -> float:
        return float((reply == example.ids[example.answers]).mean())

    @property
    def chance(self) -> float:
        return 1 / self.keys
