"""Examples of tasks mixed into the rows of a batch: which rows of a step end in one, of which task, and how long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rnn_longctx.data import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.spec import parse
from rnn_longctx.tasks import TASKS, Task, TooShort
from rnn_longctx.train.config import DataConfig, MixedTask

TRIES = 200  # examples made to see whether the shortest length has room for one: answers differ in tokens


@dataclass(frozen=True)
class Placed:
    """The examples of a step.

    Attributes:
        rows: (K,) the rows that end in an example.
        ids: (K, T) int64, their tokens, and an end of document before each; 0 where the text stays.
        text: (K, T) bool, where the text stays.
        answers: (K, T) bool, the tokens that are answers.
    """

    rows: np.ndarray
    ids: np.ndarray
    text: np.ndarray
    answers: np.ndarray


def place(
    data: DataConfig, tokenizer: Tokenizer, rng: np.random.Generator, size: tuple[int, int], shuffled: bool
) -> Placed:
    """Draw the examples of a step.

    Args:
        size: rows and tokens a row.
        shuffled: any rows may have one; otherwise the first have.
    """
    groups = rows_with_examples(data, rng, size[0], shuffled)
    rows = np.concatenate([np.arange(0), *groups])
    shape = len(rows), size[1]
    placed = Placed(rows, np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool))
    i = 0
    for mixed, group in zip(data.mixed, groups, strict=True):
        task = task_of(mixed)
        for _ in group:
            _fill_row(placed, i, mixed, task, tokenizer, rng)
            i += 1
    return placed


def rows_with_examples(data: DataConfig, rng: np.random.Generator, size: int, shuffled: bool) -> list[np.ndarray]:
    """Return the rows of a step that end in an example, for each mixed task; the first that `rng` is asked for."""
    shares = np.cumsum([mixed.fraction for mixed in data.mixed])
    ends = [int(end) for end in shares * size + rng.random()]  # the mean of a count is exactly fraction * size
    rows = rng.permutation(size) if shuffled else np.arange(size)  # no row of a stream always has one
    return [rows[start:end] for start, end in zip([0, *ends], ends)]


def task_of(mixed: MixedTask) -> Task:
    """Return the task that examples are of. Raises InputError for an unknown one, or bad parameters."""
    return parse(mixed.task, TASKS, "task")


def check_mix(data: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise InputError where an example does not fit into the shortest length, which a run would meet at some step or
    other, or has ids that the model has not."""
    for mixed, name in zip(data.mixed, data.mixed_names, strict=True):
        try:
            task = task_of(mixed)
        except InputError as error:
            raise InputError(f"{name}.task: {error}") from None
        if task.vocab_size is not None and task.vocab_size > vocab_size:
            raise InputError(f"{name}.task: {task} has {task.vocab_size} ids, and the model {vocab_size}")
        for seed in range(TRIES if mixed.fraction else 0):
            try:
                example = task.training(mixed.lengths[0], np.random.default_rng(seed), tokenizer)
            except TooShort as error:
                least = f"{mixed.lengths[0]} is too short for prompt and answer"
                raise InputError(f"{name}.lengths: {least} ({error} beside the answer)") from None
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            if mixed.in_text and example.filler is None:
                raise InputError(f"{name}.in_text: {task.name} has no filler for text to stand in for; set it to false")


def _fill_row(
    placed: Placed, i: int, mixed: MixedTask, task: Task, tokenizer: Tokenizer, rng: np.random.Generator
) -> None:
    """Put examples into row `i`, from its end on."""
    length = placed.ids.shape[1]
    stop = length
    while n := _example_length(mixed, rng, stop - 1, stop == length):
        example = task.training(n, rng, tokenizer)
        at = slice(stop - n, stop)
        placed.ids[i, at], placed.answers[i, at] = example.ids, example.answers
        placed.text[i, at] = example.filler if mixed.in_text and example.filler is not None else False
        stop -= n
        if tokenizer.eos_id is not None:
            stop -= 1
            placed.ids[i, stop], placed.text[i, stop] = tokenizer.eos_id, False


def _example_length(mixed: MixedTask, rng: np.random.Generator, room: int, first: bool) -> int:
    """Return the tokens of a row's next example, from its end on, where `room` are left; 0: it has no more."""
    low, high = mixed.lengths
    if mixed.fill:
        high = min(high, room)
        if high < low:
            return 0
    elif not first:
        return 0
    if (mixed.draw or ("log-uniform" if mixed.fill else "uniform")) == "uniform":
        return int(rng.integers(low, high + 1))
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def measured_task(tasks: Sequence[MixedTask]) -> Task:
    """Return the task that a run is measured by: the first that is mixed in, or else passkeys."""
    return task_of(tasks[0]) if tasks else TASKS["passkey"]()
