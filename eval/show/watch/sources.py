"""What a page that follows a log shows: a monitor's reports, or the rows of a training run."""

from __future__ import annotations

import csv
import math
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import INK, LINES, Line, level, look, number
from rnn_longctx.eval.show.page.kinds import monitor, train
from rnn_longctx.eval.show.page.parts import Figure, Page, Section, Switch, Table
from rnn_longctx.eval.show.watch.follow import Follow, Points

EVENTS = 50  # shown, the newest first


class Source:
    """A log that is followed, and what of it a page shows.

    Attributes:
        points: its rows; values in the order of `names`, infinite for a ratio that is not finite.
        events: the newest EVENTS, each with the number of its row and a cell a column of `columns`.
        status: one word for how it stands.
        unread: lines that could not be read.
    """

    columns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __init__(self, path: Path):
        self.follow = Follow(path)
        self.clear()

    def clear(self) -> None:
        """Forget what was read: the file begins anew."""
        self.points, self.events, self.status = Points(), deque[tuple[int, list[str]]](maxlen=EVENTS), "waiting"
        self.unread = 0

    def read(self) -> None:
        """Read what has come since the last call. A line that cannot be read is passed over, and counted."""
        era = self.follow.era
        for line in self.follow.lines():
            if self.follow.era != era:
                era = self.follow.era
                self.clear()
            try:
                if line.strip():
                    self.add(line)
            except (ValueError, OverflowError, csv.Error):
                self.unread += 1
        if self.follow.era != era:
            self.clear()

    def add(self, line: str) -> None:
        """Take one line. Raises ValueError, OverflowError or csv.Error: it is no row of such a log."""
        raise NotImplementedError

    def found(self) -> list[str]:
        """Return what the log says so far, in plain words."""
        raise NotImplementedError

    def verdict(self) -> list[str]:
        """Return what the log says so far, and how many of its lines could not be read."""
        return self.found() + [f"{counted(self.unread, 'line')} could not be read."] * bool(self.unread)

    def figures(self) -> list[Figure]:
        """Return the page's figures, empty: each trace's `meta` is the place of its values."""
        raise NotImplementedError

    def page(self) -> Page:
        """Return the page, to be filled as rows come."""
        about = {"file": str(self.follow.path.name), "rows": "0"}
        parts: list[Any] = self.figures()
        sections = [Section("While it works", parts)]
        if self.columns:
            empty = pd.DataFrame(columns=list(self.columns))
            sections.append(Section("Events", [Table("Events, the newest first", empty)]))
        return Page(f"Watching {self.follow.path.name}", self.verdict(), about, sections)

    def words(self) -> list[str]:
        """Return a sentence for each series: its last value and its largest."""
        texts = []
        for place in range(len(self.names)):
            known = [p for p in self.points.kept if p.values[place] is not None]
            if not known:
                texts.append("nothing yet")
                continue
            last, most = known[-1], max(v for p in known if (v := p.values[place]) is not None)
            texts.append(f"{_words(last.values[place])} at {last.x:,.0f}, at most {_words(most)}")
        return texts


class MonitorSource(Source):
    """The log of a monitor, JSON lines."""

    names = ("largest ratio of a head", *monitor.STATUSES[1:], "heads outside their margins", "shift of the input")
    columns = ("position", "status", "action", "heads outside", "furthest", "time")

    def clear(self) -> None:
        super().clear()
        self.counts: Counter[str] = Counter()
        self.read_tokens, self.position, self.last = 0, 0, "ok"

    def add(self, line: str) -> None:
        report = monitor.report(line)
        if report is None:
            raise ValueError("no report of a monitor")
        position, status = report["position"], report["status"]
        begins = position <= self.position
        self.read_tokens += position if begins else position - self.position
        before = "ok" if begins else self.last
        self.position, self.last, self.status = position, status, status
        self.counts[status] += 1
        worst = math.inf if monitor.beyond(status, report["worst"]) else _known(report["worst"])
        marks = [worst if status == one else None for one in monitor.STATUSES[1:]]
        self.points.add(self.read_tokens, (worst, *marks, _known(report["outside"]), _known(report["shift"])))
        if status != before or report["action"]:
            heads = [f"layer {layer} head {head}" for layer, head, _ in report["heads"][:2]]
            outside = f"{number(report['outside'], '.0f')}: {', '.join(heads)}" if heads else "none"
            cells = [f"{position:,}", status, report["action"] or "", outside, _words(worst, ".3g"), report["time"]]
            self.events.append((self.points.count, cells))

    def found(self) -> list[str]:
        if not self.points.count:
            return ["No report yet."]
        shares = ", ".join(f"{self.counts[s]:,} {s}" for s in monitor.STATUSES if self.counts[s])
        return [
            f"Now {self.status}, at {self.position:,} tokens of the stream.",
            f"Of {counted(self.points.count, 'report')}: {shares}.",
        ]

    def figures(self) -> list[Figure]:
        colours = (INK, LINES[4], LINES[3], LINES[1], INK, INK)
        marks = ("", "triangle-up", "diamond", "x", "", "")
        lines = [Line(name, [], [], colour=colour, symbol=mark, width=0 if mark else 2)
                 for name, colour, mark in zip(self.names, colours, marks)]  # fmt: skip
        one: dict[str, Any] = {"title": {"text": "state norm over its envelope"}, "type": "log", "dtick": "D2"}
        limits = [level(1, "envelope", log=True)], [level(1, "limit: above, another input than calibrated on")]
        return [
            empty("State norms against their envelope", lines[:4], (0, 1, 2, 3), "tokens read", one, limits[0]),
            empty("Heads outside their margins", lines[4:5], (4,), "tokens read", _axis("heads")),
            empty("Shift of the input", lines[5:], (5,), "tokens read", _axis("shift over its limit"), limits[1]),
        ]


class TrainSource(Source):
    """log.csv of a training run."""

    names = tuple(column for columns, _, _ in train.STEPS for column in columns)

    def clear(self) -> None:
        super().clear()
        self.head: list[str] = []

    def add(self, line: str) -> None:
        cells = next(csv.reader([line]), [])
        if not self.head or cells == self.head:  # of the next file of a rotation, too
            self.head = cells
            return
        row = dict(zip(self.head, cells))
        step = _number(row.get("step"))
        if step is None or len(cells) != len(self.head):
            raise ValueError("no row of a training run's log")
        self.status = "training"
        self.points.add(step, tuple(_number(row.get(name)) for name in self.names))

    def found(self) -> list[str]:
        if not self.points.count:
            return ["No row yet."]
        last = self.points.kept[-1]
        losses = [v for p in self.points.kept[-10:] if (v := p.values[0]) is not None]
        lines = [f"At step {last.x:,.0f}, {counted(self.points.count, 'row')} of the log."]
        if losses:
            mean = sum(losses) / len(losses)
            lines.append(
                f"The loss is {mean:.3f} nats per token, the mean of the last {counted(len(losses), 'row')} (from "
                f"{min(losses):.3f} to {max(losses):.3f})."
            )
        return lines

    def figures(self) -> list[Figure]:
        out, place = [], 0
        for columns, title, what in train.STEPS:
            lines = [Line(train.NAMES[c], [], [], symbol="", **({"colour": INK} if i == 0 else _colour(i)))
                     for i, c in enumerate(columns)]  # fmt: skip
            log = title.startswith(("Loss", "Norm"))
            axis = {"title": {"text": what}} | ({"type": "log"} if log else {"rangemode": "tozero"})
            out.append(empty(title, lines, range(place, place + len(columns)), "step", axis))
            place += len(columns)
        return out


def source_of(path: Path) -> Source:
    """Return what follows a monitor's log, or the log of a run's folder. Raises InputError: it is neither."""
    if path.is_dir() or path.name == train.LOG:
        return TrainSource(path / train.LOG if path.is_dir() else path)
    if path.suffix != ".jsonl":
        raise InputError(f"{path} cannot be followed: expected a monitor's log (FILE.jsonl) or a training run's folder")
    return MonitorSource(path)


def empty(
    title: str, lines: Sequence[Line], places: Sequence[int], x: str, y: dict[str, Any], marks: Sequence[Any] = ()
) -> Figure:
    """Return a figure without data, whose traces say which values they are of."""
    plot, switches = go.Figure(), []
    for line, place in zip(lines, places):
        plot.add_traces(figures.traces_of(line, meta=place))
        switches.append(Switch(line.name, [len(plot.data) - 1]))
    plot.update_traces(hovertemplate="%{x:,d}: %{customdata}")
    plot.update_layout(xaxis=figures.steps_axis(x), yaxis=y, height=320)
    figures.add_marks(plot, marks)
    frame = pd.DataFrame(columns=[x, *(line.name for line in lines)])
    return Figure(title, plot, "Nothing yet.", frame, switches if len(switches) > 1 else ())


def _axis(what: str) -> dict[str, Any]:
    return {"title": {"text": what}, "rangemode": "tozero"}


def _colour(i: int) -> dict[str, Any]:
    return {k: v for k, v in look(i - 1).items() if k != "symbol"}


def _words(value: float | None, form: str = ".4g") -> str:
    return monitor.BEYOND if value == math.inf else number(value, form)


def _known(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _number(text: str | None) -> float | None:
    try:
        return _known(float(text or "nan"))
    except ValueError:
        return None
