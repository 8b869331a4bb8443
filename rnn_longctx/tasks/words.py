"""Passkey retrieval with a word in the place of the key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnn_longctx.tasks.base import TASKS
from rnn_longctx.tasks.passkey import PAPER
from rnn_longctx.tasks.prompts import Hidden, PromptTask, Style

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

    @property
    def chance(self) -> float:
        return 1 / len(WORDS)
