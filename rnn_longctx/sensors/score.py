"""How well a model of sensors forecasts and warns, on rows that it was not fitted to, beside what needs no model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.sensors.fit import last_seen
from rnn_longctx.sensors.model import SensorModel

SEGMENT = 4096  # rows read at once
FALSE_ALARMS = 0.001  # share of the rows before which no event lies: the rate that a threshold is set to


@dataclass(frozen=True, eq=False)
class Read:
    """What a model said of rows.

    Attributes:
        logits: (T) float32, that an event follows.
        errors: a row a horizon and sensor: model, persistence and median, mean absolute errors in standard deviations;
            n.
    """

    logits: np.ndarray
    errors: pd.DataFrame


@torch.no_grad()
def read_rows(model: SensorModel, rows: Tensor, first: int = 0, segment: int = SEGMENT) -> Read:
    """Read rows (T, S + 1) as one stream. first: the row from which on forecasts are counted."""
    config, cache, logits = model.config, model.lm.new_cache(), []
    values = rows[:, :-1]
    last = last_seen(values[None])[0]
    sums = np.zeros((len(config.horizons), len(config.sensors), 4))
    for start in range(0, len(rows), segment):
        changes, said = model(rows[None, start : start + segment].to(model.lm.device), cache)
        logits.append(said[0].cpu())
        changes = changes.cpu()
        for i, ahead in enumerate(config.horizons):
            begin, end = max(start, first), min(start + segment, len(rows) - ahead)
            if begin >= end:
                continue
            at = torch.arange(begin, end)
            true, kept = values[at + ahead], last[at]
            there = ~true.isnan()
            true = true.nan_to_num()
            for j, forecast in enumerate((kept + changes[0, at - start, i], kept, torch.zeros_like(true))):
                sums[i, :, j] += ((forecast - true).abs() * there).sum(0, dtype=torch.float64).numpy()
            sums[i, :, 3] += there.sum(0).numpy()
    table = [
        (ahead, name, *(sums[i, s, :3] / max(1, sums[i, s, 3])), int(sums[i, s, 3]))
        for i, ahead in enumerate(config.horizons)
        for s, name in enumerate(config.sensors)
    ]
    columns = ["horizon", "sensor", "model", "persistence", "median", "n"]
    return Read(torch.cat(logits).numpy(), pd.DataFrame(table, columns=columns))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean, over the rows before an event, of the precision of alarms at least as high as theirs; chance is
    the share of such rows. NaN where there are none."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(labels[order])
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # equal scores come together
    precision, recall = hits[ends] / (ends + 1), hits[ends]
    return float((precision * np.diff(recall, prepend=0)).sum() / hits[-1]) if hits[-1] else math.nan


def threshold_at(scores: np.ndarray, labels: np.ndarray, rate: float = FALSE_ALARMS) -> float:
    """Return the lowest score that at most a share `rate` of the rows before which no event lies are above. Raises
    InputError where there are none."""
    quiet = np.sort(scores[~labels])[::-1]
    if not len(quiet):
        raise InputError("an event lies after every row: no threshold can be set; the warning is too long for them")
    return float(quiet[min(len(quiet) - 1, int(rate * len(quiet)))])


def events_caught(
    scores: np.ndarray, times: np.ndarray, events: np.ndarray, seconds: float, threshold: float
) -> pd.DataFrame:
    """Return a row an event that rows come before: t (nanoseconds), caught, and lead, seconds from the first alarm
    within `seconds` before it; NaN where there is none."""
    table = []
    for event in events:
        start, stop = np.searchsorted(times, [event - int(seconds * 1e9), event])
        if stop <= start:
            continue
        above = np.flatnonzero(scores[start:stop] > threshold)
        lead = (event - times[start + above[0]]) / 1e9 if len(above) else math.nan
        table.append((int(event), bool(len(above)), lead))
    return pd.DataFrame(table, columns=["t", "caught", "lead"])


def nulls(labels: np.ndarray, elapsed_since_event: np.ndarray) -> dict[str, float]:
    """Return average precisions of what knows nothing of the sensors: chance, the share of the rows before an event;
    and `again`, that the last event comes again (the sooner after it the likelier)."""
    return {"chance": float(labels.mean()), "again": average_precision(-elapsed_since_event, labels)}


def since_event(times: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Return (T) seconds since the last event at each time; a century before the first."""
    if not len(events):
        return np.full(len(times), 3.15e9)
    last = np.searchsorted(events, times, side="right") - 1
    return np.where(last >= 0, (times - events[last.clip(min=0)]) / 1e9, 3.15e9)


def clock_shift(
    logits: np.ndarray, times: np.ndarray, events: np.ndarray, seconds: float, step: float, most: float = 86_400
) -> float:
    """Return by how many seconds the events' clock is ahead of the log's, as far as alarms tell: the shift, up to
    `most` either way, after which events come where alarms are highest. 0 where fewer than 5 events are there, or where
    no shift makes the mean probability in the `seconds` before events twice what it is, and at least a half."""
    if len(events) < 5:
        return 0.0
    sums = np.concatenate([[0.0], np.cumsum(1 / (1 + np.exp(-logits.astype(np.float64))))])
    shifts = np.arange(-(most // step), most // step + 1) * step
    means = np.zeros(len(shifts))
    for i, shift in enumerate(shifts):
        moved = events - int(shift * 1e9)
        start, stop = np.searchsorted(times, moved - int(seconds * 1e9)), np.searchsorted(times, moved)
        there = stop > start
        if there.sum() >= 5:
            means[i] = ((sums[stop] - sums[start])[there] / (stop - start)[there]).mean()
    best = int(means.argmax())
    clear = means[best] >= 0.5 and means[best] >= 2 * means[np.abs(shifts).argmin()]
    return float(shifts[best]) if clear else 0.0
