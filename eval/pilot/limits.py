"""What a pilot needs of a model, a text and tasks, and one line for what cannot be piloted."""

from __future__ import annotations

from collections.abc import Sequence

from rnn_longctx.config import format_length
from rnn_longctx.data import Text
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.eval.pilot.steps import counts, without_document
from rnn_longctx.mitigations import handles_on
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.plain import plain
from rnn_longctx.tasks.base import Task, TooShort

FEWEST = 2  # slices of a text that do not overlap


def checked_train_length(model: LanguageModel) -> int:
    """Return the training length of a model that can be piloted. Raises InputError for another one."""
    if not model.mixers:
        raise InputError(
            f"{model.name} has no recurrent layer, so it has no state that could collapse, and no remedy to choose: "
            "`rnn-longctx eval` measures its loss and recall over length (`--mitigation yarn` stretches rotary "
            "attention), and `rnn-longctx retrofit` puts recurrent layers in the place of attention"
        )
    if model.train_length is None:
        raise InputError(f"{model.name} does not say its training length: give --train-length")
    if handles_on(model):
        raise InputError(f"{model.name} has a remedy on it; a pilot begins with the bare model: take it off")
    return model.train_length


def with_training(lengths: Sequence[int], train_length: int) -> tuple[int, ...]:
    """Return a person's lengths with the training length among them. Raises InputError where none is beyond it."""
    if max(lengths) <= train_length:
        raise InputError(
            f"--lengths: a pilot asks what happens beyond the training length, {format_length(train_length)}; the "
            f"longest given is {format_length(max(lengths))}"
        )
    return tuple(sorted({*lengths, train_length}))


def longest_length(model: LanguageModel, text: Text, train_length: int, named: int | None) -> int:
    """Return the longest length of which the text has two slices side by side. Raises InputError: not of twice the
    training length, or the longest that was named."""
    have, about = text_tokens(model, text)
    needed = 2 * train_length if named is None else named
    least = FEWEST * (needed + 1) if named is None else needed + 1
    if have < least:
        why = f"two stretches of {format_length(needed)} tokens" if named is None else f"{format_length(needed)} tokens"
        raise InputError(
            f"text {text.name} has {about}{have} tokens; a pilot of {model.name}, which was trained on "
            f"{format_length(train_length)}, reads {why}: give it at least {least}"
        )
    return max(needed, have // FEWEST - 1)


def text_tokens(model: LanguageModel, text: Text, sample: int = 1 << 18) -> tuple[int, str]:
    """Return the tokens of a text, counted where it is short or its tokens are bytes, else from the rate of its
    beginning, and "about " in front of a number that was not counted."""
    if model.tokenizer.name == "bytes":
        return len(text), ""
    beginning = text.data[:sample].decode("utf-8", "ignore").encode()
    n = len(model.tokenizer.encode_with_bytes(beginning)[0])
    return (n, "") if len(text) <= sample else (int(n * len(text) / max(1, len(beginning))), "about ")


def with_blind(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks, and those that ask the same without their documents."""
    named = dict.fromkeys(tasks, 0)
    return list({**named, **without_document(named)})


def text_name(task: Task) -> str:
    """Return the text that a task's results are filed under, by its name."""
    return task.text if isinstance(task.text, str) else task.text.name


def least_lengths(
    tasks: Sequence[Task], lengths: Sequence[int], prompts: int, seed: int, tokenizer: Tokenizer
) -> dict[Task, int]:
    """Return the tasks with the shortest of some lengths that all of their prompts fit into.

    Args: prompts: as many as are asked at most.
    Raises:
        InputError: they fit into none; two tasks have one name, by which results and steps are told apart.
    """
    named: dict[str, Task] = {}
    for task in with_blind(tasks):
        if (other := named.setdefault(plain(task.label), task)) != task:
            raise InputError(f"{other} and {task} would both be called {task.label}: rename a file, or ask one of them")
    return {task: _least_length(task, lengths, prompts, seed, tokenizer) for task in tasks}


def _least_length(task: Task, lengths: Sequence[int], prompts: int, seed: int, tokenizer: Tokenizer) -> int:
    why = ""
    for length in lengths:
        try:
            for variant in with_blind([task]):
                variant.check(length, counts(variant, prompts), seed, tokenizer)
            return length
        except TooShort as error:
            why = one_line(error)
    raise InputError(f"{task.label}: not every prompt fits into {format_length(max(lengths))} tokens: {why}")
