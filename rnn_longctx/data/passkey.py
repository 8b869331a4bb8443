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
LABELS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
WORDS = (
    *("apple", "brick", "chair", "delta", "eagle", "flame", "grape", "house", "ivory", "jolly", "knife", "lemon"),
    *("mango", "night", "ocean", "piano", "queen", "river", "stone", "tiger", "uncle", "violin", "whale", "zebra"),
)
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


def multikey_batch(tokenizer: Tokenizer, length: int, n: int, seed: int, keys: int = 4) -> list[PasskeyPrompt]:
    """`passkey_batch` with `keys` labelled keys ("The red passkey is ..."), 2 to 8, one of which is asked for; it
    stands at the prompt's depth, the others anywhere. Raises InputError when `length` is too small for them."""
    if not 2 <= keys <= len(LABELS):
        raise InputError(f"a prompt holds 2 to {len(LABELS)} keys, not {keys}")
    made = []
    for i in range(n):
        rng = np.random.default_rng([seed, length, i, keys])
        labels, answers = rng.permutation(LABELS)[:keys], [_draw(rng) for _ in range(keys)]
        depths = [(i % min(n, 10) + 0.5) / min(n, 10), *rng.random(keys - 1)]
        said = [f"\nThe {w} passkey is {a}. Remember it. {a} is the {w} passkey.\n" for w, a in zip(labels, answers)]
        question = f"\nWhat is the {labels[0]} passkey? The {labels[0]} passkey is"
        made.append(_filled(tokenizer, length, _header(length), question, list(zip(depths, said)), answers[0]))
    return made


def words_batch(tokenizer: Tokenizer, length: int, n: int, seed: int) -> list[PasskeyPrompt]:
    """`passkey_batch` with a word of `WORDS` for the key."""
    made = []
    for i in range(n):
        word = str(np.random.default_rng([seed, length, i]).choice(WORDS))
        said, depth = f"\nThe secret word is {word}. Remember it. {word} is the secret word.\n", (i % min(n, 10) + 0.5)
        question = "\nWhat is the secret word? The secret word is"
        made.append(_filled(tokenizer, length, _header(length), question, [(depth / min(n, 10), said)], word))
    return made


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
    said = [(depth, wording.key.format(answer))]
    return _filled(tokenizer, length, wording.header, wording.question, said, answer, f"a {style} passkey prompt")


def _header(length: int) -> str:
    return "" if length < SHORTEST_PAPER else PAPER.header


def _filled(tokenizer: Tokenizer, length: int, header: str, question: str, said: list[tuple[float, str]], answer: str,
            what: str = "a prompt") -> PasskeyPrompt:  # fmt: skip
    """Sentences each at a depth of the filler; the first of them holds the answer."""
    opening, asked = tokenizer.encode(header), tokenizer.encode(question)
    sentences = [tokenizer.encode(text) for _, text in said]
    room = length - len(opening) - len(asked) - sum(map(len, sentences))
    if room < 0:
        raise InputError(f"{what} takes at least {length - room} tokens; {length} were asked for")
    filler, parts, done, position = tokenizer.encode(FILLER), [opening], 0, 0
    for i in sorted(range(len(said)), key=lambda i: said[i][0]):
        before = round(said[i][0] * room)
        parts.append(_last(filler, before - done))
        done = before
        if i == 0:
            position = sum(map(len, parts))
        parts.append(sentences[i])
    ids = np.concatenate([*parts, _last(filler, room - done), asked])
    return PasskeyPrompt(ids, answer, said[0][0], position)


def _draw(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _last(cycle: np.ndarray, n: int) -> np.ndarray:
    """The last `n` tokens of an endless repetition of `cycle`."""
    return np.tile(cycle, -(-n // len(cycle)))[-n:] if n else cycle[:0]
