"""Read a log of sensors, and the events that go with it, from CSV or Parquet; whatever had to be repaired is listed.

What is repaired: rows out of order, times of several zones, rows that are there twice, a clock that was set back,
    sensors
that write rows of their own, values that are no numbers. What is kept: a value that is missing stays missing, and a gap
is the time since the row before. What cannot be repaired is refused in one line. Nothing is filled in, and nothing that
is merely strange (an outlier, a drift) is taken out, since it may be what comes before a failure: it is noted.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rnn_longctx.config import counted, home_path
from rnn_longctx.errors import InputError, nearest, one_line

SECOND = 10**9  # nanoseconds, which times are counted in
FAR = 20.0  # robust standard deviations from the median: an outlier
DRIFT = 1.0  # of them, between the medians of the first and the last fifth of a log
OFFSET = re.compile(r"\d\d:?\d\d.*(Z|UTC|[+-]\d\d(:?\d\d)?)$")


@dataclass(frozen=True, eq=False)
class Log:
    """A log as it is read.

    Attributes:
        name: of the file.
        times: (T) int64, nanoseconds since 1970 in UTC, rising.
        values: (T, S) float64, NaN where one is missing.
        sensors: S names.
        aware: whether the file's times say their zone; if not, they are taken as UTC.
        repairs: what was changed, a line each; notes: what is strange, and was left as it is.
    """

    name: str
    times: np.ndarray
    values: np.ndarray
    sensors: list[str]
    aware: bool
    repairs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> float:
        """The usual time from a row to the next, in seconds."""
        return float(np.median(np.diff(self.times))) / SECOND

    @property
    def elapsed(self) -> np.ndarray:
        """(T) float32, the time since the row before, in usual steps; 1 for the first."""
        return np.diff(self.times, prepend=self.times[0] - self.step * SECOND).astype(np.float32) / (self.step * SECOND)

    def when(self, row: int) -> str:
        return str(pd.Timestamp(self.times[row], tz="UTC").strftime("%Y-%m-%d %H:%M:%S"))


def read_log(path: str | Path, time: str, sensors: Sequence[str]) -> Log:
    """Return a log. time: the column of times; sensors: the columns of values.

    Raises InputError: a file that cannot be read or is empty, columns that are not there or there twice, times that
    cannot be read or of which some say their zone and some do not, sensors none of which changes.
    """
    path = home_path(path)
    twice = sorted({name for name in sensors if list(sensors).count(name) > 1})
    if twice or not sensors or time in sensors:
        wrong = f"{twice[0]!r} is named twice" if twice else f"{time!r} is the time" if sensors else "none is named"
        raise InputError(f"sensors: {wrong}; expected different columns of values, such as temp,vib")
    frame = _columns(path, [time, *sensors])
    repairs: list[str] = []
    times, aware = _times(frame[time], path, repairs)
    values = np.stack([_numbers(frame[name], path, repairs) for name in sensors], 1)
    known = times != pd.NaT.value
    times, values = times[known], values[known]
    times = _clock(times, repairs)
    order = np.argsort(times, kind="stable")
    if (steps := int((np.diff(times) < 0).sum())) > 0:
        repairs.append(f"rows were out of order in {counted(steps, 'place')}: sorted by time")
    times, values = _merged(times[order], values[order], repairs)
    if len(times) < 3:
        raise InputError(f"{path}: {counted(len(times), 'row')} of different times are no log")
    log = Log(path.name, times, values, list(sensors), aware, repairs)
    log = _aligned(log)
    log = _changing(log, path)
    return replace(log, notes=_notes(log))


def read_events(path: str | Path, time: str, log: Log) -> tuple[np.ndarray, list[str]]:
    """Return the times of events in a log, int64 nanoseconds, rising and each once, and what had to be repaired. Raises
    InputError as `read_log` does, and where no event lies within the log."""
    path = home_path(path)
    repairs: list[str] = []
    times, aware = _times(_columns(path, [time])[time], path, repairs)
    if aware != log.aware:
        says = (
            "say their zone and those of the log do not" if aware else "do not say their zone and those of the log do"
        )
        raise InputError(f"{path}: its times {says}; write the offset in both, such as 2026-01-31T12:00:00+01:00")
    times = np.unique(times[times != pd.NaT.value])
    inside = (times >= log.times[0]) & (times <= log.times[-1])
    span = f"{log.when(0)} to {log.when(-1)}"
    if not inside.any():
        raise InputError(f"{path}: none of its {counted(len(times), 'event')} lies within the log, {span}")
    if not inside.all():
        repairs.append(f"{path.name}: {counted(int((~inside).sum()), 'event')} outside the log ({span}) left out")
    return times[inside], repairs


def labels(log: Log, events: np.ndarray, warning: int) -> np.ndarray:
    """Return (T) bool, whether an event follows within `warning` usual steps."""
    following = np.searchsorted(events, log.times, side="right")
    after = np.append(events, np.iinfo(np.int64).max)[following]
    return after - log.times <= warning * log.step * SECOND


def _columns(path: Path, names: list[str]) -> pd.DataFrame:
    """Return columns of a file. Raises InputError where they are not there, or there twice."""
    import pyarrow.parquet  # (here: rows that are in memory are fitted to without it)

    parquet = path.suffix.lower() in (".parquet", ".pq")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        if parquet:
            there = pyarrow.parquet.read_schema(path).names
        else:
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
                there = [name.strip() for name in next(csv.reader(file), [])]
        for name in names:
            if name not in there:
                raise InputError(f"{path}: there is no column {name!r}{nearest(name, map(str, there))}")
            if there.count(name) > 1:
                raise InputError(f"{path}: there are {there.count(name)} columns {name!r}; name them differently")
        if parquet:
            frame = pd.read_parquet(path, columns=names)
        else:
            columns = [there.index(name) for name in names]
            frame = pd.read_csv(path, header=None, skiprows=1, usecols=columns, encoding="utf-8-sig", low_memory=False)
            frame = frame[columns].set_axis(names, axis=1)
    except (OSError, ValueError, pyarrow.ArrowException, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        if isinstance(error, pd.errors.EmptyDataError):
            reason = "it has a header and no rows"
        raise InputError(f"cannot read {path}: {reason}") from None
    if not len(frame):
        raise InputError(f"cannot read {path}: it has a header and no rows")
    return frame


def _times(column: pd.Series, path: Path, repairs: list[str]) -> tuple[np.ndarray, bool]:
    """Return times as int64 nanoseconds in UTC, NaT where one cannot be read, and whether they say their zone."""
    if pd.api.types.is_numeric_dtype(column):
        size = float(column.abs().median())
        unit: Any = next((unit for unit, most in (("s", 1e11), ("ms", 1e14), ("us", 1e17)) if size < most), "ns")
        repairs.append(f"{path.name}: times are numbers, taken as {unit} since 1970 in UTC")
        times, aware = pd.to_datetime(column, unit=unit, utc=True, errors="coerce"), True
    elif pd.api.types.is_datetime64_any_dtype(column):
        aware = column.dt.tz is not None
        times = pd.to_datetime(column, utc=True)
    else:
        text = column.astype("string").str.strip()
        times = pd.to_datetime(text, utc=True, errors="coerce", format="ISO8601")
        if times.isna().all():
            days = _days_first(text, path, repairs)
            times = pd.to_datetime(text, utc=True, errors="coerce", dayfirst=days)
        offsets = text[times.notna()].str.extract(OFFSET)[0]
        with_zone = int(offsets.notna().sum())
        if 0 < with_zone < len(offsets):
            raise InputError(f"{path}: {with_zone} of {len(offsets)} times say their zone, the others do not")
        aware = with_zone > 0
        if offsets.nunique() > 1:
            zones = ", ".join(sorted(offsets.unique())[:4])
            repairs.append(f"{path.name}: times of several zones ({zones}) brought to UTC")
    lost = int(times.isna().sum())
    if lost > 0.1 * len(times):
        raise InputError(
            f"{path}: {lost} of {len(times)} times cannot be read, such as {column[times.isna()].iloc[0]!r}"
        )
    if lost:
        repairs.append(f"{path.name}: {counted(lost, 'row')} whose time cannot be read left out")
    if not aware:
        repairs.append(f"{path.name}: times say no zone and are taken as UTC")
    return times.astype("datetime64[ns, UTC]").astype("int64").to_numpy(), aware


def _days_first(text: pd.Series, path: Path, repairs: list[str]) -> bool:
    """Return whether dates such as 31/01/2026 begin with the day. Raises InputError where none says it, or they differ:
    pandas takes the month first, and reads the wrong day without a word."""
    numbers = text.str.extract(r"^(\d{1,2})[/.-](\d{1,2})[/.-]\d{2,4}\b").dropna().astype(int)
    if numbers.empty:
        return False
    day, month = (bool((numbers[column] > 12).any()) for column in (0, 1))
    if day == month:
        why = (
            "some begin with the day and some with the month" if day else "do not say whether day or month comes first"
        )
        raise InputError(f"{path}: times such as {text[numbers.index[0]]} {why}; write them as 2026-01-31 12:00:00")
    repairs.append(f"{path.name}: dates such as {text[numbers.index[0]]} taken as {'day' if day else 'month'} first")
    return day


def _numbers(column: pd.Series, path: Path, repairs: list[str]) -> np.ndarray:
    """Return float64 values, NaN for what is no number."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    lost = int((np.isnan(numbers) & column.notna().to_numpy()).sum())
    if lost > 0.5 * max(1, column.notna().sum()):
        strange = column[column.notna().to_numpy() & np.isnan(numbers)].iloc[0]
        raise InputError(f"{path}: sensor {column.name!r} holds no numbers, but such as {strange!r:.40}")
    infinite = np.isinf(numbers)
    if lost or infinite.any():
        repairs.append(
            f"{column.name}: {counted(lost + int(infinite.sum()), 'value')} no finite number, taken as missing"
        )
    return np.where(infinite, np.nan, numbers)


def _clock(times: np.ndarray, repairs: list[str]) -> np.ndarray:
    """Return times, in the order of the file, with a clock that was set back set right.

    Where a file is in order but for at most a few places where time goes back, the clock was set, and what follows is
    as much too early, until time leaps forward as far. A file that is out of order in many places was shuffled.
    """
    steps = np.diff(times)
    back = np.flatnonzero(steps < 0)
    if not len(back) or len(back) > max(1, len(times) // 1000):
        return times
    usual, times = int(np.median(steps[steps > 0])), times.copy()
    for place in back:
        set_by = usual - steps[place]
        forward = np.flatnonzero(np.abs(steps[place + 1 :] - usual - set_by) <= usual // 2)
        stop = place + 2 + forward[0] if len(forward) else len(times)
        times[place + 1 : stop] += set_by
        day = pd.Timestamp(times[place], tz="UTC").strftime("%Y-%m-%d %H:%M")
        repairs.append(
            f"the clock was set back by {set_by / SECOND:.0f} s at {day}: {counted(int(stop - place - 1), 'row')} "
            "moved forward as much"
        )
    return times


def _merged(times: np.ndarray, values: np.ndarray, repairs: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows, sorted by time, with one for each time: the mean of the values that there are."""
    distinct, first = np.unique(times, return_index=True)
    if len(distinct) == len(times):
        return times, values
    differ, merged = 0, values[first].copy()
    counts = np.diff(np.append(first, len(times)))
    for n in np.flatnonzero(counts > 1):
        rows = values[first[n] : first[n] + counts[n]]
        seen = ~np.isnan(rows)
        spread = np.where(seen, rows, -np.inf).max(0) - np.where(seen, rows, np.inf).min(0)
        differ += bool((spread > 0).any())
        merged[n] = np.where(seen.any(0), np.where(seen, rows, 0).sum(0) / np.maximum(1, seen.sum(0)), np.nan)
    text = f"{counted(len(times) - len(distinct), 'row')} of a time that was there before merged"
    repairs.append(
        text
        + (f"; in {counted(differ, 'of them values differ', 'of them values differ')}: their mean" if differ else "")
    )
    return distinct, merged


def _aligned(log: Log) -> Log:
    """Return a log whose sensors, where each writes rows of its own, stand in rows together: those of less than half
    the slowest sensor's step after a row that lacks them join it."""
    present = ~np.isnan(log.values)
    steps = [np.median(np.diff(log.times[column])) for column in present.T if column.sum() > 1]
    if not steps or present.sum(1).mean() > 0.75 * present.any(0).sum():
        return log
    near, joined, values = max(steps) / 2, np.zeros(len(log.times), np.int64), log.values.copy()
    keep, head = np.ones(len(log.times), bool), 0
    for row in range(1, len(log.times)):
        if log.times[row] - log.times[head] < near and not (present[row] & present[head]).any():
            values[head] = np.where(present[row], values[row], values[head])
            present[head] |= present[row]
            keep[row], joined[row] = False, head
        else:
            head = row
    if keep.all():
        return log
    line = f"{counted(int((~keep).sum()), 'row')} of sensors that write rows of their own joined to the row before"
    return replace(log, times=log.times[keep], values=values[keep], repairs=[*log.repairs, line])


def _changing(log: Log, path: Path) -> Log:
    """Return a log of the sensors that change. Raises InputError where none does."""
    values = np.where(np.isnan(log.values), np.nanmax(np.append(log.values, 0)), log.values)
    low = np.where(np.isnan(log.values), np.inf, values).min(0)
    high = np.where(np.isnan(log.values), -np.inf, values).max(0)
    changing = high > low
    if not changing.any():
        raise InputError(f"{path}: every sensor is constant or empty ({', '.join(log.sensors)}): nothing to learn from")
    if changing.all():
        return log
    still = ", ".join(name for name, moves in zip(log.sensors, changing) if not moves)
    sensors = [name for name, moves in zip(log.sensors, changing) if moves]
    line = f"left out, being constant or empty: {still}"
    return replace(log, values=log.values[:, changing], sensors=sensors, repairs=[*log.repairs, line])


def _notes(log: Log) -> list[str]:
    """Return what is strange in a log and was left as it is."""
    notes, fifth = [], max(1, len(log.times) // 5)
    steps = np.diff(log.times) / SECOND
    gaps = steps > 1.5 * log.step
    if gaps.any():
        at = int(steps.argmax())
        notes.append(
            f"{counted(int(gaps.sum()), 'gap')} of more than 1.5 steps of {log.step:g} s, the longest {steps[at]:.0f} "
            f"s from {log.when(at)} on: kept as elapsed time"
        )
    for name, column in zip(log.sensors, log.values.T):
        seen = column[~np.isnan(column)]
        if (share := 1 - len(seen) / len(column)) > 0:
            notes.append(f"{name}: {100 * share:.3g}% of the values are missing: kept as a mask")
        low, middle, high = np.quantile(seen, [0.25, 0.5, 0.75])
        spread = (high - low) / 1.349 or seen.std()
        if (far := int((np.abs(seen - middle) > FAR * spread).sum())) > 0:
            notes.append(
                f"{name}: {counted(far, 'outlier')} more than {FAR:g} robust standard deviations from the median"
            )
        first, last = column[:fifth], column[-fifth:]
        if not (np.isnan(first).all() or np.isnan(last).all()):
            moved = (np.nanmedian(last) - np.nanmedian(first)) / spread
            if abs(moved) > DRIFT and len(np.unique(seen)) > 2:
                notes.append(
                    f"{name}: drift, the median of the last fifth is {moved:+.1f} standard deviations from the first's"
                )
    return notes
