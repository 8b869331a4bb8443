"""Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of a key and a value, then every key is asked for.

The keys are asked one after another in random order, so that a sequence is as short as its pairs allow; a longer one
has values that no key stands before between the pairs and the questions. In forgetting-MQAR half of the keys are bound
twice, and the last value counts: the first has to be forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rnn_longctx.config import counted
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.base import TASKS, Example, Task, TooShort


@TASKS.register
@dataclass(frozen=True)
class MQAR(Task):
    """pairs: of a key and a value; vocab_size: ids, half of them keys, half values. The score is the share of answers
    that are right."""

    name = "mqar"
    forgetting: ClassVar[bool] = False

    pairs: int = 8
    vocab_size: int = 512

    def __post_init__(self) -> None:
        _check(self.pairs, self.vocab_size)

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        ids, answers = (rows[0] for rows in mqar_batch(rng, 1, self.pairs, self.vocab_size, self.forgetting))
        if length < len(ids):
            raise TooShort(f"{self.name} of {counted(self.pairs, 'pair')}", len(ids), length)
        start = len(ids) - 2 * self.pairs
        between = rng.integers(self.vocab_size // 2, self.vocab_size, length - len(ids))
        ids = np.concatenate([ids[:start], between, ids[start:]])
        answers = np.concatenate([answers[:start], np.zeros(len(between), dtype=bool), answers[start:]])
        return Example(ids, answers, about={"pairs": self.pairs})

    def right(self, reply: np.ndarray, example: Example, tokenizer: Tokenizer) -> float:
        return float((reply == example.ids[example.answers]).mean())

    @property
    def label(self) -> str:
        return f"{self.name}{self.pairs}"


@TASKS.register
@dataclass(frozen=True)
class ForgettingMQAR(MQAR):
    """MQAR in which half of the keys are bound twice, and the last value counts."""

    name = "forgetting-mqar"
    forgetting = True


KINDS = {task.name: task for task in (MQAR, ForgettingMQAR)}


def mqar_batch(
    rng: np.random.Generator, rows: int, pairs: int, vocab_size: int, forgetting: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return `rows` sequences with `pairs` keys, ids below vocab_size // 2, and values, the ids from there on.

    Returns:
        ids (rows, T) int64: key value key value ... (pairs + rebound bindings), then key value ... (the answers), with
        rebound = pairs // 2 where forgetting, else 0, and T = 2 * (2 * pairs + rebound);
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
        memory[row, bound[:, j]] = values[:, j]
    queries = rng.permuted(keys, axis=1)
    recalled = np.take_along_axis(memory, queries, axis=1)
    all_keys, all_values = np.concatenate([bound, queries], axis=1), np.concatenate([values, recalled], axis=1)
    ids = np.stack([all_keys, all_values], axis=2).reshape(rows, -1)
    answers = np.zeros(ids.shape, dtype=bool)
    answers[:, 2 * bindings + 1 :: 2] = True
    return ids, answers


def _check(pairs: int, vocab_size: int) -> int:
    """Return the number of keys. Raises InputError: more pairs than that, or none."""
    half = vocab_size // 2
    if not 1 <= pairs <= half:
        raise InputError(f"{counted(pairs, 'pair')}: a vocabulary of {vocab_size} has 1 to {half} keys")
    return half
