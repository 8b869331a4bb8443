"""The table of a comparison: a row an entry, metric, length and seed, and rows of all seeds together with intervals;
context gain and verdicts follow from what was measured.

A verdict is of the loss without a remedy, at the lengths beyond the training length T that were measured:

    collapses   at some length the loss is over twice the highest within T, in more than half of the seeds
    drifts      it does not, but at some length its loss is surely over 1% above that of reading the last T tokens
                afresh (`recompute:last=T`): the 95% interval of the difference, over seeds and slices, lies beyond
    holds       neither
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rnn_longctx.config import format_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.forget import forget_of
from rnn_longctx.eval.stats import Interval, crossed, peak_within, verdict, wilson
from rnn_longctx.files import write_atomic

FILE = "compare.parquet"
# `seed` none: of all seeds together, whose number is `seeds`. `state`: numbers that a row keeps between two tokens once
# it has read the training length. `depth`: of `recovery`, the accuracy of the answers that stand there. `low`, `high`:
# the 95% interval of `value`; `n`: the slices or prompts of a seed.
MODEL = ("entry", "mixer", "parameters", "state", "learning_rate", "train_length")
PLACE = ("metric", "mitigation", "task", "text", "length", "depth")
COLUMNS = (*MODEL, *PLACE, "seed", "value", "low", "high", "n", "seeds", "samples", "note")
INTS = ("parameters", "state", "train_length", "length", "seed", "n", "seeds")
DRIFT = 0.01  # of the loss of recomputing
DEFINITION = (
    "collapses: beyond the training length T the loss somewhere exceeds twice the highest within T, in most seeds; "
    "drifts: it does not, but somewhere the loss is surely over 1% above that of reading the last T tokens afresh "
    "(95% interval of the paired difference, over seeds and slices); holds: neither."
)
ONCE = ("held_out_loss", "held_out_recall", "not_applicable")  # metrics of one model, or of none

Row = dict[str, Any]


class Judged(NamedTuple):
    """A verdict: collapses, drifts, holds or, where a loss within the training length is no number, unknown; the length
    from which, or None; and in words."""

    kind: str
    length: int | None
    text: str


def summarised(rows: Iterable[Row], train_length: int) -> pd.DataFrame:
    """Return the table of the rows of all cells: what they hold, with intervals, the context gains, the rows of all
    seeds together, verdicts and T_forget."""
    blank: Row = dict.fromkeys(COLUMNS) | {"mitigation": "none", "task": "", "text": "", "note": "", "value": math.nan}
    every = [blank | row | {"seeds": 1} for row in rows]
    for row in every:
        row |= _interval(row["metric"], [row["samples"]] if row["samples"] else [])
    every += _gains(every)
    every += [row for _, some in _groups(every, ("entry", "train_length")) for row in _together(list(some))]
    every += [row for _, some in _groups(every, ("entry",)) for row in _verdicts(list(some), train_length)]
    frame = pd.DataFrame(every, columns=list(COLUMNS))
    for column in COLUMNS:
        if column in INTS:
            frame[column] = frame[column].astype("Int64")
    return frame


def control(train_length: int) -> str:
    """Return the remedy that context gain is counted against: the last tokens of the training length read afresh."""
    return f"recompute:last={train_length}"


def judge(
    losses: Mapping[int, float], peak: float | None, gains: Mapping[int, Interval], again: Mapping[int, float], T: int
) -> Judged:
    """Return the verdict on one model.

    Args:
        losses: by length; peak: the highest within the training length T, where it was measured.
        gains: context gain over reading the last T tokens afresh; again: the loss of that.
    """
    plain = verdict(list(losses), list(losses.values()), T, peak)
    if plain.first_failing is not None:
        return Judged("collapses", plain.first_failing, plain.text)
    if (known := peak_within(list(losses), list(losses.values()), T, peak)) is None or not math.isfinite(known):
        return Judged("unknown", None, plain.text)
    if max(losses) <= T:
        return Judged("unknown", None, plain.text)
    for length in sorted(gains):
        if length > T and gains[length].high < -DRIFT * again[length]:
            return Judged("drifts", length, f"drifts from {format_length(length)} on ({gains[length].value:+.3f})")
    return Judged("holds", None, f"holds up to {format_length(max(losses))}")


def judge_seeds(seeds: Sequence[Judged], together: Judged) -> Judged:
    """Return the verdict on an entry: that of most of its seeds on collapse, else that on all seeds together, which is
    of their mean losses."""
    failing = sorted(j.length for j in seeds if j.kind == "collapses" and j.length is not None)
    count = f"{len(failing)} of {len(seeds)} seeds"
    if 2 * len(failing) > len(seeds):
        length = failing[len(seeds) // 2]  # where more than half have failed
        return Judged("collapses", length, f"collapses at {format_length(length)} ({count})")
    if any(j.kind == "unknown" for j in seeds):
        return next(j for j in seeds if j.kind == "unknown")
    kind = together if together.kind != "collapses" else Judged("holds", None, "holds in most seeds")
    return kind._replace(text=kind.text + (f"; {count} collapse" if failing else ""))


def passes(rows: Sequence[Row], train_length: int) -> bool:
    """Whether one model holds its loss beyond its training length: the test of T_forget, on the first text."""
    return _plain_verdict(rows, train_length).kind in ("holds", "drifts")


def write(frame: pd.DataFrame, folder: Path) -> None:
    """Write compare.parquet and compare.csv, in which `samples` is JSON."""
    parquet = io.BytesIO()
    frame.to_parquet(parquet, index=False)
    write_atomic(folder / FILE, parquet.getvalue())
    samples = frame["samples"].map(lambda s: None if s is None or not len(s) else json.dumps(list(s)))
    write_atomic(
        folder / "compare.csv", frame.assign(samples=samples).to_csv(index=False, lineterminator="\n").encode()
    )


def read(folder: Path) -> pd.DataFrame:
    """Return the table of a folder. Raises InputError: there is none that can be read."""
    try:
        frame = pd.read_parquet(folder / FILE)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / FILE}: {' '.join(str(error).split())}") from None
    if missing := [column for column in COLUMNS if column not in frame]:
        raise InputError(f"{folder / FILE} has no column {', '.join(missing)}")
    return frame


def of_all_seeds(frame: pd.DataFrame, metric: str, **where: Any) -> pd.DataFrame:
    """Return the rows of a metric that are of all seeds together, of the shortest training length."""
    shortest = frame["train_length"] == frame["train_length"].min()
    some = frame[(frame["metric"] == metric) & frame["seed"].isna() & shortest]
    for column, value in where.items():
        some = some[some[column] == value]
    return some


def _interval(metric: str, samples: Sequence[Sequence[float]]) -> Row:
    """Return low, high and n; of answers never narrower than Wilson's of the answers of one seed."""
    if not samples:
        return {"low": math.nan, "high": math.nan, "n": None}
    _, low, high, n = crossed(samples)
    if metric in ("accuracy", "recovery"):
        least = wilson(sum(map(sum, samples)) / len(samples), n)
        low, high = (f(a, b) for f, a, b in ((_least, low, least.low), (_most, high, least.high)))
        low, high = max(0.0, low), min(1.0, high)
    return {"low": low, "high": high, "n": n}


def _least(a: float, b: float) -> float:
    return b if math.isnan(a) else min(a, b)


def _most(a: float, b: float) -> float:
    return b if math.isnan(a) else max(a, b)


def _gains(rows: Sequence[Row]) -> list[Row]:
    """Return the context gain of every loss: that of its `control`, on the same slices, minus it."""
    where = ("entry", "learning_rate", "train_length", "seed", "task", "text", "length")
    losses = [row for row in rows if row["metric"] == "loss"]
    again = {tuple(r[c] for c in where): r for r in losses if r["mitigation"] == control(r["train_length"])}
    gains = []
    for row in losses:
        afresh = again.get(tuple(row[c] for c in where))
        if afresh is None or afresh is row or not row["samples"] or not afresh["samples"]:
            continue
        samples = [a - b for a, b in zip(afresh["samples"], row["samples"])]  # slice i is the same tokens
        value = sum(samples) / len(samples)
        gains.append(row | {"metric": "gain", "value": value, "samples": samples} | _interval("gain", [samples]))
    return gains


def _together(rows: Sequence[Row]) -> list[Row]:
    """Return a row of all seeds for what was measured of each."""
    out = []
    for _, group in _groups([row for row in rows if row["metric"] not in ONCE], PLACE):
        some = list(group)
        row = some[0] | {"seed": None, "seeds": len(some), "samples": None, "note": ""}
        if all(r["samples"] for r in some):
            n = min(len(r["samples"]) for r in some)
            samples = [list(r["samples"][:n]) for r in some]
            value = sum(map(sum, samples)) / (n * len(samples))
            out.append(row | {"value": value} | _interval(row["metric"], samples))
        else:
            values = [r["value"] for r in some if not math.isnan(r["value"])]  # none has left its range: no onset
            if not values:
                continue
            low, high = crossed([[v] for v in values])[1:3]
            out.append(row | {"value": sum(values) / len(values), "low": low, "high": high, "n": None})
    return out


def _verdicts(rows: Sequence[Row], train_length: int) -> list[Row]:
    """Return the verdicts on one entry, of each text: a row a seed, and of all; and its T_forget."""
    blank = dict.fromkeys(COLUMNS) | {c: rows[0][c] for c in MODEL} | {"mitigation": "none", "task": "", "text": ""}
    out = []
    measured = [row for row in rows if row["metric"] in ("loss", "loss_peak", "gain")]
    base = [row for row in measured if row["train_length"] == train_length]
    for text in dict.fromkeys(row["text"] for row in base):
        of = [row for row in base if row["text"] == text]
        blank |= {c: of[0][c] for c in MODEL} | {"text": text}
        by_seed = {s: list(some) for (s,), some in _groups([r for r in of if r["seed"] is not None], ("seed",))}
        judged = {seed: _judged(some, train_length) for seed, some in by_seed.items()}
        whole = judge_seeds(list(judged.values()), _judged([r for r in of if r["seed"] is None], train_length))
        for seed, one in [*judged.items(), (None, whole)]:
            more = {"metric": "verdict", "seed": seed, "seeds": 1 if seed is not None else len(judged)}
            out.append(blank | more | {"value": math.nan, "length": one.length, "note": one.text, "task": one.kind})
    outcomes: dict[tuple[int, int], bool] = {}
    alone = [row for row in measured if row["seed"] is not None]
    for (length, seed), some in _groups(alone, ("train_length", "seed")):
        outcomes[length, seed] = _plain_verdict(list(some), length).kind in ("holds", "drifts")
    if (forget := forget_of(outcomes)) is not None:
        value = math.nan if forget.passes is None else float(forget.passes)
        out.append(
            blank | {"metric": "T_forget", "text": "", "value": value, "note": str(forget), "seeds": len(outcomes)}
        )
    return out


def _judged(rows: Sequence[Row], train_length: int) -> Judged:
    bare = [row for row in rows if row["mitigation"] == "none"]
    losses = {row["length"]: row["value"] for row in bare if row["metric"] == "loss"}
    peaks = [row["value"] for row in bare if row["metric"] == "loss_peak" and row["length"] == train_length]
    gains = {r["length"]: Interval(r["value"], r["low"], r["high"], r["n"]) for r in bare if r["metric"] == "gain"}
    afresh = control(train_length)  # (remedies may be measured beside a control that reads more)
    again = {r["length"]: r["value"] for r in rows if r["metric"] == "loss" and r["mitigation"] == afresh}
    if not losses:
        return Judged("unknown", None, "no loss was measured")
    return judge(losses, peaks[0] if peaks else None, gains, again, train_length)


def _plain_verdict(rows: Sequence[Row], train_length: int) -> Judged:
    """Return the verdict on one model by the first text alone, and without a look at drift."""
    losses = [row for row in rows if row["metric"] in ("loss", "loss_peak") and row["mitigation"] == "none"]
    first = losses[0]["text"] if losses else ""
    return _judged([row for row in losses if row["text"] == first], train_length)


def _groups(rows: Sequence[Row], columns: Sequence[str]) -> Iterable[tuple[tuple[Any, ...], Iterable[Row]]]:
    """Yield the rows that agree in some columns, in the order in which the first of each stands."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[c] for c in columns)

    order = {k: i for i, k in enumerate(dict.fromkeys(map(key, rows)))}
    return groupby(sorted(rows, key=lambda row: order[key(row)]), key)
