"""The size of state that a context needs, from the fits of a study or, without one, from the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from rnn_longctx.config import format_length, home_path
from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import fits as fitting
from rnn_longctx.eval.capacity import paper, tables
from rnn_longctx.eval.capacity.fits import MILLION, K
from rnn_longctx.eval.tables.sheets import kind_of
from rnn_longctx.mitigations import parse_remedy

PAPER_RECALL = 0.95
GAP = 1.3  # shortest length that fails over longest that passes; a search leaves 1.125, at short lengths a little more


@dataclass(frozen=True)
class Advice:
    """`state`: numbers of one stream's recurrent state, scan and convolution together, inf where the fit never gets
    there, NaN where none follows since the fit does not grow with it; low, high: its 95% interval, NaN where it is not
    known. train_length: tokens to train such a state on so that it forgets, by T_forget's fit, None without one.
    `speed`: tokens a second on `device`, None if not known. `measured`: what the shapes of the study do, fits apart.
    `warnings`: why not to trust it."""

    context: int
    recall: float
    state: float
    low: float
    high: float
    train_length: float | None
    speed: float | None
    source: str
    warnings: list[str] = field(default_factory=list)
    device: str | None = None
    measured: str | None = None

    def __str__(self) -> str:
        if math.isnan(self.state):
            lines = [
                f"no size follows for {format_length(self.context)} tokens: what is recalled does not grow with the "
                f"state, by {self.source}"
            ]
        elif math.isinf(self.state):
            lines = [f"no state is large enough for {format_length(self.context)} tokens by {self.source}"]
        else:
            interval = "" if math.isnan(self.low) else f" ({_size(self.low)} to {_size(self.high)})"
            lines = [
                f"recall of {self.recall:g} at {format_length(self.context)} tokens: a state of {_size(self.state)} "
                f"numbers{interval}, by {self.source}",
                f"memory: {_memory(4 * self.state)} a stream in float32, {_memory(2 * self.state)} in bfloat16",
            ]
            if self.train_length is not None:
                tokens = (
                    f"{self.train_length:,.0f} tokens" if self.train_length > 0 else "none follows, its fit is below 0"
                )
                lines.append(f"training length from which it forgets: {tokens}")
            speed = "not known" if self.speed is None else f"{self.speed:,.0f} tokens/s read on {self.device}"
            lines.append(f"speed of such a model: {speed}")
        lines += [f"measured: {self.measured}"] if self.measured else []
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def advise(
    context: int, recall: float = PAPER_RECALL, study: str | Path | None = None, mitigation: str = "none"
) -> Advice:
    """The state needed to recall at `context` tokens.

    Args:
        study: a folder of tables; None takes the fits of Stuffed Mamba (arXiv 2410.07145).
    Raises:
        InputError: no tables there, or too few points for a fit that grows; another recall than the paper's without
            a study.
    """
    if not 0 < recall < 1:
        raise InputError(f"recall lies between 0 and 1, got {recall}")
    return _by_paper(context, recall) if study is None else _by_study(context, recall, home_path(study), mitigation)


def _by_paper(context: int, recall: float) -> Advice:
    if recall != PAPER_RECALL:
        raise InputError(f"the paper fits a recall of {PAPER_RECALL} alone; measure another with a study of your own")
    recalls, forgets = paper.of("T_recall"), paper.of("T_forget")
    assert recalls is not None and forgets is not None
    curve, sizes, lengths = recalls
    state = fitting.inverse(curve, context / K)
    fitted = fitting.fit(curve.form, sizes, lengths)
    assert fitted is not None and fitted.carrier is not None
    _, low, high = fitted.needed(context / K)
    warnings = [
        f"of other models than yours: {len(sizes)} Mamba-2s of 36M to 370M parameters, trained further on long texts",
        f"the interval is of an exponential through so few points that one carries it "
        f"({lengths[fitted.carrier]:g}K tokens at {sizes[fitted.carrier]}M): one left out gives an R² of "
        f"{fitted.r2_loo:.2f}",
        *_beyond(state, min(sizes), max(sizes)),
    ]
    train = float(forgets[0](np.array([state]))[0]) * K
    ends = (min(state, low) * MILLION, max(state, high) * MILLION)  # its own fit takes one point more
    return Advice(context, recall, state * MILLION, *ends, train, None, "the fit of Stuffed Mamba", warnings)


def _by_study(context: int, recall: float, study: Path, mitigation: str) -> Advice:
    results, about = tables.read(study)
    points = tables.points(tables.findings(results, about, recall))
    if not len(points):
        raise InputError(f"{study} holds no findings of T_forget or T_recall")
    mitigation = str(parse_remedy(mitigation))  # as tables write it
    under = points[points["mitigation"] == mitigation]
    if not len(under):
        known = ", ".join(points["mitigation"].unique())
        raise InputError(f"{study} has nothing measured under {mitigation}; it has {known}")
    recalls = under[under["quantity"] == "T_recall"]
    fitted = _fit(recalls)
    if fitted is None:
        seen = f" ({_measured(results, about, recalls, context)})" if len(recalls) else ""
        raise InputError(f"{study} has too few points of T_recall under {mitigation} for a fit{seen}")
    form, f, doubts = fitted
    state, low, high = f.needed(context / K) if f.curve.grows else (math.nan,) * 3
    warnings = _beyond(state, float(f.s.min()), float(f.s.max())) + doubts
    exact = recalls[recalls["bound"] == ""]
    if (gap := float((exact["fails"] / exact["value"]).max())) > GAP:
        warnings.append(
            f"some T_recalls are known to a factor of {gap:.2g} only: the search was for another recall, or ended early"
        )
    if math.isinf(high):
        warnings.append("the upper end of the interval is unbounded: some resampled fits never reach this context")
    forget = _fit(under[under["quantity"] == "T_forget"])
    train = None if forget is None or not math.isfinite(state) else float(forget[1].curve(np.array([state]))[0]) * K
    if forget is None:
        warnings.append("too few points of T_forget for a fit: the training length it takes to forget is not known")
    elif train is not None:
        sizes = forget[1].s
        outside = _beyond(state, float(sizes.min()), float(sizes.max()))
        warnings += [f"of the training length: {w}" for w in outside + forget[2]]
    source = f"the {form} through {len(f.s)} points (R² {f.r2:.3f}, one left out {f.r2_loo:.3f})"
    if form == "constant":
        source = f"the {len(f.s)} points, which no form fits better than a constant of {f.curve.c:.3g}K tokens"
    elif not f.curve.grows:
        source += ", which falls"
    speed, device = (None, None) if not math.isfinite(state) else _speed(results, about, mitigation, state)
    needed = (state * MILLION, low * MILLION, high * MILLION)
    return Advice(
        context, recall, *needed, train, speed, source, warnings, device, _measured(results, about, recalls, context)
    )


def _measured(results: pd.DataFrame, about: pd.DataFrame, recalls: pd.DataFrame, context: int) -> str:
    """What a person can go by where no fit says anything: the smallest shape that does it, and what it takes."""
    if not len(shown := recalls[recalls["bound"] != "below"]):
        return "no shape recalls anything, by the median of seeds"
    enough = shown[shown["value"] >= context]
    if not len(enough):
        longest = shown.sort_values("value").iloc[-1]
        return f"no shape is shown to recall as much, by the median of seeds; the longest is {_length(longest)}"
    least = enough.sort_values("state_elements").iloc[0]
    state, low = float(least["state_elements"]), int(least["low"])
    seeds = f", {format_length(low) if low else 'none'} to {format_length(int(least['high']))} by seed"
    speed, device = _speed(results, about, least["mitigation"], state / MILLION)
    return (
        f"{len(enough)} of {len(recalls)} shapes recall as much, by the median of seeds; the smallest, "
        f"{least['shape']}, has {_size(state)} numbers ({_memory(4 * state)} a stream in float32) and recalls "
        f"{_length(least)}{seeds if least['seeds'] > 1 else ''}"
        + ("" if speed is None else f"; {speed:,.0f} tokens/s read on {device}")
    )


def _length(point: pd.Series) -> str:
    """Return a T_recall in words, "at least" where the longest length measured passes."""
    length = format_length(int(point["value"]))
    return f"at least {length} (the longest measured)" if point["bound"] == "above" else length


def _fit(points: pd.DataFrame) -> tuple[str, fitting.Fit, list[str]] | None:
    """The best form through the points that are more than a bound, its fit, and what speaks against it."""
    exact, bounds = points[points["bound"] == ""], points[points["bound"] != ""]
    fits = fitting.fit_all((exact["state_elements"] / MILLION).to_list(), (exact["value"] / K).to_list())
    form = fitting.best(fits)
    if form is None:
        return None
    f, doubts = fits[form], []
    if len(bounds):
        broken = fitting.contradicted(f.curve, bounds)
        doubts.append(
            f"{len(bounds)} of {len(points)} points are known only as a bound and not fitted; the {form} "
            f"contradicts {broken or 'none'} of them"
        )
    if f.r2_loo < 0.5 and form != "constant":
        doubts.append(f"the {form} predicts points left out with an R² of {f.r2_loo:.2f}: hardly a fit")
    return form, f, doubts


def _beyond(state: float, least: float, most: float) -> list[str]:
    if not math.isfinite(state) or least <= state <= most:
        return []
    words = f"{state / most:.1f} times the largest" if state > most else f"{state / least:.2f} of the smallest"
    return [f"extrapolates: a state of {words} that was measured ({_size(least * MILLION)} to {_size(most * MILLION)})"]


def _speed(
    results: pd.DataFrame, about: pd.DataFrame, mitigation: str, state: float
) -> tuple[float | None, str | None]:
    """Tokens a second over the state, a line in logarithms through what reading the text took on one device, that of
    the most rows; only within what was measured, since a larger model is another matter."""
    losses = results["metric"].map(kind_of) == "loss"
    rows = results[losses & (results["mitigation"] == mitigation)].dropna(subset=["tokens_per_second"])
    device = rows["device"].mode().min() if len(rows) else None
    rows = (
        rows[rows["device"] == device].sort_values("length").groupby(["model", "weights_hash"], as_index=False).last()
    )
    joined = about.merge(rows[["model", "weights_hash", "tokens_per_second"]], on=["model", "weights_hash"])
    s = joined["state_elements"].to_numpy(float) / MILLION
    if len(joined) == 0 or not s.min() <= state <= s.max():
        return None, None
    if s.min() == s.max():
        return float(joined["tokens_per_second"].median()), device
    slope, start = np.polyfit(np.log(s), np.log(joined["tokens_per_second"].to_numpy(float)), 1)
    return float(np.exp(start + slope * np.log(state))), device


def _size(n: float) -> str:
    if math.isinf(n):
        return "any"
    return f"{n / MILLION:.3g}M" if n >= MILLION else f"{n / 1000:.3g}K"


def _memory(n: float) -> str:
    return f"{n / 2**20:.3g} MiB" if n >= 2**20 else f"{n / 1024:.3g} KiB"
