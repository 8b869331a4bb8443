"""The report of a fitted model on a log: alarms as JSON lines, tables, pictures, and a page that says what they say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text
from rnn_longctx.probes.pictures import COLOURS, RED, write
from rnn_longctx.progress import Say, silent
from rnn_longctx.sensors.explain import alarm_links, in_words
from rnn_longctx.sensors.fit import Run, rows_of_log
from rnn_longctx.sensors.read import SECOND, Log, labels
from rnn_longctx.sensors.score import (
    FALSE_ALARMS,
    average_precision,
    clock_shift,
    events_caught,
    nulls,
    read_rows,
    since_event,
)

EXPLAINED = 20  # alarms at most whose links are looked up: each is a call of its own


@dataclass(frozen=True, eq=False)
class Report:
    """What a model said of the rows of a log from `first` on.

    Attributes:
        logits: (T) of all rows; labels: (T) bool.
        figures: average precision, those of the nulls, alarms and events, by their names.
        events: a row an event: t, caught, lead.
        alarms: a mapping an alarm, as alarms.jsonl has them.
    """

    log: Log
    first: int
    logits: np.ndarray
    labels: np.ndarray
    threshold: float
    forecasts: pd.DataFrame
    figures: dict[str, float]
    events: pd.DataFrame
    alarms: list[dict[str, Any]]

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write alarms.jsonl, events.csv, forecast.csv, report.md and pictures into a folder; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(alarm) + "\n" for alarm in self.alarms)
        events = self.events.assign(t=pd.to_datetime(self.events["t"], utc=True))
        files = {
            "alarms.jsonl": lines,
            "events.csv": csv_text(events),
            "forecast.csv": csv_text(self.forecasts),
            "report.md": self.page(name),
        }
        for file, text in files.items():
            write_atomic(folder / file, text.encode())
        return [*(folder / file for file in files), *self.draw(folder)]

    def lines(self) -> list[str]:
        """Return what the report says, in lines."""
        f, rows = self.figures, len(self.log.times) - self.first
        lines = [f"{rows:,} rows from {self.log.when(self.first)} to {self.log.when(-1)}, {int(f['events'])} events"]
        if f["events"]:
            lines.append(
                f"average precision {f['average_precision']:.3f}; by chance {f['chance']:.3f}, by the time since the "
                f"last event {f['again']:.3f}"
            )
            lead = "" if math.isnan(f["lead"]) else f", {f['lead'] / 60:.3g} minutes ahead (median)"
            lines.append(
                f"{int(f['caught'])} of {int(f['events'])} events announced{lead}; false alarms in "
                f"{100 * f['false_alarms']:.3g}% of the quiet rows (the threshold was set for {100 * FALSE_ALARMS:g}%)"
            )
        if f["clock"]:
            ahead_or_behind = "ahead of" if f["clock"] > 0 else "behind"
            lines.append(
                f"the clocks seem to differ: alarms fit the events best where these are {abs(f['clock']):.0f} s "
                f"{ahead_or_behind} the log"
            )
        for ahead, some in self.forecasts.groupby("horizon"):
            model, kept, middle = (
                np.average(some[name], weights=some["n"] + 1e-9) for name in ("model", "persistence", "median")
            )
            lines.append(
                f"forecast {ahead} rows ahead: error {model:.3f}, of persistence {kept:.3f}, of the median {middle:.3f}"
            )
        return lines

    def page(self, name: str) -> str:
        """Return the page, in Markdown."""
        parts = [f"# {name}", *(f"- {line}" for line in self.lines()), "", "## The log", ""]
        for title, lines in (("Repaired", self.log.repairs), ("Left as it is", self.log.notes)):
            parts += [f"{title}:", "", *(f"- {line}" for line in lines or ["nothing"]), ""]
        parts += ["## Alarms", "", "![Alarms over time](alarms.png)", ""]
        for alarm in self.alarms[:EXPLAINED]:
            parts.append(f"- **{alarm['from']}** to {alarm['to']}: {_outcome(alarm)}")
            parts += [f"  - {_link(link)}" for link in alarm["links"]]
        if len(self.alarms) > EXPLAINED:
            parts.append(f"- and {len(self.alarms) - EXPLAINED} more in alarms.jsonl")
        shown = self.forecasts.round(3).to_string(index=False)
        about = "Mean absolute errors in robust standard deviations of each sensor."
        parts += ["", "## Forecasts", "", about, "", "```", shown, "```", "", "![Forecast errors](forecast.png)", ""]
        return "\n".join(parts)

    def draw(self, folder: Path) -> list[Path]:
        """Draw alarms.png and forecast.png."""
        times = pd.to_datetime(self.log.times[self.first :], utc=True)
        probability = 1 / (1 + np.exp(-self.logits[self.first :].astype(np.float64)))
        figure = Figure(figsize=(10.0, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(times, probability, color=COLOURS[0], linewidth=0.7, label="probability of an event")
        axes.axhline(1 / (1 + math.exp(-self.threshold)), color=RED, linewidth=0.8, linestyle="--", label="alarm")
        for caught, colour in ((True, COLOURS[2]), (False, COLOURS[1])):
            some = pd.to_datetime(self.events["t"][self.events["caught"] == caught], utc=True)
            label = "event, announced" if caught else "event, not announced"
            axes.plot(some, np.full(len(some), 1.05), "v", color=colour, markersize=4, label=label)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=4, frameon=False, fontsize=8)
        alarms = write(figure, folder / "alarms.png")
        figure = Figure(figsize=(7.0, 3.0), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(("model", "persistence", "median")):
            means = self.forecasts.groupby("horizon")[name].mean()
            axes.plot(means.index, means, "o-", color=COLOURS[i], label=name)
        axes.set(xscale="log", xlabel="rows ahead", ylabel="mean absolute error")
        axes.legend(frameon=False)
        return [alarms, write(figure, folder / "forecast.png")]


def make_report(run: Run, log: Log, events: np.ndarray, first: int, say: Say = silent) -> Report:
    """Return the report on the rows of a log from `first` on; those before are read as context. events: times, as of
    `rnn_longctx.sensors.read.read_events`; none where they are not known."""
    model = run.model
    say(f"reading {len(log.times):,} rows")
    read = read_rows(model, rows_of_log(model.scales, log), first)
    before = labels(log, events, model.config.warning)
    seconds = model.config.warning * log.step
    here = slice(first, None)
    events = events[events > log.times[first]]
    caught = events_caught(read.logits[here], log.times[here], events, seconds, run.threshold)
    quiet = ~before[here]
    figures = {
        "events": len(caught),
        "average_precision": average_precision(read.logits[here], before[here]),
        **nulls(before[here], since_event(log.times, events)[here]),
        "clock": clock_shift(read.logits[here], log.times[here], events, seconds, log.step),
        "caught": int(caught["caught"].sum()),
        "lead": float(caught["lead"].median()) if caught["caught"].any() else math.nan,
        "false_alarms": float((read.logits[here] > run.threshold)[quiet].mean()) if quiet.any() else math.nan,
    }
    alarms = _alarms(run, log, read.logits, events, first, seconds)
    return Report(log, first, read.logits, before, run.threshold, read.errors, figures, caught, alarms)


def _alarms(
    run: Run, log: Log, logits: np.ndarray, events: np.ndarray, first: int, seconds: float
) -> list[dict[str, Any]]:
    """Return a mapping for each stretch of rows above the threshold, those closer than a warning taken together."""
    above = np.flatnonzero(logits[first:] > run.threshold) + first
    groups = np.split(above, np.flatnonzero(np.diff(above) > run.model.config.warning) + 1) if len(above) else []
    peaks = [int(group[logits[group].argmax()]) for group in groups]
    table = alarm_links(run.model, log, peaks[:EXPLAINED])
    alarms = []
    for group, peak in zip(groups, peaks):
        after = np.searchsorted(events, log.times[group[0]], side="right")
        follows = after < len(events) and (events[after] - log.times[group[0]]) / SECOND <= seconds
        alarms.append(
            {
                "from": log.when(group[0]),
                "to": log.when(group[-1]),
                "probability": round(1 / (1 + math.exp(-float(logits[peak]))), 4),
                "event": str(pd.Timestamp(events[after], tz="UTC")) if follows else None,
                "lead_seconds": round(float(events[after] - log.times[group[0]]) / SECOND) if follows else None,
                "links": [] if table is None else in_words(run.model, log, peak, table),
            }
        )
    return alarms


def _outcome(alarm: dict[str, Any]) -> str:
    if alarm["event"] is None:
        return f"probability {alarm['probability']}, no event followed"
    return f"probability {alarm['probability']}, an event {alarm['lead_seconds'] / 60:.3g} minutes later"


def _link(link: dict[str, Any]) -> str:
    stood = ", ".join(f"{s['sensor']} {s['value']:g} ({s['deviations']:+g} sd)" for s in link["sensors"])
    return f"read {link['lag_rows']:,} rows before ({link['from']} to {link['to']}): {stood or 'nothing unusual there'}"
