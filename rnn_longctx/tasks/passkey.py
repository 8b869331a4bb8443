"""Passkey retrieval: a five-digit key hidden in filler, asked for at the end.

The wording of Stuffed Mamba (arXiv 2410.07145): header / filler / key sentence / filler / question. Its fixed
parts take 244 bytes with the answer, so short contexts go without the header.

Each piece (header, filler, what stands around the answer, the answer with the space before it, question) has tokens of
its own (`rnn_longctx.data.pieces`). So the answer is made of the same tokens wherever it stands, and where is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rnn_longctx.data.pieces import encode_after
from rnn_longctx.data.text import Text, tokens
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError, nearest

LAST = " There and back again."
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go." + LAST


@dataclass(frozen=True)
class Style:
    """A wording: `key` is the sentence that holds the answer, {0}; of several keys, {1} is a key's label there and in
    the question."""

    header: str
    key: str
    question: str

    def __post_init__(self) -> None:
        if "{0}" not in self.key or "{0}" in self.question:
            raise InputError("key must hold {0}, where the answer stands, and question must not")


PAPER = Style(
    "There is important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n",
    "\nThe passkey is {0}. Remember it. {0} is the passkey.\n",
    "\nWhat is the passkey? The passkey is",
)
HEADERLESS = Style("", PAPER.key, PAPER.question)
LABELLED = Style(
    PAPER.header,
    "\nThe {1} passkey is {0}. Remember it. {0} is the {1} passkey.\n",
    "\nWhat is the {1} passkey? The {1} passkey is",
)
WORDED = Style(
    PAPER.header,
    "\nThe secret word is {0}. Remember it. {0} is the secret word.\n",
    "\nWhat is the secret word? The secret word is",
)
LABELS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
WORDS = (
    *("apple", "brick", "chair", "delta", "eagle", "flame", "grape", "house", "ivory", "jolly", "knife", "lemon"),
    *("mango", "night", "ocean", "piano", "queen", "river", "stone", "tiger", "uncle", "violin", "whale", "zebra"),
)
STYLES = {"paper": PAPER, "headerless": HEADERLESS}
SHORTEST_PAPER = 1024  # "auto": below this the header would crowd out the filler


@dataclass(frozen=True)
class PasskeyPrompt:
    """`ids` (length,) int64; `answer` five digits, or a word; the sentence that holds it starts at token `position`,
    the question, which ends the prompt, at token `asked`; `spans` [start, stop) are the tokens that hold the answer's
    characters, in order; `reply` the tokens that answer the question."""

    ids: np.ndarray
    answer: str
    depth: float
    position: int
    asked: int
    spans: tuple[tuple[int, int], ...]
    reply: np.ndarray

    @property
    def new_tokens(self) -> int:
        """Tokens to read an answer from: the reply, a character a token if a model says it so, and the one after it,
        which shows that the answer ends there."""
        return max(len(self.reply), len(self.answer) + 1) + 1


def make_passkey(
    tokenizer: Tokenizer, length: int, depth: float, rng: np.random.Generator, style: str = "auto"
) -> PasskeyPrompt:
    """A prompt of exactly `length` tokens with the key after a share `depth` (0 to 1) of the filler.

    Both runs of filler are cut on their left, at a token, so that they end with a whole sentence. `style` is
    "paper", "headerless" or "auto" (headerless below 1024 tokens). Raises InputError when `length` is too
    small.
    """
    return _prompt(tokenizer, length, depth, _draw(rng), style)


def passkey_batch(tokenizer: Tokenizer, length: int, n: int, seed: int, style: str | Style = "auto",
                  haystack: Text | None = None) -> list[PasskeyPrompt]:  # fmt: skip
    """`n` prompts at evenly spaced depths (i + 0.5) / n, or at ten depths in turn when n > 10; the key of
    prompt i depends on (seed, length, i) alone.

    style: also a `Style` of one's own, whose header stands at every length. haystack: prompt i is filled with slice i
    of this text instead of the paper's sentences. Raises InputError: a length too small for a prompt, a text too short.
    """
    rngs = [np.random.default_rng([seed, length, i]) for i in range(n)]
    return [
        _prompt(tokenizer, length, _depth(i, n), _draw(rng), style, _slice(haystack, i)) for i, rng in enumerate(rngs)
    ]


def multikey_batch(tokenizer: Tokenizer, length: int, n: int, seed: int, keys: int = 4, style: Style | None = None,
                   haystack: Text | None = None) -> list[PasskeyPrompt]:  # fmt: skip
    """`passkey_batch` with `keys` labelled keys ("The red passkey is ..."), 2 to 8, one of which is asked for; it
    stands at the prompt's depth, the others anywhere. Raises InputError when `length` is too small for them."""
    if not 2 <= keys <= len(LABELS):
        raise InputError(f"a prompt holds 2 to {len(LABELS)} keys, not {keys}")
    made, wording = [], style or _fitting(LABELLED, length)
    if "{1}" not in wording.key or "{1}" not in wording.question:
        raise InputError("of several keys, key and question must hold {1}, where a key's label stands")
    for i in range(n):
        rng = np.random.default_rng([seed, length, i, keys])
        labels, answers = rng.permutation(LABELS)[:keys], [_draw(rng) for _ in range(keys)]
        depths = [_depth(i, n), *rng.random(keys - 1)]
        said = list(zip(depths, answers, map(str, labels)))
        made.append(_filled(tokenizer, length, wording, said, hay=_slice(haystack, i)))
    return made


def words_batch(tokenizer: Tokenizer, length: int, n: int, seed: int, style: Style | None = None,
                haystack: Text | None = None) -> list[PasskeyPrompt]:  # fmt: skip
    """`passkey_batch` with a word of `WORDS` for the key."""
    made, wording = [], style or _fitting(WORDED, length)
    for i in range(n):
        word = str(np.random.default_rng([seed, length, i]).choice(WORDS))
        made.append(_prompt(tokenizer, length, _depth(i, n), word, wording, _slice(haystack, i)))
    return made


def training_sequence(
    tokenizer: Tokenizer, length: int, rng: np.random.Generator, style: str = "headerless", said_again: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A prompt at a random depth and its answer, ``" 12345."``: (ids (length,) int64, mask (length,) bool,
    True on the answer, and with `said_again` where the key's own sentence repeats it, too). Raises InputError when
    `length` is too small."""
    key, depth = _draw(rng), rng.random()
    reply, stop = _reply(tokenizer, PAPER.question, key), _piece(tokenizer, key, ".")[0]
    answer = np.concatenate([reply, stop])
    prompt = _prompt(tokenizer, length - len(answer), depth, key, style)
    mask = np.arange(length) >= length - len(answer)
    if said_again:
        again = prompt.spans[1]
        mask[slice(*again)] = True
    return np.concatenate([prompt.ids, answer]), mask


def _prompt(tokenizer: Tokenizer, length: int, depth: float, answer: str, style: str | Style,
            hay: tuple[Text, int] | None = None) -> PasskeyPrompt:  # fmt: skip
    if not 0 <= depth <= 1:
        raise InputError(f"passkey depth must lie in [0, 1], not {depth}")
    what = "a prompt"
    if isinstance(style, str):
        if style == "auto":
            style = "headerless" if length < SHORTEST_PAPER else "paper"
        if style not in STYLES:
            raise InputError(f"unknown passkey style {style!r}{nearest(style, [*STYLES, 'auto'])}")
        what, style = f"a {style} passkey prompt", STYLES[style]
    return _filled(tokenizer, length, style, [(depth, answer, "")], what, hay)


def _fitting(style: Style, length: int) -> Style:
    return Style("", style.key, style.question) if length < SHORTEST_PAPER else style


def _slice(haystack: Text | None, i: int) -> tuple[Text, int] | None:
    return None if haystack is None else (haystack, i)


def _depth(i: int, n: int) -> float:
    bins = min(n, 10)
    return (i % bins + 0.5) / bins


def _filled(tokenizer: Tokenizer, length: int, style: Style, said: list[tuple[float, str, str]], what: str = "a prompt",
            hay: tuple[Text, int] | None = None) -> PasskeyPrompt:  # fmt: skip
    """Sentences, each a (depth of the filler, answer, label); the first is asked for. hay: a text, which slice."""
    depth, answer, label = said[0]
    question = style.question.replace("{1}", label or "{1}")
    opening, asked = tokenizer.encode(style.header), _piece(tokenizer, LAST, question)[0]
    sentences = [_sentence(tokenizer, style.key, a, w) for _, a, w in said]
    room = length - len(opening) - len(asked) - sum(len(ids) for ids, _ in sentences)
    if room < 0:
        raise InputError(f"{what} takes at least {length - room} tokens; {length} were asked for")
    filler, parts, done, position = _piece(tokenizer, FILLER, FILLER)[0], [opening], 0, 0
    text = None if hay is None else tokens(hay[0], tokenizer, hay[1], room)[0]
    for i in sorted(range(len(said)), key=lambda i: said[i][0]):
        before = round(said[i][0] * room)
        parts.append(_last(filler, before - done) if text is None else text[done:before])
        done = before
        if i == 0:
            position = sum(map(len, parts))
        parts.append(sentences[i][0])
    ids = np.concatenate([*parts, _last(filler, room - done) if text is None else text[done:], asked])
    spans = tuple((position + start, position + stop) for start, stop in sentences[0][1])
    reply = _reply(tokenizer, question, answer).copy()
    for where in (reply, *(ids[start:stop] for start, stop in spans)):
        if (read := tokenizer.decode(where).strip()) != answer:
            raise InputError(f"tokenizer {tokenizer.name} cannot say the answer: {answer} reads back as {read!r:.60}")
    return PasskeyPrompt(ids, answer, depth, position, length - len(asked), spans, reply)


def _sentence(tokenizer: Tokenizer, wording: str, answer: str, label: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The tokens of a sentence, and where those are that hold the answer, {0}; a space before {0} goes with it."""
    # replaced, not formatted: a person's wording may hold other braces
    first, *others = wording.replace("{1}", label).split("{0}")
    parts, spans, before, n = [], [], LAST, 0

    def add(text: str) -> np.ndarray:
        nonlocal before, n
        ids, nbytes = _piece(tokenizer, before, text)
        parts.append(ids)
        before, n = before + text, n + len(ids)
        return nbytes

    text = first
    for other in others:
        space = " " * text.endswith(" ")
        add(text.removesuffix(" "))
        nbytes = add(space + answer)
        spans.append((n - int((np.cumsum(nbytes) > len(space)).sum()), n))
        text = other
    add(text)
    return np.concatenate(parts), spans


@lru_cache(1024)
def _piece(tokenizer: Tokenizer, before: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """`encode_after`, remembered: most pieces are the same in every prompt."""
    return encode_after(tokenizer, before, text)


def _reply(tokenizer: Tokenizer, question: str, answer: str) -> np.ndarray:
    """The tokens that answer a question, with the space that parts it from the answer."""
    space = "" if question[-1:].isspace() else " "
    return _piece(tokenizer, question, space + answer)[0]


def _draw(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _last(cycle: np.ndarray, n: int) -> np.ndarray:
    """The last `n` tokens of an endless repetition of `cycle`."""
    return np.tile(cycle, -(-n // len(cycle)))[-n:] if n else cycle[:0]
