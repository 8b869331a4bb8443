"""The page of a comparison of growth: seconds and bytes over length, and where an entry becomes cheaper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from rnn_longctx.config import counted, format_length
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import INK, Line, lengths_axis, look, number
from rnn_longctx.eval.show.page.parts import KINDS, Figure, Kind, Page, Section, Table
from rnn_longctx.eval.tables.growth import FILE, read

_WHAT = {
    "forward": "Reading with one mixer", "prefill": "Reading a prompt", "decode": "Generating a token",
}  # fmt: skip
_VALUES = {
    "seconds": ("Seconds", "seconds"),
    "peak_bytes": ("Most memory", "bytes at once, beyond weights and inputs"),
    "carry_bytes": ("Kept for the next token", "bytes"),
}  # fmt: skip
_ABOUT = {"device": "device", "dtype": "computed in", "versions": "versions", "reference": "compared with"}


def fits(path: Path) -> bool:
    return (path / FILE).is_file()


def page(path: Path) -> Page:
    """Return the page of a comparison of growth. Raises InputError: its table cannot be read."""
    frame = read(path)
    if frame.empty:
        return Page("Growth with the length", ["No entry is measured yet."], {}, [])
    first = frame.iloc[0]
    header = {name: str(first[column]) for column, name in _ABOUT.items()}
    header |= {"fitted from": format_length(int(first["fit_from"])), "entries": str(frame["entry"].nunique())}
    sections = [
        Section(
            _WHAT.get(str(what), str(what)),
            [curve(rows, str(what), name) for name in _VALUES if rows[name].notna().any()],
        )
        for what, rows in frame.groupby("what", sort=False)
    ]
    note = (
        "exponent: the slope of a line through logarithms, 1 where what is taken doubles with the length, 2 where it "
        "becomes fourfold; residual: what the line misses, 0.05 is some 5%; cheaper_from: tokens from which on less is "
        "taken than by what it is compared with."
    )
    every = Table("Every row", frame.dropna(axis=1, how="all"), note)
    title = f"How time and memory of {counted(frame['entry'].nunique(), 'entry', 'entries')} grow with the length"
    return Page(title, verdict(frame), header, [*sections, Section("All that was measured", [every])])


def verdict(frame: pd.DataFrame) -> list[str]:
    """Return a line an entry and thing measured: how seconds and bytes grow, how surely, and where it is cheaper."""
    lines = []
    for (what, entry), rows in frame.groupby(["what", "entry"], sort=False):
        last = rows[rows["seconds"].notna()].tail(1)
        if last.empty:
            continue
        row = last.iloc[0]
        clauses = []
        for name, words in (("seconds", "time"), ("peak_bytes", "memory")):
            exponent, residual = row[f"{name}_exponent"], row[f"{name}_residual"]
            if math.isfinite(exponent):
                off = f"within {100 * residual:.2g}%" if math.isfinite(residual) else "of two points"
                clauses.append(f"{words} grows as length^{exponent:.2f} ({off})")
        if entry != row["reference"]:
            cheaper = row["seconds_cheaper_from"]
            there = f"faster than {row['reference']} from {cheaper:,.0f} tokens on"
            clauses.append(
                there if math.isfinite(cheaper) else f"not faster than {row['reference']} at any length measured"
            )
        lines.append(f"{entry}, {_WHAT.get(str(what), str(what)).lower()}: {'; '.join(clauses)}.")
    return lines or ["No entry is measured to the end yet."]


def curve(rows: pd.DataFrame, what: str, name: str) -> Figure:
    """Return one thing's seconds or bytes over length, a line an entry; what they are compared with in ink."""
    title, unit = _VALUES[name]
    reference, of, others = rows["reference"].iloc[0], [], 0
    for entry, some in rows[rows[name] > 0].groupby("entry", sort=False):
        how: dict[str, Any] = {"colour": INK} if entry == reference else look(others)
        others += entry != reference
        some = some.sort_values("length")
        of.append(Line(str(entry), [int(n) for n in some["length"]], some[name].tolist(), **how))
    values = [v for line in of for v in line.y]
    x, y = lengths_axis([n for line in of for n in line.x]), figures.values_axis(values, unit, log=True)
    texts = [f"{line.name} {number(line.y[-1])} {unit.split()[0]} at {format_length(int(line.x[-1]))}" for line in of]
    table = rows[["entry", "length", "segment", name, f"{name}_exponent", f"{name}_residual"]]
    return figures.lines(f"{title}: {_WHAT.get(what, what).lower()}", f"{', '.join(texts)}.", table, of, x, y)


KINDS.register(Kind("growth", fits, page))
