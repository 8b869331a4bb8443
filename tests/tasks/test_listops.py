"""ListOps: values against a reading of the words, and trees drawn as Long Range Arena draws them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.tasks.listops import DEPTH, WORDS, ListOps, draw_expression


def value_of(words: list[str]) -> int:
    """Read an expression from its first word on, and take its words away; the rules are those of LRA's generator."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    values = []
    while words[0] != "]":
        values.append(value_of(words))
    words.pop(0)
    assert 2 <= len(values) <= 10
    rules = {"[MIN": np.min, "[MAX": np.max, "[MED": np.median, "[SM": lambda v: np.sum(v) % 10}
    return int(rules[word](values))


@pytest.mark.parametrize("length", [6, 7, 60, 1000])
def test_the_answer_is_the_value(length, seed):
    task = ListOps(longest=300)
    operators = set()
    for i in range(30):
        example = task.example(length, i, 30, np.random.default_rng([seed, i]), ByteTokenizer())
        words = [WORDS[k] for k in example.ids]
        blanks = words.count(".")
        assert (
            set(words[:blanks]) <= {"."}
            and words[-2] == "="
            and example.answers.tolist() == [False] * (length - 1) + [True]
        )
        expression = words[blanks:-2]
        room = min(length - 2, 300)
        assert room // 4 < len(expression) <= room and expression[0][0] == "["
        operators |= {word for word in expression if word[0] == "["}
        assert value_of(expression) == int(words[-1]) and not expression
    assert length < 60 or len(operators) == 4


def test_trees_are_as_long_as_lra_draws_them(seed):
    """The share of digits, 3/4, and of lists of two digits, 1/4 * 1/9 * (3/4)^2; nothing lies deeper than ten."""
    draws, n = random.Random(seed), 3_000
    drawn = [draw_expression(draws, 2000)[0] for _ in range(n)]
    for size, share in ((1, 0.75), (4, 0.25 / 9 * 0.75**2)):
        count = sum(len(tokens) == size for tokens in drawn)
        assert abs(count / n - share) < 6 * (share * (1 - share) / n) ** 0.5
    deepest = 0
    for tokens in drawn:
        steps = np.array([WORDS[k][0] == "[" for k in tokens], dtype=int) - [WORDS[k] == "]" for k in tokens]
        deepest = max(deepest, int(steps.cumsum().max(initial=0)))
    assert deepest == DEPTH - 1, "lists in lists; digits lie one deeper"
