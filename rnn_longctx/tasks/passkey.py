"""Passkey retrieval: a five-digit key hidden in filler, asked for at the end.

The wording of Stuffed Mamba (arXiv 2410.07145), whose pieces without the filler take 244 bytes with the answer, so
short contexts go without the header.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rnn_longctx.data.text import Text
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.spec import quiet
from rnn_longctx.tasks.base import TASKS, depth_of
from rnn_longctx.tasks.prompts import SHORTEST_PAPER, Hidden, Prompt, PromptTask, Style, fill, haystack_slice

PAPER = Style(
    "There is important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n",
    "\nThe passkey is {0}. Remember it. {0} is the passkey.\n",
    "\nWhat is the passkey? The passkey is",
)
HEADERLESS = Style("", PAPER.key, PAPER.question)
KEYS = 10_000, 100_000  # a key is below the second
STYLES = {"paper": PAPER, "headerless": HEADERLESS}


@TASKS.register
@dataclass(frozen=True)
class Passkey(PromptTask):
    """Five digits. style: "paper", "headerless", or "auto", headerless below 1024 tokens; learn: "both" trains on the
    key where its own sentence says it again, too."""

    name = "passkey"
    usual = PAPER
    answers = r"\d*"

    style: str = quiet("auto")
    learn: Literal["reply", "both"] = quiet("reply")

    def __post_init__(self) -> None:
        super().__post_init__()
        _named(self.style, 0)

    def hidden(self, rng: np.random.Generator, depth: float | None) -> list[Hidden]:
        key = draw_key(rng)
        return [Hidden(rng.random() if depth is None else depth, key)]

    def wording(self, length: int) -> Style:
        return super().wording(length) if self.template else STYLES[_named(self.style, length)]

    def called(self, length: int) -> str:
        return "a prompt" if self.template else f"a {_named(self.style, length)} passkey prompt"

    def learned(self, prompt: Prompt) -> tuple[tuple[int, int], ...]:
        return prompt.spans[1:] if self.learn == "both" else ()

    @property
    def chance(self) -> float:
        return 1 / (KEYS[1] - KEYS[0])

    @property
    def label(self) -> str:
        label = super().label
        return label if self.style == "auto" else label.replace(self.name, f"{self.name}-{self.style}", 1)


def make_passkey(
    tokenizer: Tokenizer, length: int, depth: float, rng: np.random.Generator, style: str = "auto"
) -> Prompt:
    """Return a prompt of exactly `length` tokens with the key after a share `depth` (0 to 1) of the filler.

    `style` is "paper", "headerless" or "auto" (headerless below 1024 tokens). Raises InputError when `length` is too
    small.
    """
    return _passkey(tokenizer, length, Hidden(depth, draw_key(rng)), style)


def passkey_batch(
    tokenizer: Tokenizer, length: int, n: int, seed: int, style: str | Style = "auto", haystack: Text | None = None
) -> list[Prompt]:
    """Return `n` prompts at evenly spaced depths (`depth_of`); the key of prompt i depends on (seed, length, i) alone.

    style: also a `Style` of one's own, whose header stands at every length. haystack: prompt i is filled with slice i
    of this text instead of the paper's sentences. Raises InputError: a length too small for a prompt, a text too short.
    """
    task = Passkey()
    hidden = [task.hidden(task.generator(seed, length, i), depth_of(i, n))[0] for i in range(n)]
    return [_passkey(tokenizer, length, key, style, haystack_slice(haystack, i)) for i, key in enumerate(hidden)]


def draw_key(rng: np.random.Generator) -> str:
    """Draw five digits."""
    return str(rng.integers(*KEYS))


def _passkey(
    tokenizer: Tokenizer, length: int, key: Hidden, style: str | Style, hay: tuple[Text, int] | None = None
) -> Prompt:
    if isinstance(style, Style):
        return fill(tokenizer, length, style, [key], hay)
    style = _named(style, length)
    return fill(tokenizer, length, STYLES[style], [key], hay, f"a {style} passkey prompt")


def _named(style: str, length: int) -> str:
    """Return the name of a style, that for a prompt of this length where it is "auto"."""
    if style == "auto":
        return "headerless" if length < SHORTEST_PAPER else "paper"
    if style not in STYLES:
        raise InputError(f"unknown passkey style {style!r}{nearest(style, [*STYLES, 'auto'])}")
    return style
