"""Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of a key and a value, then every key is asked for.

The keys are asked one after another in random order, so that a sequence is as short as its pairs allow; a longer one
has values that no key stands before between the pairs and the questions. With `asked=spread` questions stand anywhere
behind the pairs, at distances of the power law that the paper draws them from, most of them near, and values between
them. Otherwise than there, the right value stands behind a key that is asked for (a model is asked for the next token),
keys may be 0, and no key stands where nothing is asked, which would bind another value to it.

In forgetting-MQAR half of the keys are bound twice, and the last value counts: the first has to be forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from rnn_longctx.config import counted
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.spec import quiet
from rnn_longctx.tasks.base import TASKS, Example, Task, TooShort, followed

POWER = 0.01  # of the law of distances: a question g pairs behind the bindings has a weight of g ** (POWER - 1)


@TASKS.register
@dataclass(frozen=True)
class MQAR(Task):
    """pairs: of a key and a value; vocab_size: ids, half of them keys, half values; asked: where keys are asked for, at
    the end or spread. The score is the share of answers that are right."""

    name = "mqar"
    examples = ("mqar", "mqar:asked=spread")
    forgetting: ClassVar[bool] = False

    pairs: int = 8
    vocab_size: int = 512
    asked: Literal["end", "spread"] = quiet("end")

    def __post_init__(self) -> None:
        _check(self.pairs, self.vocab_size)

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        ids, answers = (rows[0] for rows in mqar_batch(rng, 1, self.pairs, self.vocab_size, self.forgetting))
        if length < len(ids):
            raise TooShort(f"{self.name} of {counted(self.pairs, 'pair')}", len(ids), length)
        start = len(ids) - 2 * self.pairs
        if self.asked == "end":
            places = np.arange(length - 2 * self.pairs, length)
        else:
            places = start + _spread(rng, self.pairs, (length - start) // 2)
        every = np.concatenate([np.arange(start), places])
        longer, where = np.full(length, -1), np.zeros(length, dtype=bool)
        longer[every], where[every] = ids, answers
        longer[longer < 0] = rng.integers(self.vocab_size // 2, self.vocab_size, length - len(ids))
        return Example(longer, where, about={"pairs": self.pairs}, sources=followed(longer, where))

    def right(self, reply: np.ndarray, example: Example, tokenizer: Tokenizer) -> float:
        return float((reply == example.ids[example.answers]).mean())

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    @property
    def label(self) -> str:
        return f"{self.name}{self.pairs}" + ("" if self.asked == "end" else f"-{self.asked}")

    @property
    def text(self) -> str:
        return self.name if self.vocab_size == MQAR.vocab_size else f"{self.name} of {self.vocab_size} ids"


@TASKS.register
@dataclass(frozen=True)
class ForgettingMQAR(MQAR):
    """MQAR in which half of the keys are bound twice, and the last value counts."""

    name = "forgetting-mqar"
    examples = ("forgetting-mqar", "forgetting-mqar:asked=spread")
    forgetting = True


KINDS = {task.name: task for task in (MQAR, ForgettingMQAR)}


def mqar_batch(
    rng: np.random.Generator, rows: int, pairs: int, vocab_size: int, forgetting: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return `rows` sequences with `pairs` keys, ids below vocab_size // 2, and values, the ids from there on.

    Returns:
        ids (rows, T) int64: key value key value ... (pairs + rebound bindings), then key value ... (the answers), with
        rebound = pairs // 2 where forgetting, else 0, and T = 2 * (2 * pairs + rebound); a key that is bound again has
        another value then;
        answers (rows, T) bool, True at the values that have to be recalled.
    Raises:
        InputError: more pairs than keys, or none.
    """
    half = _check(pairs, vocab_size)
    bindings = pairs + (pairs // 2 if forgetting else 0)
    keys = rng.permuted(np.broadcast_to(np.arange(half), (rows, half)), axis=1)[:, :pairs]
    bound = rng.permuted(np.concatenate([keys, keys[:, : bindings - pairs]], axis=1), axis=1)
    values = rng.integers(half, vocab_size, (rows, bindings))
    memory, row = np.zeros((rows, half), dtype=np.int64), np.arange(rows)
    for j in range(bindings):
        same = memory[row, bound[:, j]] == values[:, j]  # what is bound again is another value
        if same.any():
            others = rng.integers(1, vocab_size - half, same.sum())
            values[same, j] = half + (values[same, j] - half + others) % (vocab_size - half)
        memory[row, bound[:, j]] = values[:, j]
    queries = rng.permuted(keys, axis=1)
    recalled = np.take_along_axis(memory, queries, axis=1)
    all_keys, all_values = np.concatenate([bound, queries], axis=1), np.concatenate([values, recalled], axis=1)
    ids = np.stack([all_keys, all_values], axis=2).reshape(rows, -1)
    answers = np.zeros(ids.shape, dtype=bool)
    answers[:, 2 * bindings + 1 :: 2] = True
    return ids, answers


def _spread(rng: np.random.Generator, pairs: int, room: int) -> np.ndarray:
    """Return the places of `pairs` keys and their values, (2 * pairs,), key by key: no two overlap, each pair begins at
    an even place below 2 * room, and near ones are likelier (see `POWER`)."""
    weights = np.arange(1, room + 1) ** (POWER - 1)
    begin = 2 * rng.choice(room, pairs, replace=False, p=weights / weights.sum())
    return np.stack([begin, begin + 1], axis=1).ravel()


def _check(pairs: int, vocab_size: int) -> int:
    """Return the number of keys. Raises InputError: more pairs than that, or none."""
    half = vocab_size // 2
    if not 1 <= pairs <= half:
        raise InputError(f"{counted(pairs, 'pair')}: a vocabulary of {vocab_size} has 1 to {half} keys")
    return half
