"""What the models of a comparison took: to be trained, and to read and generate."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import format_length
from rnn_longctx.eval.show.style import size

_TRAINING = {
    "train_tokens": "tokens", "train_seconds": "seconds", "train_joules": "joules", "train_cost": "cost",
    "score_tokens": "to the score: tokens", "score_seconds": "seconds", "score_cost": "cost",
}  # fmt: skip
_READING = {
    "tokens_per_second": "tokens/s", "first_token_seconds": "first token, s", "next_token_seconds": "next token, s",
    "peak_bytes": "most memory", "carry_bytes": "kept", "first_token_joules": "first token, J",
    "next_token_joules": "next token, J", "first_token_cost": "cost of the first", "next_token_cost": "of the next",
}  # fmt: skip
_SIZES = ("peak_bytes", "carry_bytes")


def cost_tables(frame: pd.DataFrame) -> list[RenderableType]:
    """Return a table of training and one of reading by length, entries as rows, the mean of seeds; columns of which
    nothing is known are left out, and so is a table of which nothing is."""
    alike = frame["seed"].isna() & (frame["train_length"] == frame["train_length"].min())
    pieces: list[RenderableType] = []
    for title, heads in (("Training, a seed", _TRAINING), ("Reading one prompt, and a token after it", _READING)):
        rows = frame[alike & frame["metric"].isin(heads)]
        by_length = heads is _READING
        metrics = [metric for metric in heads if rows.loc[rows["metric"] == metric, "value"].notna().any()]
        if not metrics:
            continue
        grid = Table(box=None, pad_edge=False)
        grid.add_column("entry")
        for head in (*(["length"] if by_length else []), *(heads[metric] for metric in metrics)):
            grid.add_column(head, justify="right", overflow="fold")
        for (entry, length), some in rows.groupby(["entry", "length"], sort=False, dropna=False):
            values = dict(zip(some["metric"], some["value"]))
            cells = [_form(metric)(values[metric]) if metric in values else "" for metric in metrics]
            grid.add_row(str(entry), *([format_length(int(length))] if by_length else []), *cells)
        pieces += [Text(title, style="bold"), grid, Text("")]
    return pieces


def _form(metric: str) -> Callable[[float], str]:
    if metric in _SIZES:
        return size
    form = "{:,.0f}" if metric.endswith("_tokens") or metric == "tokens_per_second" else "{:.3g}"
    return lambda value: "" if math.isnan(value) else "not reached" if math.isinf(value) else form.format(value)
