"""Passkeys with labels ("The red passkey is ..."), one of which is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnn_longctx.data.text import Text
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.base import TASKS, depth_of
from rnn_longctx.tasks.passkey import PAPER, draw_key
from rnn_longctx.tasks.prompts import Hidden, Prompt, PromptTask, Style, fill, haystack_slice

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
        return _labelled(super().wording(length))

    def generator(self, seed: int, length: int, i: int) -> np.random.Generator:
        return np.random.default_rng([seed, length, i, self.keys])

    @property
    def label(self) -> str:
        return super().label.replace(self.name, f"{self.name}{self.keys}", 1)


def multikey_batch(
    tokenizer: Tokenizer,
    length: int,
    n: int,
    seed: int,
    keys: int = 4,
    style: Style | None = None,
    haystack: Text | None = None,
) -> list[Prompt]:
    """Return `passkey_batch` with `keys` labelled keys. Raises InputError when `length` is too small for them."""
    task, prompts = MultiKey(keys=keys), []
    for i in range(n):
        hidden = task.hidden(task.generator(seed, length, i), depth_of(i, n))
        wording = _labelled(style or task.wording(length))
        prompts.append(fill(tokenizer, length, wording, hidden, haystack_slice(haystack, i)))
    return prompts


def _labelled(wording: Style) -> Style:
    if "{1}" not in wording.key or "{1}" not in wording.question:
        raise InputError("of several keys, key and question must hold {1}, where a key's label stands")
    return wording
