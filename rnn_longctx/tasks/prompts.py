"""Prompts with an answer hidden in filler: header / filler / key sentence / filler / question.

Each piece (header, filler, what stands around the answer, the answer with the space before it, question) has tokens of
its own (`rnn_longctx.data.pieces`). So the answer is made of the same tokens wherever it stands, and where is known.
"""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from rnn_longctx.config import load_yaml
from rnn_longctx.data.pieces import encode_after
from rnn_longctx.data.text import Text, load_text, tokens
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.spec import quiet
from rnn_longctx.tasks.base import Example, Task, TooShort, depth_of

LAST = " There and back again."
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go." + LAST
SHORTEST_PAPER = 1024  # tokens: in shorter prompts the header would crowd out the filler


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

    def fitting(self, length: int) -> Style:
        """Return the wording for a prompt of that length, a short one without the header."""
        return Style("", self.key, self.question) if length < SHORTEST_PAPER else self


class Hidden(NamedTuple):
    """An answer that a sentence of the prompt holds, with a label where there are several; its sentence stands after a
    share `depth` of the filler."""

    depth: float
    answer: str
    label: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt and where its answer stands.

    Attributes:
        ids: (length,) int64.
        answer: five digits, or a word.
        depth: the share of the filler that stands before the answer's sentence.
        position: the token at which that sentence starts.
        question: the token at which the question starts, which ends the prompt.
        spans: [start, stop) of the tokens that hold the answer's characters, in order.
        reply: the tokens that answer the question.
        filler: (length,) bool, the tokens that are filler.
    """

    ids: np.ndarray
    answer: str
    depth: float
    position: int
    question: int
    spans: tuple[tuple[int, int], ...]
    reply: np.ndarray
    filler: np.ndarray

    @property
    def new_tokens(self) -> int:
        """Tokens to read an answer from: the reply, a character a token if a model says it so, and the one after it,
        which shows that the answer ends there."""
        return max(len(self.reply), len(self.answer) + 1) + 1

    def example(self) -> Example:
        """Return the prompt and its reply, which is the answer."""
        ids = np.concatenate([self.ids, self.reply])
        answers = np.arange(len(ids)) >= len(self.ids)
        back = range(len(self.reply), 0, -1)  # counted from the ends: a space may stand before the reply alone
        sources = tuple(tuple(stop - n for start, stop in self.spans if stop - n >= start) for n in back)
        filler = np.append(self.filler, np.zeros(len(self.reply), dtype=bool))
        return Example(ids, answers, self.depth, {}, self.answer, self.new_tokens, sources, filler)


@dataclass(frozen=True)
class PromptTask(Task):
    """haystack: a text to hide the answer in, instead of the paper's sentences; template: a YAML file of another
    wording, with header, key ({0} is the answer) and question."""

    generated = True
    usual: ClassVar[Style]
    answers: ClassVar[str]  # a regular expression: the longest answer that a reply can begin with

    haystack: str | None = quiet(None)
    template: str | None = quiet(None)

    def __post_init__(self) -> None:
        if self.template:
            _template(self.template)

    @abstractmethod
    def hidden(self, rng: np.random.Generator, depth: float | None) -> list[Hidden]:
        """Draw the answers to be hidden, the one that is asked for first, at `depth` or (None) at a depth drawn."""

    def wording(self, length: int) -> Style:
        """Return the wording of a prompt of that length."""
        return _template(self.template) if self.template else self.usual.fitting(length)

    def prompt(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Prompt:
        """Return prompt `i` of `n`."""
        return self._filled(length, self.hidden(rng, depth_of(i, n)), i, tokenizer)

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        return self.prompt(length, i, n, rng, tokenizer).example()

    def training(self, length: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        """Return a prompt at a random depth and its answer with a full stop, together `length` tokens."""
        hidden = self.hidden(rng, None)
        question = self.wording(length).question.replace("{1}", hidden[0].label or "{1}")
        reply = np.concatenate(
            [reply_to(tokenizer, question, hidden[0].answer), piece(tokenizer, hidden[0].answer, ".")]
        )
        i = int(rng.integers(2**31)) if self.haystack else 0
        prompt = self._filled(length - len(reply), hidden, i, tokenizer)
        answers = np.arange(length) >= length - len(reply)
        for start, stop in self.learned(prompt):
            answers[start:stop] = True
        ids, filler = np.concatenate([prompt.ids, reply]), np.append(prompt.filler, np.zeros(len(reply), dtype=bool))
        return Example(ids, answers, prompt.depth, {}, prompt.answer, prompt.new_tokens, filler=filler)

    def learned(self, prompt: Prompt) -> tuple[tuple[int, int], ...]:
        """Return the spans of a prompt that training counts as answers too."""
        return ()

    def check(self, length: int, n: int, seed: int, tokenizer: Tokenizer) -> None:
        """Make one prompt with the haystack, and all without it, for answers differ in tokens."""
        self.prompt(length, 0, 1, self.generator(seed, length, 0), tokenizer)
        for i in range(n):
            hidden = self.hidden(self.generator(seed, length, i), depth_of(i, n))
            fill(tokenizer, length, self.wording(length), hidden, what=self.called(length))

    def called(self, length: int) -> str:
        """Return what messages call a prompt of that length."""
        return "a prompt"

    def right(self, reply: np.ndarray, example: Example, tokenizer: Tokenizer) -> float:
        """Return whether the reply, as text, begins with the answer and with no longer one."""
        return float(self.says(tokenizer.decode(reply.tolist()).strip(), example.answer or ""))

    def says(self, text: str, answer: str) -> bool:
        """Return whether a text begins with that answer."""
        return re.match(self.answers, text)[0] == answer  # type: ignore[index]

    @cached_property
    def hay(self) -> Text | None:
        """The haystack."""
        return None if self.haystack is None else load_text(self.haystack)

    @property
    def text(self) -> Text | str:
        return self.name if self.hay is None else self.hay

    @property
    def label(self) -> str:
        label = self.name
        if self.haystack:
            label += f"-in-{_slug(Path(self.haystack).name)}"
        if self.template:
            digest = hashlib.sha256(repr(_template(self.template)).encode()).hexdigest()[:6]
            label += f"-as-{_slug(Path(self.template).stem)}-{digest}"
        return label

    def _filled(self, length: int, hidden: list[Hidden], i: int, tokenizer: Tokenizer) -> Prompt:
        hay = None if self.hay is None else (self.hay, i)
        return fill(tokenizer, length, self.wording(length), hidden, hay, self.called(length))


def fill(
    tokenizer: Tokenizer,
    length: int,
    style: Style,
    hidden: list[Hidden],
    hay: tuple[Text, int] | None = None,
    what: str = "a prompt",
) -> Prompt:
    """Return a prompt of exactly `length` tokens that asks for the first of the hidden answers.

    Both runs of the paper's filler are cut on their left, at a token, so that they end with a whole sentence.

    Args:
        hay: a text to fill it with instead, and which slice of it.
        what: what the message of an error calls it.
    Raises:
        TooShort: `length` is too small. InputError: a text that is too short, a depth outside [0, 1], a tokenizer that
            cannot say the answer.
    """
    depth, answer, label = hidden[0]
    if not 0 <= depth <= 1:
        raise InputError(f"passkey depth must lie in [0, 1], not {depth}")
    question = style.question.replace("{1}", label or "{1}")
    opening, closing = tokenizer.encode(style.header), piece(tokenizer, LAST, question)
    sentences = [_sentence(tokenizer, style.key, h.answer, h.label) for h in hidden]
    room = length - len(opening) - len(closing) - sum(len(ids) for ids, _ in sentences)
    if room < 0:
        raise TooShort(what, length - room, length)
    filler, pieces, done, position = piece(tokenizer, FILLER, FILLER), [opening], 0, 0
    text = None if hay is None else tokens(hay[0], tokenizer, hay[1], room)[0]
    for i in sorted(range(len(hidden)), key=lambda i: hidden[i].depth):
        before = round(hidden[i].depth * room)
        pieces.append(_last(filler, before - done) if text is None else text[done:before])
        done = before
        if i == 0:
            position = sum(map(len, pieces))
        pieces.append(sentences[i][0])
    pieces += [_last(filler, room - done) if text is None else text[done:], closing]
    ids, sizes = np.concatenate(pieces), [len(ids) for ids in pieces]
    is_filler = np.repeat(np.arange(len(pieces)) % 2 == 1, sizes)  # between header, sentences and question
    spans = tuple((position + start, position + stop) for start, stop in sentences[0][1])
    reply = reply_to(tokenizer, question, answer).copy()
    for where in (reply, *(ids[start:stop] for start, stop in spans)):
        if (read := tokenizer.decode(where).strip()) != answer:
            raise InputError(f"tokenizer {tokenizer.name} cannot say the answer: {answer} reads back as {read!r:.60}")
    return Prompt(ids, answer, depth, position, length - len(closing), spans, reply, is_filler)


def _sentence(tokenizer: Tokenizer, wording: str, answer: str, label: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return the tokens of a sentence, and where those are that hold the answer, {0}, without the space before it."""
    # replaced, not formatted: a person's wording may hold other braces
    first, *others = wording.replace("{1}", label).split("{0}")
    pieces, spans, before, n = [], [], LAST, 0

    def add(text: str) -> np.ndarray:
        nonlocal before, n
        ids, nbytes = _encoded(tokenizer, before, text)
        pieces.append(ids)
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
    return np.concatenate(pieces), spans


@lru_cache(1024)
def _encoded(tokenizer: Tokenizer, before: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """`encode_after`, remembered: most pieces are the same in every prompt."""
    return encode_after(tokenizer, before, text)


def piece(tokenizer: Tokenizer, before: str, text: str) -> np.ndarray:
    """Return the tokens of a text where it stands after another."""
    return _encoded(tokenizer, before, text)[0]


def reply_to(tokenizer: Tokenizer, question: str, answer: str) -> np.ndarray:
    """Return the tokens that answer a question, with the space that parts it from the answer."""
    space = "" if question[-1:].isspace() else " "
    return piece(tokenizer, question, space + answer)


def haystack_slice(haystack: Text | None, i: int) -> tuple[Text, int] | None:
    """Return what `fill` takes for prompt `i`, which is filled with slice `i`."""
    return None if haystack is None else (haystack, i)


def _last(cycle: np.ndarray, n: int) -> np.ndarray:
    """Return the last `n` tokens of an endless repetition of `cycle`."""
    return np.tile(cycle, -(-n // len(cycle)))[-n:] if n else cycle[:0]


@lru_cache
def _template(path: str) -> Style:
    return load_yaml(Style, path)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
