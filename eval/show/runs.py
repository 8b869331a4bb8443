"""What changed between two runs, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import counted, format_length
from rnn_longctx.eval.tables.runs import SURE, Changes

CHANCE = 0.05  # of cells that did not change, the share whose 95% interval leaves out 0
PARTS = ("nats_per_byte", "nats_per_token_peak", "loss_peak")  # the same pass, said in another way
STYLES = {"better": "green", "worse": "bold red", "changed": "bold", "higher": "bold", "lower": "bold"}


def tables(changes: Changes) -> list[RenderableType]:
    """Return the differences above the cells, the cells by metric, those of one run alone, and a line that sums up."""
    pieces: list[RenderableType] = []
    if len(changes.header):
        pieces += [Text("not the same above the cells", style="bold"), _header(changes.header), Text("")]
    whole = changes.cells[changes.cells["depth"].isna() & ~changes.cells["metric"].isin(PARTS)]
    for metric in dict.fromkeys(whole["metric"]):
        some = whole[whole["metric"] == metric]
        everywhere = some["differs"].iloc[0] if some["differs"].nunique() == 1 else ""
        notes = [Text(f"in all cells {everywhere}", style="dim")] if everywhere else []
        pieces += [Text(f"{metric}: A, B and B - A", style="bold"), *notes, _cells(some), Text("")]
    for name, only in (("A", changes.only_a), ("B", changes.only_b)):
        if len(only):
            pieces += [Text(f"only in {name}: {counted(len(only), 'cell')}", style="bold"), _only(only), Text("")]
    return [*pieces, Text(in_words(changes), style="bold")]


def in_words(changes: Changes) -> str:
    """Return how many cells changed for better or worse, and what of that is chance."""
    cells = changes.cells
    if cells.empty:
        return "the runs have no cell in common"
    counts = [(verdict, changes.count(verdict)) for verdict in dict.fromkeys([*SURE, "changed"])]
    sure = ", ".join(f"{n} {verdict}" for verdict, n in counts if n) or "none surely changed"
    still = [("unclear", "not surely changed"), ("same", "the same to the last digit")]
    rest = [f"{n} {text}" for verdict, text in still if (n := changes.count(verdict))]
    alone = [(v, changes.count(v)) for v in ("one sample", "not paired", "no number")]
    rest += [f"{n} without an interval ({verdict})" for verdict, n in alone if n]
    line = f"of {counted(len(cells), 'cell')} in both: {'; '.join([sure, *rest])}"
    judged = changes.count("unclear", *SURE)
    if judged >= 1 / CHANCE:
        line += f". Of {judged} that had not changed, about {judged * CHANCE:.0f} would be called changed by chance"
    return line


def _header(header: pd.DataFrame) -> Table:
    grid = _grid(("what", "A", "B"))
    for row in header.to_dict("records"):
        grid.add_row(Text(row["what"]), Text(row["a"] or "not said"), Text(row["b"] or "not said"))
    return grid


def _cells(cells: pd.DataFrame) -> Table:
    """Columns in which all cells agree are left out, but for the remedy and the length."""
    said = ["mitigation", "length"]
    said += [c for c in ("model", "task", "text", "train_length", "seed") if cells[c].nunique(dropna=False) > 1]
    words = cells["change"].isna().all() and cells["a"].map(lambda v: isinstance(v, str) or v is None).any()
    numbers = ("A", "B", "") if words else ("A", "B", "B - A", "95% interval", "n", "")
    notes = [c for c in ("differs",) if cells[c].nunique() > 1]  # what differs in all cells stands above the table
    speed = [] if cells["speed"].isna().all() else ["speed"]
    grid = _grid(
        (*said, *numbers, *speed, *notes), right=("A", "B", "B - A", "n", "speed", "length") if not words else ()
    )
    for row in cells.to_dict("records"):
        place = [_place(c, row[c]) for c in said]
        verdict = Text(row["verdict"], STYLES.get(row["verdict"], "dim"))
        if words:
            values = [str(row["a"] or "-"), str(row["b"] or "-")]
        else:
            span = "" if pd.isna(row["low"]) else f"{row['low']:+.4f} {row['high']:+.4f}"
            n = "" if pd.isna(row["n"]) or not row["n"] else str(row["n"])
            values = [f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['change']:+.4f}", span, n]
        rate = [Text("" if pd.isna(row["speed"]) else f"{row['speed']:.2f} x") for _ in speed]
        grid.add_row(*map(Text, [*place, *values]), verdict, *rate, *(Text(row[c], "dim") for c in notes))
    return grid


def _only(cells: pd.DataFrame) -> Table:
    """A line for each model, remedy, task and metric, with its lengths."""
    grid = _grid(("model", "mitigation", "task", "text", "metric", "lengths"))
    named = ["model", "mitigation", "task", "text", "metric"]
    for _, some in cells.groupby(named, dropna=False, sort=False):
        lengths = ", ".join(format_length(int(n)) for n in sorted(some["length"].dropna().unique()))
        grid.add_row(*(Text(_place(c, some[c].iloc[0])) for c in named), Text(lengths))
    return grid


def _grid(columns: Iterable[str], right: Iterable[str] = ()) -> Table:
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return grid


def _place(column: str, value: Any) -> str:
    if pd.isna(value):
        return ""
    return format_length(int(value)) if column in ("length", "train_length") else str(value)
