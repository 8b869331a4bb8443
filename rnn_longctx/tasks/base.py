"""What a task is: an example of any length, and what is right. Training and measuring ask for the same examples.

    @TASKS.register
    @dataclass(frozen=True)
    class Copying(Task):
        name = "copying"
        symbols: int = 10

        def example(self, length, i, n, rng, tokenizer):
            ...
            return Example(ids, answers)

A task is one file of this folder, or of another package that registers it (`rnn_longctx.tasks.TASKS.register`). Its
fields are its parameters, as in `copying:symbols=16`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rnn_longctx.config import counted
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.registry import Registry
from rnn_longctx.spec import canonical

if TYPE_CHECKING:
    from rnn_longctx.data import Text

DEPTHS = 10  # at most: further examples take them in turn
TRIES = 20  # prompt lengths that an example to train on is looked for at, where answers differ in tokens


class TooShort(InputError):
    """A length that an example does not fit into; `least` is the number of tokens that this one takes."""

    def __init__(self, what: str, least: int, length: int):
        super().__init__(f"{what} takes at least {counted(least, 'token')}; {length} were asked for")
        self.least = least


@dataclass(frozen=True)
class Example:
    """One sequence and what a model has to say in it.

    Attributes:
        ids: (T,) int64, the context and the answers in it.
        answers: (T,) bool, True at the tokens that have to be predicted.
        depth: where in the context the answer stands, 0 to 1, or None where that means nothing.
        about: numbers to slice results by, such as pairs or distractors.
        answer: the answer as text, where it is judged so.
        new_tokens: how many tokens an answer may take, where a model may say it in other tokens than those of `ids`.
        sources: of each True in `answers`, the tokens before it that say what to answer; () where the task names none.
        filler: (T,) bool, the tokens that only take room, so that others may stand there; None where the task names
            none.
    """

    ids: np.ndarray
    answers: np.ndarray
    depth: float | None = None
    about: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None
    new_tokens: int = 0
    sources: tuple[tuple[int, ...], ...] = ()
    filler: np.ndarray | None = None

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the first answer."""
        return self.ids[: int(self.answers.argmax())]


@dataclass(frozen=True)
class Task(ABC):
    """Base of the tasks. The fields of the dataclass are its parameters.

    Attributes:
        name: as on the command line.
        generated: how a model answers. False: at every answer, the token that is likeliest after the true ones before
            it, in one pass over an example of `length` tokens. True: the answers end the example, and are generated
            after a prompt of `length` tokens; such a task can be asked under remedies that read a prompt in a way of
            their own.
        answer_loss: whether the loss of the true answer is measured beside what a generated task scores, in nats a
            token of it.
        examples: texts of it with parameters, such as `copying:symbols=16`, that tests try it with; none: its name.
    """

    name: ClassVar[str] = ""
    generated: ClassVar[bool] = False
    answer_loss: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        """Return example `i` of `n` (which spread their depths evenly, see `depth_of`), all that is random in it drawn
        from `rng`. Its prompt has exactly `length` tokens where the task is generated, else all of it has.

        Raises:
            TooShort: it does not fit into `length`.
        """

    def training(self, length: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        """Return an example of exactly `length` tokens, answers included, at a depth of its own. The prompt of a
        generated task is as much shorter as its answers take.

        Raises:
            TooShort: it does not fit into `length`. InputError: no prompt and its answers have so many tokens.
        """
        i = int(rng.integers(DEPTHS))
        if not self.generated:
            return self.example(length, i, DEPTHS, rng, tokenizer)
        answers = 1
        for seed in np.repeat(rng.integers(2**63, size=TRIES), 2):  # twice: most say the same after a shorter prompt
            if answers >= length:
                raise TooShort(f"{self.name} with its answer", answers + 1, length)
            example = self.example(length - answers, i, DEPTHS, np.random.default_rng(seed), tokenizer)
            if len(example.ids) == length:
                return example
            answers = len(example.ids) - len(example.prompt)
        raise InputError(
            f"{self.name}: no example of {counted(length, 'token')} was found, prompt and answers together"
        )

    def generator(self, seed: int, length: int, i: int) -> np.random.Generator:
        """Return the random numbers of example `i`, which are the same however many examples there are."""
        return np.random.default_rng([seed, length, i])

    def shortest(self, tokenizer: Tokenizer) -> int:
        """Return the fewest tokens that the first example takes; others may take a few more."""
        try:
            self.example(1, 0, 1, self.generator(0, 1, 0), tokenizer)
        except TooShort as error:
            return error.least
        return 1

    def check(self, length: int, n: int, seed: int, tokenizer: Tokenizer) -> None:
        """Raise InputError where the `n` examples of this length cannot be made."""
        for i in range(n):
            self.example(length, i, n, self.generator(seed, length, i), tokenizer)

    def right(self, reply: np.ndarray, example: Example, tokenizer: Tokenizer) -> float:
        """Return the score, 0 to 1, of the tokens that a model said in the places of the answers: whether all are
        equal, unless a task overrides it."""
        answers = example.ids[example.answers]
        return float(np.array_equal(reply[: len(answers)], answers))

    @property
    def vocab_size(self) -> int | None:
        """The number of ids, where a task has ids of its own; None where they are the tokenizer's."""
        return None

    @property
    def chance(self) -> float | None:
        """The score that is to be expected of a guess: of an answer drawn from all that the task has; None where the
        task does not say."""
        return None

    @property
    def text(self) -> Text | str:
        """The text that examples are made of, or the task's name where there is none: results are filed under it."""
        return self.name

    @property
    def label(self) -> str:
        """The name that results are filed under: tasks that ask for something else are called something else."""
        return self.name

    def __str__(self) -> str:
        return canonical(self.name, self)


def depth_of(i: int, n: int) -> float:
    """Return the depth of example `i` of `n`: evenly spaced, (i + 0.5) / n, or one of ten in turn where n > 10."""
    bins = min(n, DEPTHS)
    return (i % bins + 0.5) / bins


def spread_depth(i: int, n: int, rng: np.random.Generator) -> float:
    """Draw a depth near `depth_of(i, n)`: within a stretch of 0 to 1 that no other depth draws from, so that all depths
    together fill it evenly."""
    bins = min(n, DEPTHS)
    return (i % bins + rng.random()) / bins


def followed(ids: np.ndarray, answers: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Return the sources of answers to keys: of each the token that follows where the key, the token before the answer,
    stood last."""
    keys, order = np.flatnonzero(answers) - 1, ids.argsort(kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(ids))
    return tuple((source,) for source in (order[rank[keys] - 1] + 1).tolist())


TASKS: Registry[type[Task]] = Registry("task", "rnn_longctx.tasks")
