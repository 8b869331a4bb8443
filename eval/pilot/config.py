"""What a person asks of a pilot, and how the words of a command line say it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.parsing import parse_recall
from rnn_longctx.tasks.base import Task

USUAL = ("passkey",)


@dataclass(frozen=True)
class PilotConfig:
    """What a pilot is asked.

    Attributes:
        model, text: as the person named them: what they are to type afterwards.
        budget: seconds, of all runs into `out` together.
        lengths: in tokens; None: half the training length, itself and its doublings, as far as the budget goes.
        tasks: that recall is asked by.
        price: of an hour, in the person's own money; None: none.
        with_text: whether texts, questions and answers may stand in what is written.
        options: more words that the person typed to name the model; given_train_length: tokens, where they did.
    Raises:
        InputError: a price below 0.
    """

    model: str
    text: str
    out: str
    budget: float
    lengths: tuple[int, ...] | None = None
    tasks: tuple[Task, ...] = ()
    price: float | None = None
    with_text: bool = False
    options: tuple[str, ...] = ()
    given_train_length: int | None = None
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.price is not None and not (self.price >= 0 and math.isfinite(self.price)):
            raise InputError(f"--price is the price of an hour, at least 0, got {self.price:g}")


def parse_tasks(names: Sequence[str] | None) -> tuple[Task, ...]:
    """Return the tasks of some names, each once; None: the usual one. Raises InputError: a name is of none."""
    return tuple(dict.fromkeys(_task(name) for name in names or USUAL))


def _task(text: str) -> Task:
    """Return a task; questions may be named by their file alone: qa:FILE.jsonl."""
    name, colon, rest = text.strip().partition(":")
    if name == "qa" and colon and not rest.startswith(("file=", "document=")):
        text = f"qa:file={rest}"
    return parse_recall(text).task


def option_words(options: Any) -> tuple[str, ...]:
    """Return each option that is not at its default, and its value. options: `rnn_longctx.cli.options.ModelOptions`."""
    values = {
        "--tokenizer": options.tokenizer,
        "--train-length": options.train_length,
        "--state-dtype": options.state_dtype,
        "--device": options.device if options.device != "auto" else None,
        "--dtype": options.dtype if options.dtype != "float32" else None,
    }
    return tuple(word for option, value in values.items() if value for word in (option, str(value)))
