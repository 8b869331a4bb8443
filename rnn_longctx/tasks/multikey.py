"""Passkeys with labels ("The red passkey is ..."), one of which is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnn_longctx.errors import InputError
from rnn_longctx.tasks.base import TASKS
from rnn_longctx.tasks.passkey import KEYS, PAPER, draw_key
from rnn_longctx.tasks.prompts import Hidden, PromptTask, Style

LABELS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
LABELLED = Style(
    PAPER.header,
    "\nThe {1} passkey is {0}. Remember it. {0} is the {1} passkey.\n",
    "\nWhat is the {1} passkey? The {1} passkey is",
)


@TASKS.register
@dataclass(frozen=True)
class MultiKey(PromptTask):
    """keys: how many there are, 2 to 8; the one that is asked for stands at the prompt's depth, the others anywhere."""

    name = "multikey"
    usual = LABELLED
    answers = r"\d*"

    keys: int = 4

    def hidden(self, rng: np.random.Generator, depth: float | None) -> list[Hidden]:
        if not 2 <= self.keys <= len(LABELS):
            raise InputError(f"a prompt holds 2 to {len(LABELS)} keys, not {self.keys}")
        labels, answers = rng.permutation(LABELS)[: self.keys], [draw_key(rng) for _ in range(self.keys)]
        depths = [rng.random() if depth is None else depth, *rng.random(self.keys - 1)]
        return [Hidden(*each) for each in zip(depths, answers, map(str, labels))]

    def wording(self, length: int) -> Style:
        return labelled(super().wording(length))

    def generator(self, seed: int, length: int, i: int) -> np.random.Generator:
        return np.random.default_rng([seed, length, i, self.keys])

    @property
    def chance(self) -> float:
        return 1 / (KEYS[1] - KEYS[0])

    @property
    def label(self) -> str:
        return super().label.replace(self.name, f"{self.name}{self.keys}", 1)


def labelled(wording: Style) -> Style:
    """Return a wording in which the label of a key has its place. Raises InputError for another."""
    if "{1}" not in wording.key or "{1}" not in wording.question:
        raise InputError("of several keys, key and question must hold {1}, where a key's label stands")
    return wording
