"""ListOps (arXiv 1804.06028) as Long Range Arena makes it (arXiv 2011.04006): the value of nested lists of digits.

    [MAX 4 3 [MIN 2 3 ] 1 0 ] = 4        the digit behind = is asked for

A token is a word, brackets that only group are left out, as there. A node is a list with a probability of 1/4 and a
digit otherwise, always a digit at depth 10; a list has 2 to 10 members. MED is the median, rounded down; SM is the sum
modulo 10. Expressions are kept that take more than a quarter of the room, as those of LRA have 500 to 2,000 tokens;
blanks stand before them. To read LRA's own files, see `labelled`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.spec import quiet
from rnn_longctx.tasks.base import TASKS, Example, TooShort
from rnn_longctx.tasks.symbols import SymbolTask

WORDS = ("", ".", "=", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")  # the ids; a blank is written as a dot
BLANK, EQUALS, ZERO, END = (WORDS.index(word) for word in (".", "=", "0", "]"))
OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % 10,
}
LIST, DEPTH, MEMBERS = 0.25, 10, (2, 10)  # probability of a list, its greatest depth, and how many members it has
MOST = 8000  # tokens: trees of that depth hardly ever have more


@TASKS.register
@dataclass(frozen=True)
class ListOps(SymbolTask):
    """longest: tokens of an expression, at most."""

    name = "listops"

    longest: int = quiet(2000)

    def __post_init__(self) -> None:
        if not 4 <= self.longest <= MOST:
            raise InputError(f"{self.name}: longest is from 4 to {MOST} tokens, got {self.longest}")

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        if length < 6:
            raise TooShort("a list with its value", 6, length)
        room, draws = min(length - 2, self.longest), random.Random(int(rng.integers(2**63)))
        tokens: list[int] = []
        while not (tokens and tokens[-1] == END and len(tokens) > room // 4):
            tokens, value = draw_expression(draws, room)
        ids = np.array([BLANK] * (length - len(tokens) - 2) + [*tokens, EQUALS, ZERO + value])
        return Example(ids, np.arange(length) == length - 1, about={"tokens": len(tokens)})

    @property
    def vocab_size(self) -> int:
        return len(WORDS)

    @property
    def chance(self) -> float:
        return 0.1


class _TooLong(Exception):
    """An expression has outgrown the room."""


def draw_expression(draws: random.Random, room: int) -> tuple[list[int], int]:
    """Return the tokens and the value of an expression, or no tokens where it took more than `room`."""
    tokens: list[int] = []
    try:
        return tokens, _draw(draws, room, 1, tokens)
    except _TooLong:
        return [], 0


def _draw(draws: random.Random, room: int, depth: int, tokens: list[int]) -> int:
    """Append the tokens of a node, and return its value."""
    if len(tokens) >= room:
        raise _TooLong
    if depth == DEPTH or draws.random() > LIST:
        digit = draws.randrange(10)
        tokens.append(ZERO + digit)
        return digit
    word = draws.choice(list(OPERATORS))
    tokens.append(WORDS.index(word))
    values = [_draw(draws, room, depth + 1, tokens) for _ in range(draws.randint(*MEMBERS))]
    if len(tokens) >= room:
        raise _TooLong
    tokens.append(END)
    return OPERATORS[word](values)
