"""Passkey retrieval: a five-digit key hidden in filler, asked for at the end.

The wording of Stuffed Mamba (arXiv 2410.07145): header / filler / key sentence / filler / question. Its fixed
parts take 244 bytes with the answer, so short contexts go without the header.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError, nearest

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Style:
    header: str
    key: str
    question: str


PAPER = Style(
    "There is important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n",
    "\nThe passkey is {0}. Remember it. {0} is the passkey.\n",
    "\nWhat is the passkey? The passkey is",
)
HEADERLESS = Style("", PAPER.key, PAPER.question)
STYLES = {"paper": PAPER, "headerless": HEADERLESS}
SHORTEST_PAPER = 1024  # "auto": below this the header would crowd out the filler


@dataclass(frozen=True)
class PasskeyPrompt:
    """`ids` (length,) int64; `answer` five digits; the key sentence starts at token `position`."""

    ids: np.ndarray
    answer: str
    depth: float
    position: int


def make_passkey(
    tokenizer: Tokenizer, length: int, depth: float, rng: np.random.Generator, style: str = "auto"
) -> PasskeyPrompt:
    """A prompt of exactly `length` tokens with the key after a share `depth` (0 to 1) of the filler.

    Both runs of filler are cut on their left, at a token, so that they end with a whole sentence. `style` is
    "paper", "headerless" or "auto" (headerless below 1024 tokens). Raises InputError when `length` is too
    small.
    """
    return _prompt(tokenizer, length, depth, _draw(rng), style)


def passkey_batch(tokenizer: Tokenizer, length: int, n: int, seed: int, style: str = "auto") -> list[PasskeyPrompt]:
    """`n` prompts at evenly spaced depths (i + 0.5) / n, or at ten depths in turn when n > 10; the key of
    prompt i depends on (seed, length, i) alone."""
    bins = min(n, 10)
    rngs = [np.random.default_rng([seed, length, i]) for i in range(n)]
    return [make_passkey(tokenizer, length, (i % bins + 0.5) / bins, rng, style) for i, rng in enumerate(rngs)]


def training_sequence(
    tokenizer: Tokenizer, length: int, rng: np.random.Generator, style: str = "headerless"
) -> tuple[np.ndarray, np.ndarray]:
    """A prompt at a random depth and its answer, ``" 12345."``: (ids (length,) int64, mask (length,) bool,
    True on the answer). Raises InputError when `length` is too small."""
    key, depth = _draw(rng), rng.random()
    answer = tokenizer.encode(f" {key}.")
    prompt = _prompt(tokenizer, length - len(answer), depth, key, style)
    return np.concatenate([prompt.ids, answer]), np.arange(length) >= length - len(answer)


def _prompt(tokenizer: Tokenizer, length: int, depth: float, answer: str, style: str) -> PasskeyPrompt:
    if not 0 <= depth <= 1:
        raise InputError(f"passkey depth must lie in [0, 1], not {depth}")
    if style == "auto":
        style = "headerless" if length < SHORTEST_PAPER else "paper"
    if style not in STYLES:
        raise InputError(f"unknown passkey style {style!r}{nearest(style, [*STYLES, 'auto'])}")
    wording = STYLES[style]
    header, question = tokenizer.encode(wording.header), tokenizer.encode(wording.question)
    key = tokenizer.encode(wording.key.format(answer))
    room = length - len(header) - len(key) - len(question)
    if room < 0:
        raise InputError(f"a {style} passkey prompt takes at least {length - room} tokens; {length} were asked for")
    before = round(depth * room)
    filler = tokenizer.encode(FILLER)
    ids = np.concatenate([header, _last(filler, before), key, _last(filler, room - before), question])
    return PasskeyPrompt(ids, answer, depth, len(header) + before)


def _draw(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _last(cycle: np.ndarray, n: int) -> np.ndarray:
    """The last `n` tokens of an endless repetition of `cycle`."""
    return np.tile(cycle, -(-n // len(cycle)))[-n:] if n else cycle[:0]
