"""The table of a comparison of growth: what every entry took at every length, the exponent of its growth, and where it
becomes cheaper than the reference.

An exponent is the slope of the least-squares line through the logarithms of lengths and values: 1 where what is taken
doubles with the length, 2 where it becomes fourfold, 0 where it stays. Its residual is the root mean square of what the
line misses, in natural logs: 0.05 is some 5%.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rnn_longctx.errors import InputError
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text

FILE = "growth.parquet"
MEASURED = ("seconds", "peak_bytes", "carry_bytes")
FITTED = tuple(f"{name}_{what}" for name in MEASURED for what in ("exponent", "residual", "cheaper_from"))
# `segment` none: all in one call. `times_reference`: its seconds over those of the reference; `times_floor`:
# over those of the operations of its matrix products. `_cheaper_from`: tokens from which on the entry takes less than
# the reference, between two measured lengths by the line through their logarithms; the shortest where it always does.
# `joules`: of one reading, none where they cannot be read; `cost`: its seconds times the price of the device.
KEY = ("entry", "mixer", "parameters", "what", "length", "segment")
COLUMNS = (
    *KEY, *MEASURED, "tokens_per_second", "joules", "cost", "operations", "floor_seconds", "times_floor",
    "times_reference", "reference", "fit_from", *FITTED, "dtype", "device", "versions", "note",
)  # fmt: skip
LATER = ("joules", "cost")  # which tables of an older version lack
INTS = ("parameters", "length", "segment", "fit_from")

Row = dict[str, Any]


class Fit(NamedTuple):
    """A line through logarithms: its slope, and the root mean square of what it misses; NaN of fewer than two
    values."""

    exponent: float
    residual: float


def fit(values: Mapping[int, float]) -> Fit:
    """Return how values grow with their keys; those that are not above 0 are no part of it."""
    points = {length: value for length, value in values.items() if value > 0 and math.isfinite(value)}
    if len(points) < 2:
        return Fit(math.nan, math.nan)
    x, y = np.log(list(points)), np.log(list(points.values()))
    slope, offset = np.polyfit(x, y, 1)
    return Fit(float(slope), float(np.sqrt(np.mean((y - slope * x - offset) ** 2))))


def cheaper_from(values: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """Return the tokens from which on values are below those of the reference, NaN where at the longest length that
    both have they are not."""
    lengths = sorted(n for n in values if n in reference and values[n] > 0 and reference[n] > 0)
    gaps = [math.log(values[n] / reference[n]) for n in lengths]
    if not gaps or not gaps[-1] < 0:
        return math.nan
    last = max((i for i, gap in enumerate(gaps) if gap >= 0), default=None)
    if last is None:
        return float(lengths[0])
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    return float(lengths[last] * (lengths[last + 1] / lengths[last]) ** share)


def summarised(rows: Iterable[Row], fit_from: int, reference: str, price: float | None = None) -> pd.DataFrame:
    """Return the table of what was measured. Its `times_reference` is 1 for the reference itself. price: of an hour of
    the device."""
    every: list[Row] = [dict.fromkeys(COLUMNS) | {"reference": reference, "fit_from": fit_from} | row for row in rows]
    for row in every:
        of_reference = _values(every, reference, row["what"], "seconds")
        row["times_reference"] = row["seconds"] / of_reference.get(row["length"], math.nan)
        row["cost"] = math.nan if price is None else row["seconds"] * price / 3600
        row["times_floor"] = row["seconds"] / (row["floor_seconds"] or math.nan)
        for name in MEASURED:
            values = _values(every, row["entry"], row["what"], name)
            line = fit({length: value for length, value in values.items() if length >= fit_from})
            row[f"{name}_exponent"], row[f"{name}_residual"] = line
            others = _values(every, reference, row["what"], name)
            cheaper = math.nan if row["entry"] == reference else cheaper_from(values, others)
            row[f"{name}_cheaper_from"] = cheaper
    frame = pd.DataFrame(every, columns=list(COLUMNS))
    for column in INTS:
        frame[column] = frame[column].astype("Int64")
    for column in (*MEASURED, *FITTED, *LATER, "operations", "times_floor", "times_reference"):
        frame[column] = frame[column].astype(float)
    return frame


def _values(rows: Sequence[Row], entry: str, what: str, name: str) -> dict[int, float]:
    of = [row for row in rows if row["entry"] == entry and row["what"] == what]
    return {row["length"]: row[name] for row in of if math.isfinite(row[name])}


def write(frame: pd.DataFrame, folder: Path) -> None:
    """Write growth.parquet and growth.csv."""
    parquet = io.BytesIO()
    frame.to_parquet(parquet, index=False)
    write_atomic(folder / FILE, parquet.getvalue())
    write_atomic(folder / "growth.csv", csv_text(frame).encode())


def read(folder: Path) -> pd.DataFrame:
    """Return the table of a folder. Raises InputError: there is none that can be read."""
    try:
        frame = pd.read_parquet(folder / FILE)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / FILE}: {' '.join(str(error).split())}") from None
    frame = frame.assign(**{column: math.nan for column in LATER if column not in frame})
    if lacking := [column for column in COLUMNS if column not in frame]:
        raise InputError(f"{folder / FILE} has no column {', '.join(lacking)}")
    return frame
