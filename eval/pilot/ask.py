"""What a person asks of a pilot, read from the words of a command line and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rnn_longctx.config import parse_length, parse_lengths
from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.parsing import parse_recall
from rnn_longctx.eval.pilot.run import PilotConfig
from rnn_longctx.eval.tune.budget import parse_time
from rnn_longctx.tasks.base import Task

USUAL = ("passkey",)


def ask(
    model: str, text: str, out: str, budget: str, price: float | None, tasks: Sequence[str] | None, lengths: str | None,
    with_text: bool, options: Any,
) -> PilotConfig:  # fmt: skip
    """Return the config that a command line says. options: `rnn_longctx.cli.options.ModelOptions`.

    Raises:
        InputError: a price below 0, and whatever `parse_time`, `parse_lengths` and the tasks refuse.
    """
    if price is not None and not (price >= 0 and math.isfinite(price)):
        raise InputError(f"--price is the price of an hour, at least 0, got {price:g}")
    words = {
        "--tokenizer": options.tokenizer,
        "--train-length": options.train_length,
        "--state-dtype": options.state_dtype,
    }
    words |= {"--device": options.device if options.device != "auto" else None}
    words |= {"--dtype": options.dtype if options.dtype != "float32" else None}
    return PilotConfig(
        model=model,
        text=text,
        out=out,
        budget=parse_time(budget),
        lengths=None if lengths is None else tuple(parse_lengths(lengths)),
        tasks=tuple(dict.fromkeys(_task(name) for name in tasks or USUAL)),
        price=price,
        with_text=with_text,
        options=tuple(word for option, value in words.items() if value for word in (option, str(value))),
        given_train_length=None if options.train_length is None else parse_length(options.train_length),
    )


def _task(text: str) -> Task:
    """Return a task; questions may be named by their file alone: qa:FILE.jsonl."""
    name, colon, rest = text.strip().partition(":")
    if name == "qa" and colon and not rest.startswith(("file=", "document=")):
        text = f"qa:file={rest}"
    return parse_recall(text).task
