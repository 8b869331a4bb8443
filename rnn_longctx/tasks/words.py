"""Passkey retrieval with a word in the place of the key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnn_longctx.data.text import Text
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.tasks.base import TASKS, depth_of
from rnn_longctx.tasks.passkey import PAPER
from rnn_longctx.tasks.prompts import Hidden, Prompt, PromptTask, Style, fill, haystack_slice

WORDS = (
    *("apple", "brick", "chair", "delta", "eagle", "flame", "grape", "house", "ivory", "jolly", "knife", "lemon"),
    *("mango", "night", "ocean", "piano", "queen", "river", "stone", "tiger", "uncle", "violin", "whale", "zebra"),
)
WORDED = Style(
    PAPER.header,
    "\nThe secret word is {0}. Remember it. {0} is the secret word.\n",
    "\nWhat is the secret word? The secret word is",
)


@TASKS.register
@dataclass(frozen=True)
class Words(PromptTask):
    """The answer is one of `WORDS`."""

    name = "words"
    usual = WORDED
    answers = r"\w*"

    def hidden(self, rng: np.random.Generator, depth: float | None) -> list[Hidden]:
        word = str(rng.choice(WORDS))
        return [Hidden(rng.random() if depth is None else depth, word)]


def words_batch(
    tokenizer: Tokenizer, length: int, n: int, seed: int, style: Style | None = None, haystack: Text | None = None
) -> list[Prompt]:
    """Return `passkey_batch` with a word of `WORDS` for the key."""
    task, prompts = Words(), []
    for i in range(n):
        hidden = task.hidden(task.generator(seed, length, i), depth_of(i, n))
        prompts.append(fill(tokenizer, length, style or task.wording(length), hidden, haystack_slice(haystack, i)))
    return prompts
