"""Logs of a made-up plant, whose failures have a cause that lies long before them.

A press works on lots, each with a number of its own (two digits of base LEVELS, the sensors `lot_a` and `lot_b`). When
a lot is struck, `vib` bursts for STRIKE rows; meanwhile `press` is high (the lot is damaged) or low (it is not). A lag
later the same lot is charged cold: `temp` dips for `warning` rows. Where the lot was damaged, a failure follows when
the dip ends; where it was not, nothing does. A dip so says when a failure may come, and only the strike of that lot, a
lag before, says whether it will. Lags are drawn log-uniformly.

    strike: vib bursts, press high or low, lot 7.3   ... lag ...   dip: temp falls, lot 7.3   -> failure, or none

Between them the sensors wander, `temp` over a day as well, and other lots pass. Who sees dips and no strikes is right
in half of them: that is the chance level of a model with no memory. The plant is this project's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rnn_longctx.errors import InputError

SENSORS = ("temp", "vib", "press", "lot_a", "lot_b")
LEVELS = 32  # of each digit of a lot's number
STRIKE = 12  # rows
STEP = 60  # seconds from a row to the next
DAY = 24 * 60  # rows
BEGIN = "2026-01-01T00:00:00+00:00"


@dataclass(frozen=True)
class Plant:
    """What is made.

    Attributes:
        rows: of the log, a minute each.
        longest: the longest lag from a strike to its dip, in rows; the shortest is `shortest`.
        every: rows from a dip to the next, on average.
        warning: rows of a dip, which is the time from the first sign to the failure.
        missing: share of the values that are lost.
        drift_at: row from which the sensors drift: over `drift_over` rows `temp` rises by `drift`, in standard
            deviations of it, and `press` sinks by half as much; None: never.
    """

    rows: int = 40_000
    longest: int = 1000
    shortest: int = 32
    every: int = 100
    warning: int = 12
    missing: float = 0.0
    drift_at: int | None = None
    drift_over: int = 2000
    drift: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = STRIKE + self.warning
        if self.shortest <= least:
            raise InputError(f"shortest: expected more than {least} rows, a strike and a dip, got {self.shortest}")
        if self.longest < self.shortest:
            raise InputError(f"longest: expected at least the shortest lag, {self.shortest}, got {self.longest}")
        if self.rows < 2 * self.longest:
            raise InputError(f"rows: expected at least twice the longest lag, {2 * self.longest}, got {self.rows}")
        if self.every < 3 * least:
            raise InputError(f"every: expected at least {3 * least} rows, three strikes and dips, got {self.every}")
        if not 0 <= self.missing < 1:
            raise InputError(f"missing: expected a share from 0 to below 1, got {self.missing}")


@dataclass(frozen=True, eq=False)
class Made:
    """A plant's log and what happened in it.

    Attributes:
        log: columns t and SENSORS, a row a minute.
        events: column t, when something failed.
        truth: a row a dip: strike and dip, rows of the log where they begin; lag; damaged.
    """

    log: pd.DataFrame
    events: pd.DataFrame
    truth: pd.DataFrame


def make_plant(plant: Plant) -> Made:
    """Return the log of a plant. The same settings give the same log."""
    rng = np.random.default_rng(plant.seed)
    truth = _episodes(plant, rng)
    values = _background(plant.rows, rng)
    for strike, dip, damaged, lot in zip(truth.strike, truth.dip, truth.damaged, truth.lot):
        at, cold = slice(strike, strike + STRIKE), slice(dip, dip + plant.warning)
        values["vib"][at] += 6 + rng.normal(0, 0.5, STRIKE)
        values["press"][at] += (6 if damaged else -6) + rng.normal(0, 0.5, STRIKE)
        values["temp"][cold] -= 6 + rng.normal(0, 0.5, plant.warning)
        for rows in (at, cold):
            values["lot_a"][rows], values["lot_b"][rows] = lot // LEVELS, lot % LEVELS
    if plant.drift_at is not None:
        risen = np.clip((np.arange(plant.rows) - plant.drift_at) / plant.drift_over, 0, 1) * plant.drift
        values["temp"] += risen
        values["press"] -= risen / 2
    values["temp"], values["press"] = 70 + 5 * values["temp"], 12 + 0.8 * values["press"]  # degrees C, bar
    values["vib"] = 2 + 0.4 * values["vib"]  # mm/s
    log = pd.DataFrame({name: values[name] for name in SENSORS})
    if plant.missing:
        log = log.mask(rng.random(log.shape) < plant.missing)
    times = pd.date_range(BEGIN, periods=plant.rows, freq=f"{STEP}s")
    log.insert(0, "t", times)
    failed = truth.dip[truth.damaged] + plant.warning
    return Made(log, pd.DataFrame({"t": times[failed]}), truth.drop(columns="lot"))


def _episodes(plant: Plant, rng: np.random.Generator) -> pd.DataFrame:
    """Return a row a dip, in the order of dips: strike, dip, lag, damaged, lot. No two strikes or dips overlap, and no
    lot is struck again while another of its number is not charged."""
    taken = np.zeros(plant.rows + plant.warning + 1, bool)
    free = np.full(LEVELS**2, -1)  # the row from which a number may be used again
    rows = []
    spread = math.log((plant.longest + 1) / plant.shortest)
    for dip in np.sort(rng.choice(plant.rows - plant.warning - 1, plant.rows // plant.every, replace=False)):
        lag = min(plant.longest, int(plant.shortest * math.exp(spread * rng.random())))
        strike = dip - lag
        if (
            strike < 0
            or taken[dip - 1 : dip + plant.warning + 1].any()
            or taken[strike - 1 : strike + STRIKE + 1].any()
        ):
            continue
        lots = np.flatnonzero(free < strike)
        if not len(lots):
            raise InputError(f"every: more lots wait than there are numbers; expected more than {plant.every} rows")
        # the number that was used longest ago, so that the same one stands twice in a context as rarely as can be
        lot = lots[np.argmin(free[lots] + rng.random(len(lots)))]
        free[lot] = dip + plant.warning
        taken[dip : dip + plant.warning] = taken[strike : strike + STRIKE] = True
        rows.append((strike, dip, lag, bool(rng.random() < 0.5), int(lot)))
    return pd.DataFrame(rows, columns=["strike", "dip", "lag", "damaged", "lot"])


def _background(rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return each sensor's values where nothing happens: standard deviations of about 1, and numbers of passing
    lots."""

    def wandering(stay: float) -> np.ndarray:  # x <- stay x + noise, of a standard deviation of 1
        noise = pd.Series(rng.normal(0, math.sqrt(1 - stay**2) / (1 - stay), rows))
        return noise.ewm(alpha=1 - stay, adjust=False).mean().to_numpy(copy=True)

    day = np.sin(2 * np.pi * np.arange(rows) / DAY)
    lots = np.repeat(rng.integers(0, LEVELS**2, rows // 10 + 1), 10)[:rows]
    return {
        "temp": 0.6 * wandering(0.95) + 0.8 * day,
        "vib": wandering(0.3),
        "press": wandering(0.3),
        "lot_a": (lots // LEVELS).astype(float),
        "lot_b": (lots % LEVELS).astype(float),
    }
