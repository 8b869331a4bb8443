"""The page of a monitor's log, JSON lines: norms against their envelope, the shift of the input, and what happened."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import INK, LINES, Line, is_log, level, number
from rnn_longctx.eval.show.page.parts import KINDS, Figure, Kind, Page, Section, Table
from rnn_longctx.eval.show.page.text import clean

STATUSES = ("ok", "warning", "drift", "collapsed")
FURTHEST = 2**63  # tokens: no position is there, and no table has such a number
BEYOND = "not finite"  # the largest ratio where a state has overflowed; the journal writes null
COLUMNS = ("time", "stream", "position", "status", "outside", "worst", "shift", "action", "heads")


def fits(path: Path) -> bool:
    return path.is_file() and path.suffix == ".jsonl"


def page(path: Path) -> Page:
    """Return the page of a log. Raises InputError: it cannot be read, or holds no report."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    table, unread = reports(text.splitlines())
    if table.empty:
        raise InputError(f"{path} holds no report of a monitor")
    header = {
        "log": path.name,
        "reports": f"{len(table):,}",
        "streams": str(table["stream"].nunique()),
        "first": str(table["time"].iloc[0]),
        "last": str(table["time"].iloc[-1]),
    }
    if unread:
        header["lines that are no report"] = str(unread)
    sections = [
        Section("States and input", drawn(table)),
        Section("Events", [Table("Changes of status, and actions", events(table))]),
        Section("Heads outside their margins", _heads(table)),
        Section("All reports", [Table("Every report", table.drop(columns="heads").assign(worst=_in_words(table)))]),
    ]
    return Page(f"Monitor of {path.stem}", verdict(table), header, [s for s in sections if s.parts])


def report(line: str) -> dict[str, Any] | None:
    """Return one line of a log as a mapping, or None where it is no report."""
    try:
        found = json.loads(line)
        position, status = int(found["position"]), found["status"]
        if status not in STATUSES or not 0 <= position < FURTHEST:
            return None
        heads = [(int(i), int(h), math.inf if r is None else float(r)) for i, h, r in found.get("heads") or []]
        outside, worst, shift = (_number(found.get(name)) for name in ("outside", "worst", "shift"))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    action = found.get("action")
    return {
        "time": clean(found.get("time", "")),
        "position": position,
        "status": status,
        "outside": outside,
        "worst": worst,
        "shift": shift,
        "action": None if action is None else clean(action),
        "heads": heads,
    }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def beyond(status: str, worst: float) -> bool:
    """Return whether a report is of a state so far from its envelope that the ratio is no finite number."""
    return status != "ok" and not math.isfinite(worst)


def _are_beyond(table: pd.DataFrame) -> pd.Series:
    return pd.Series([beyond(s, w) for s, w in zip(table["status"], table["worst"])], table.index, dtype=bool)


def _in_words(table: pd.DataFrame) -> pd.Series:
    """Return the largest ratios for a table: numbers, and BEYOND."""
    return table["worst"].astype(object).mask(_are_beyond(table), BEYOND)


def reports(lines: Iterable[str]) -> tuple[pd.DataFrame, int]:
    """Return the reports of a log, a row each, and how many lines are none. A position that is not above the one before
    begins another stream."""
    rows: list[dict[str, Any]] = []
    unread, stream, last = 0, 1, 0
    for line in lines:
        row = report(line)
        if row is None:
            unread += bool(line.strip())
            continue
        stream, last = stream + (bool(rows) and row["position"] <= last), row["position"]
        rows.append({"stream": stream} | row)
    return pd.DataFrame(rows, columns=list(COLUMNS)), unread


def verdict(table: pd.DataFrame) -> list[str]:
    """Return what the log says: how often which status, where first, and what was done."""
    counts = table["status"].value_counts()
    shares = ", ".join(f"{counts[s]:,} {s} ({counts[s] / len(table):.0%})" for s in STATUSES if s in counts)
    lines = [f"Of {counted(len(table), 'report')}: {shares}."]
    for status in STATUSES[1:]:
        if status in counts:
            first = table[table["status"] == status].iloc[0]
            furthest = BEYOND if beyond(status, first["worst"]) else f"{number(first['worst'])} times"
            lines.append(
                f"First {status} at {first['position']:,} tokens of stream {first['stream']}: "
                f"{first['outside']:.0f} heads outside their margins, the furthest {furthest}."
            )
    done = table["action"].dropna()
    if len(done):
        texts = [f"{name} ({count} times)" for name, count in done.value_counts().items()]
        lines.append(f"Done: {', '.join(texts)}.")
    last = table.iloc[-1]
    lines.append(f"The last report, at {last['position']:,} tokens, says {last['status']}.")
    return lines


def drawn(table: pd.DataFrame) -> list[Figure]:
    """Return norms and shift over the tokens read in all streams, one after another. The mark of a ratio that is not
    finite is at the top."""
    steps = table["position"].diff()
    steps[table["stream"].diff() != 0] = table["position"]
    read = steps.cumsum().tolist()
    text = [f"stream {s}, {p:,}" for s, p in zip(table["stream"], table["position"])]
    axis = figures.steps_axis("tokens read")
    frame = table.drop(columns="heads").assign(read=read)
    worst = [Line("largest ratio of a head", read, table["worst"].tolist(), symbol="", text=text)]
    y_axis = figures.values_axis(table["worst"].tolist(), "state norm over its envelope")
    far = _are_beyond(table)
    peak = float(table["worst"].mask(far).max())
    top = (2 if is_log(y_axis) else 1.05) * (max(peak, 1) if math.isfinite(peak) else 1)
    places = table["worst"].mask(far, top)
    said = [f"{t}: {w if isinstance(w, str) else number(w, '.4g')}" for t, w in zip(text, _in_words(table))]
    for status, colour in zip(STATUSES[1:], (LINES[4], LINES[3], LINES[1])):
        here = table["status"] == status
        if here.any():
            y = places.where(here).tolist()
            symbol = {"warning": "triangle-up", "drift": "diamond", "collapsed": "x"}[status]
            worst.append(Line(status, read, y, colour=colour, symbol=symbol, width=0, text=said))
    words = f"The largest ratio of a state's norm to its envelope is {number(peak)}, of {len(table):,} reports."
    if far.any():
        rest = f"; elsewhere it is at most {number(peak)}" if math.isfinite(peak) else ""
        words = (
            f"Of {counted(len(table), 'report')} the largest ratio of a state's norm to its envelope is {BEYOND} in "
            f"{counted(int(far.sum()), 'report')}, whose marks are at the top{rest}."
        )
    norm = figures.lines("State norms against their envelope", words, frame, worst, axis, y_axis,
                         [level(1, "envelope", is_log(y_axis))])  # fmt: skip
    norm.plot.update_traces(hovertemplate="%{customdata}", selector={"mode": "markers"})
    outside = [Line("heads", read, table["outside"].tolist(), colour=INK, symbol="", text=text)]
    count = figures.lines("Heads outside their margins", f"At most {table['outside'].max():.0f} heads at once.", frame,
                          outside, axis, {"title": {"text": "heads"}, "rangemode": "tozero"}, height=280)  # fmt: skip
    out = [norm, count]
    if table["shift"].notna().any():
        shift = [Line("shift of the input", read, table["shift"].tolist(), symbol="", text=text)]
        marks = [level(1, "limit: above, another input than calibrated on")]
        at_most = f"At most {number(float(table['shift'].max()))} of the limit."
        y_axis = {"title": {"text": "shift over its limit"}, "rangemode": "tozero"}
        out.append(figures.lines("Shift of the input", at_most, frame, shift, axis, y_axis, marks, height=280))
    return out


def events(table: pd.DataFrame) -> pd.DataFrame:
    """Return the reports at which the status changed, or something was done."""
    before = table["status"].shift(fill_value="ok").where(table["stream"].diff().fillna(0) == 0, "ok")
    some = table[(table["status"] != before) | table["action"].notna()]
    heads = [", ".join(f"layer {layer} head {head}" for layer, head, _ in named[:3]) for named in some["heads"]]
    columns = ["position", "status", "action", "outside", "worst", "shift"]
    more: dict[str, Any] = {"heads": heads, "stream": some["stream"], "time": some["time"]}
    return some[columns].assign(worst=_in_words(some), **more).reset_index(drop=True)


def _heads(table: pd.DataFrame) -> list[Table]:
    """Return how often each head was outside its margin, and its largest ratio."""
    rows: dict[tuple[int, int], list[float]] = {}
    for heads in table["heads"]:
        for layer, head, ratio in heads:
            rows.setdefault((layer, head), []).append(ratio)
    if not rows:
        return []
    lines = [{"layer": k[0], "head": k[1], "reports": len(v), "largest ratio": max(v)} for k, v in rows.items()]
    frame = pd.DataFrame(lines).sort_values(["reports", "largest ratio"], ascending=False, ignore_index=True)
    return [Table("How often, and how far", frame, "Of each report 16 heads at most are named, the furthest first.")]


KINDS.register(Kind("monitor", fits, page))
