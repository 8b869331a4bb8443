"""Whether a sensor of another log is written in another unit than in the one that a model was fitted to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rnn_longctx.errors import InputError
from rnn_longctx.sensors.model import QUANTILES, Scales
from rnn_longctx.sensors.read import Log

# (from, to): a value in the second unit is factor * value + shift
UNITS = {
    ("degrees C", "degrees F"): (1.8, 32.0),
    ("degrees C", "kelvin"): (1.0, 273.15),
    ("degrees F", "kelvin"): (1 / 1.8, 459.67 / 1.8),
    ("bar", "psi"): (14.503774, 0.0),
    ("bar", "kPa"): (100.0, 0.0),
    ("psi", "kPa"): (6.894757, 0.0),
    ("mm/s", "in/s"): (1 / 25.4, 0.0),
    ("a unit", "a thousandth of it"): (1000.0, 0.0),
}
FITS = 1.0  # spreads (of the log fitted to) that each quantile may be off
AWAY = 10.0  # of them: a median as far off is no drift


def in_known_units(log: Log, scales: Scales) -> Log:
    """Return a log whose sensors are in the units of the log that scales are of: where a sensor's quantiles are off,
    and a change of unit puts them right, it is undone, and listed.

    Raises InputError: a sensor whose median is AWAY from what was fitted to, and that no known unit explains.
    """
    values, repairs = log.values.copy(), list(log.repairs)
    for s, name in enumerate(log.sensors):
        there, spread = scales.quantiles[s], scales.spread[s]
        here = np.nanquantile(values[:, s], QUANTILES)
        if (off := np.abs(here - there).max() / spread) <= FITS:
            continue
        best = min(
            (_off(here, there, factor, shift) / spread, text, factor, shift) for text, factor, shift in _changes()
        )
        error, text, factor, shift = best
        if error <= FITS and error < off / 4:
            values[:, s] = values[:, s] * factor + shift
            repairs.append(f"{name}: {text} (x {factor:.6g} {shift:+.6g}), as in the log that was fitted to")
        elif (moved := abs(here[2] - there[2]) / spread) > AWAY:
            raise InputError(
                f"{log.name}: sensor {name!r} has a median of {here[2]:.6g}, in the log that was fitted to "
                f"{there[2]:.6g}: {moved:.0f} standard deviations off, and no change of unit known here explains it"
            )
    return replace(log, values=values, repairs=repairs)


def _changes() -> list[tuple[str, float, float]]:
    """Return what turns a value back, in words and as a factor and what is added to it."""
    out = []
    for (first, second), (factor, shift) in UNITS.items():
        out.append((f"{second} brought to {first}", 1 / factor, -shift / factor))
        out.append((f"{first} brought to {second}", factor, shift))
    return out


def _off(here: np.ndarray, there: np.ndarray, factor: float, shift: float) -> float:
    return float(np.abs(here * factor + shift - there).max())
