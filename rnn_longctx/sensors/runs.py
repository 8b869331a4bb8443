"""From files to a fitted run, and from a run to its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text
from rnn_longctx.progress import Say, silent
from rnn_longctx.sensors.adapt import AdaptConfig, adapt
from rnn_longctx.sensors.fit import CONTEXT, FitConfig, Run, fit, hashed, parts, rows_of_log
from rnn_longctx.sensors.model import SensorConfig
from rnn_longctx.sensors.read import Log, labels, read_events, read_log
from rnn_longctx.sensors.report import Report, make_report
from rnn_longctx.sensors.score import average_precision, read_rows, threshold_at
from rnn_longctx.sensors.units import in_known_units


@dataclass(frozen=True)
class Source:
    """A log and its events: paths, the column of times in both, and the sensors."""

    log: str
    time: str
    sensors: list[str]
    events: str

    def read(self) -> tuple[Log, np.ndarray]:
        """Return the log, with what had to be repaired of the events too, and the times of events."""
        log = read_log(self.log, self.time, self.sensors)
        events, repairs = read_events(self.events, self.time, log)
        return replace(log, repairs=[*log.repairs, *repairs]), events


def fit_run(source: Source, shape: SensorConfig, how: FitConfig, folder: Path, say: Say = silent) -> Run:
    """Fit a model, set its threshold, and save both in a new folder. Raises InputError as reading and fitting do."""
    log, events = source.read()
    for line in [*(f"repaired: {text}" for text in log.repairs), *(f"noted: {text}" for text in log.notes)]:
        say(line)
    before = labels(log, events, shape.warning)
    model = fit(log, before, replace(shape, sensors=log.sensors), how, say)
    _, setting, _ = parts(len(log.times))
    begin = max(0, setting.start - CONTEXT)
    logits = read_rows(model, rows_of_log(model.scales, log)[begin : setting.stop]).logits[setting.start - begin :]
    about = {"hashes": [hashed(source.log), hashed(source.events)], "fit": asdict(how), **asdict(source)}
    about |= {"log": str(home_path(source.log).resolve()), "events": str(home_path(source.events).resolve())}
    run = Run(model, threshold_at(logits, before[setting]), about)
    run.save(folder)
    return run


def report_run(run: Run, path: Path | None, events_path: Path | None, say: Say = silent) -> Report:
    """Return the report on the rows held out of the log that was fitted to, or on all of another one.

    Raises InputError: a log of other sensors or units, or the one that was fitted to is no longer what it was.
    """
    if path is None:
        if events_path is not None:
            raise InputError("--events are those of another log: give the log as well")
        log, events = _fitted(run)
        first = parts(len(log.times))[2].start
        begin = max(0, first - CONTEXT)
        log = replace(log, times=log.times[begin:], values=log.values[begin:])
        return make_report(run, log, events[events > log.times[0]], first - begin, say)
    log, events = _another(run, path, events_path)
    return make_report(run, log, events, min(run.model.config.warning, len(log.times) - 1), say)


def adapt_run(
    run: Run, path: Path, events_path: Path, folder: Path, config: AdaptConfig = AdaptConfig(), say: Say = silent
) -> pd.DataFrame:
    """Follow another log with online updates, save the adapted run and online.csv in a new folder, and return a row a
    piece: what was decided, and the average precision in it with updates and without (NaN where no event is near).

    Raises InputError as `report_run` does.
    """
    log, events = _another(run, path, events_path)
    old, old_events = _fitted(run)
    model = run.model
    before = labels(log, events, model.config.warning)
    rows = rows_of_log(model.scales, log)
    frozen = read_rows(model, rows).logits
    old_labels = labels(old, old_events, model.config.warning)
    adapted = adapt(model, (rows, before), (rows_of_log(model.scales, old), old_labels), config, say)
    table = adapted.decisions
    for name, logits in (("frozen", frozen), ("updated", adapted.logits)):
        pieces = [slice(start, stop) for start, stop in zip(table["from"], table["to"])]
        table[name] = [average_precision(logits[piece], before[piece]) for piece in pieces]
    run.save(folder)
    write_atomic(folder / "online.csv", csv_text(table).encode())
    return table


def _fitted(run: Run) -> tuple[Log, np.ndarray]:
    """Return the log and events that a run was fitted to. Raises InputError where they are no longer what they were."""
    about = run.source
    source = Source(about["log"], about["time"], about["sensors"], about["events"])
    for name, before in zip((source.log, source.events), about["hashes"]):
        if not Path(name).is_file():
            raise InputError(f"{name}, which was fitted to, is not there any more: give a log to report on")
        if hashed(name) != before:
            raise InputError(f"{name} is not what it was when it was fitted to: give a log to report on")
    return source.read()


def _another(run: Run, path: Path, events_path: Path | None) -> tuple[Log, np.ndarray]:
    """Return another log, in the units of the one that was fitted to, and its events, none where they are not known."""
    about = run.source
    log = read_log(path, about["time"], run.model.config.sensors)
    if log.sensors != run.model.config.sensors:
        lost = ", ".join(name for name in run.model.config.sensors if name not in log.sensors)
        raise InputError(f"{path}: constant or empty here, and the model needs it: {lost}")
    log = in_known_units(log, run.model.scales)
    events, repairs = np.zeros(0, np.int64), list[str]()
    if events_path is not None:
        events, repairs = read_events(events_path, about["time"], log)
    return replace(log, repairs=[*log.repairs, *repairs]), events
