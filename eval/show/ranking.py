"""The leaderboard as rich tables."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import format_length
from rnn_longctx.eval.tables.leaderboard import LEADERBOARD, NO_NUMBER, leaderboard


def board_tables(frame: pd.DataFrame) -> list[RenderableType]:
    """Return the leaderboard of the longest length of each model and text, for a terminal."""
    board = leaderboard(frame)
    if board.empty:
        return []
    tables: list[RenderableType] = []
    for (model, text), some in board.groupby(["model", "text"], sort=False):
        length = some["length"].max()
        rows = some[some["length"] == length]
        tasks = [str(c) for c in board if c not in LEADERBOARD]
        costs = [c for c in ("speed", "memory") if rows[c].notna().any()]
        grid = Table(box=None, pad_edge=False)
        grid.add_column("mitigation", overflow="fold", max_width=44)
        for head in ("loss", "gain", "95%", "short", *tasks, *costs, "wins"):
            grid.add_column(head, justify="left" if head == "wins" else "right")
        for _, row in rows.iterrows():
            name = Text(row["mitigation"] + (" (control)" if row["control"] else ""), "dim" if row["control"] else "")
            span = "" if math.isnan(row["gain_low"]) else f"{row['gain_low']:+.3f} {row['gain_high']:+.3f}"
            ranked = not row["control"] and row["mitigation"] != "none"  # the bare model neither wins nor fails
            ends = Text((row["wins"] or "nothing") if ranked else "", "" if row["wins"] else "red")
            if row["wins"] == NO_NUMBER:
                ends = Text(NO_NUMBER, "red")
            loss, gain, short = (
                _text(row["loss"], ".3f"),
                _text(row["gain"], "+.3f"),
                _text(row["change_short"], "+.3f"),
            )
            grid.add_row(name, loss, gain, span, short, *(_text(row[t], ".2f") for t in (*tasks, *costs)), ends)
        where = f"{model} on {text} at {format_length(int(length))}"
        title = f"{where}: gain over the best control in nats per token, and wins"
        tables += [Text(title, style="bold"), grid, Text("")]
    return tables


def _text(value: Any, form: str) -> str:
    return "" if value is None or pd.isna(value) else format(float(value), form)
