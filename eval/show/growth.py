"""The table of a comparison of growth as a person sees it: printed, and as a page of plots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import format_length
from rnn_longctx.eval.show.style import COLOURS, GREYS, GRID, MARKERS, size, write

_TITLES = {
    "forward": "Reading with one mixer", "prefill": "Reading a prompt", "decode": "Generating a token",
}  # fmt: skip
_PANELS = {"seconds": "seconds", "peak_bytes": "most bytes at once", "carry_bytes": "bytes kept for the next token"}


def tables(frame: pd.DataFrame) -> list[RenderableType]:
    """Return, of each thing that was measured, a table of seconds and one of bytes, entries as rows."""
    if frame.empty:
        return [Text("no entry is measured yet")]
    pieces: list[RenderableType] = []
    for what, rows in frame.groupby("what", sort=False):
        first = rows.iloc[0]
        where = f"{first['device']}, {first['dtype']}, one row"
        pieces += [Text(f"{_TITLES.get(str(what), what)}: seconds by length ({where})", style="bold"), _seconds(rows)]
        pieces += [Text(""), Text("Most bytes held at once beyond weights and inputs, by length", style="bold")]
        pieces += [_bytes(rows), Text("")]
    pieces.append(Text(_legend(frame), style="dim"))
    pieces += [Text(f"{row['entry']} at {format_length(row['length'])}: {row['note']}", style="dim")
               for _, row in frame[frame["note"] != ""].iterrows()]  # fmt: skip
    return pieces


def _legend(frame: pd.DataFrame) -> str:
    reference, first = frame["reference"].iloc[0], int(frame["fit_from"].iloc[0])
    return (
        f"exponent: of a least-squares line through logarithms, from {format_length(first)} on, with the root mean "
        f"square of what it misses; faster: {reference}'s seconds over these, at the longest length that both have; "
        f"cheaper from: the length from which on less is taken than by {reference}; of floor: seconds over those of "
        "its matrix products at the device's rate, at the longest length; kept: for the next token, there"
        + ("; joules: of the whole device" if frame["joules"].notna().any() else "")
        + ("; cost: seconds times the price of an hour" if frame["cost"].notna().any() else "")
    )


def _entries(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for entry, of_entry in rows.groupby("entry", sort=False):
        yield str(entry), of_entry.sort_values("length")


def _grid(*heads: str) -> Table:
    grid = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for i, head in enumerate(heads):
        grid.add_column(head, justify="left" if i < 2 else "right", overflow="fold")
    return grid


def _seconds(rows: pd.DataFrame) -> Table:
    lengths = sorted(int(n) for n in rows["length"].unique())
    spent = [name for name in ("joules", "cost") if rows[name].notna().any()]
    heads = ("tokens/s", "exponent", "faster", "cheaper from", "of floor", *spent)
    grid = _grid("entry", "read in", *map(format_length, lengths), *heads)
    for entry, of_entry in _entries(rows):
        values = dict(zip(of_entry["length"], of_entry["seconds"]))
        known = of_entry[of_entry["seconds"].notna()]
        last = of_entry.iloc[-1] if known.empty else known.iloc[-1]
        faster = of_entry[of_entry["times_reference"].notna()]
        grid.add_row(
            entry,
            _segment(last["segment"]),
            *(_number(values.get(n, math.nan), "{:.3g}") for n in lengths),
            _number(last["tokens_per_second"], "{:,.0f}"),
            _exponent(last, "seconds"),
            "" if faster.empty else f"{1 / faster['times_reference'].iloc[-1]:.3g}x",
            _length(last["seconds_cheaper_from"]),
            _number(last["times_floor"], "{:.2f}"),
            *(_number(last[name], "{:.3g}") for name in spent),
        )
    return grid


def _bytes(rows: pd.DataFrame) -> Table:
    lengths = sorted(int(n) for n in rows["length"].unique())
    heads = ("exponent", "cheaper from", "kept", "exponent", "cheaper from")
    grid = _grid("entry", "read in", *map(format_length, lengths), *heads)
    for entry, of_entry in _entries(rows):
        values = dict(zip(of_entry["length"], of_entry["peak_bytes"]))
        known = of_entry[of_entry["seconds"].notna()]
        last = of_entry.iloc[-1] if known.empty else known.iloc[-1]
        grid.add_row(
            entry,
            _segment(last["segment"]),
            *(size(values.get(n, math.nan)) for n in lengths),
            _exponent(last, "peak_bytes"),
            _length(last["peak_bytes_cheaper_from"]),
            size(last["carry_bytes"]),
            _exponent(last, "carry_bytes"),
            _length(last["carry_bytes_cheaper_from"]),
        )
    return grid


def _segment(segment: object) -> str:
    return "one call" if pd.isna(segment) else f"segments of {format_length(int(segment))}"  # type: ignore[call-overload]


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def _exponent(row: pd.Series, name: str) -> str:
    exponent, residual = row[f"{name}_exponent"], row[f"{name}_residual"]
    return "" if math.isnan(exponent) else f"{round(exponent, 2) + 0.0:.2f} ({residual:.2f})"


def _length(tokens: float) -> str:
    if math.isnan(tokens):
        return ""
    if tokens % 1024 == 0 or tokens < 1024:
        return format_length(round(tokens))
    return f"{tokens / 1024:.3g}K"


def draw(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw seconds and bytes over length, a row of panels for each thing that was measured: growth.png and growth.pdf.
    Returns the paths; none where nothing is measured."""
    if frame.empty:
        return []
    kinds = list(dict.fromkeys(frame["what"]))
    figure = Figure(figsize=(12.0, 0.9 + 3.6 * len(kinds) + 0.06 * frame["entry"].nunique()), layout="constrained")
    panels = figure.subplots(len(kinds), len(_PANELS), squeeze=False)
    for line, what in zip(panels, kinds):
        for panel, (name, title) in zip(line, _PANELS.items()):
            _panel(panel, frame[frame["what"] == what], name)
            panel.set_title(f"{_TITLES.get(what, what)}: {title}", fontsize=9, loc="left")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    first = frame.iloc[0]
    figure.suptitle(
        f"Growth with the length, tokens ({first['device']}, {first['dtype']})", fontsize=10, x=0.01, ha="left"
    )
    path = folder / "growth.pdf"
    figure.savefig(path)
    return [write(figure, folder / "growth.png"), path]


def _panel(axes: Axes, rows: pd.DataFrame, name: str) -> None:
    """Draw a line an entry; the reference black, the lengths of the fit on white."""
    reference = rows["reference"].iloc[0]
    others = [entry for entry in dict.fromkeys(rows["entry"]) if entry != reference]
    for entry, of_entry in _entries(rows):
        i = others.index(entry) if entry != reference else 0
        colour = "black" if entry == reference else COLOURS[i % len(COLOURS)]
        dashes = ("-", "--", ":")[i // len(COLOURS) % 3]
        values = of_entry[name].where(of_entry[name] > 0)
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(
            of_entry["length"],
            values,
            label=entry,
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            linewidth=1.3,
        )
    lengths = sorted(int(n) for n in rows["length"].unique())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.xaxis.set_minor_locator(NullLocator())
    shown = lengths[:: -(-len(lengths) // 6)]
    axes.set_xticks(shown, [format_length(n) for n in shown])
    axes.axvspan(lengths[0], max(lengths[0], int(rows["fit_from"].iloc[0])), color=GREYS[2], alpha=0.15, linewidth=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
