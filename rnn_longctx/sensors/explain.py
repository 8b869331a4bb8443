"""Why an alarm: the stretches of the log that a sparse layer read for it, in the words of the log.

The layers say which blocks each head chose (`rnn_longctx.probes.links`). A stretch is named by its time, how long
before the alarm it lies, and the sensors that stand out there: of each the value that is furthest from its median. That
a stretch was read does not say that it caused the alarm; `rnn_longctx.probes.links.held` says how often what is read
holds a known cause.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.probes.links import links_of_rows, sparse_layers
from rnn_longctx.sensors.fit import rows_of_log
from rnn_longctx.sensors.model import SensorModel
from rnn_longctx.sensors.read import SECOND, Log

UNUSUAL = 3.0  # robust standard deviations from which on a value stands out


def alarm_links(model: SensorModel, log: Log, rows: list[int]) -> pd.DataFrame | None:
    """Return what sparse layers read beyond their window for rows of a log: columns as of
    `rnn_longctx.probes.links.links`. None where no layer chooses what it reads."""
    if not rows or not sparse_layers(model.lm):
        return None
    inputs: Tensor = rows_of_log(model.scales, log)
    with torch.no_grad():
        table = links_of_rows(model.lm, inputs[None], sorted(set(rows)))
    return table[table["kind"] == "chosen"].reset_index(drop=True)


def in_words(model: SensorModel, log: Log, row: int, links: pd.DataFrame, most: int = 3) -> list[dict[str, Any]]:
    """Return the stretches read for a row, the best of each head first, a mapping each: from, to (times), lag_rows,
    lag_seconds, layer, head, and sensors, what stands out there: name, time, value, and deviations."""
    found = []
    for _, read in links[links["query"] == row].groupby(["layer", "head"]):
        for start, stop in list(zip(read["start"], read["stop"]))[:most]:
            found.append(
                {
                    "from": log.when(start),
                    "to": log.when(stop - 1),
                    "lag_rows": int(row - start),
                    "lag_seconds": round(float(log.times[row] - log.times[start]) / SECOND),
                    "layer": int(read["layer"].iloc[0]),
                    "head": int(read["head"].iloc[0]),
                    "sensors": _standing_out(model, log, start, stop),
                }
            )
    return found


def _standing_out(model: SensorModel, log: Log, start: int, stop: int) -> list[dict[str, Any]]:
    standard = model.scales.standard(log.values[start:stop])
    found = []
    for name, column, values in zip(log.sensors, standard.T, log.values[start:stop].T):
        if np.isnan(column).all():
            continue
        at = int(np.nanargmax(np.abs(column)))
        if abs(column[at]) >= UNUSUAL:
            about = {"sensor": name, "time": log.when(start + at), "value": float(f"{values[at]:.6g}")}
            found.append(about | {"deviations": round(float(column[at]), 1)})
    return sorted(found, key=lambda one: -abs(one["deviations"]))
