"""Intervals for what is measured on a handful of slices or prompts, and the verdict: does this collapse?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from rnn_longctx.config import format_length


class Interval(NamedTuple):
    """A point estimate, its interval and the number of samples behind it; low and high are NaN when n < 2."""

    value: float
    low: float
    high: float
    n: int


class Verdict(NamedTuple):
    """`first_failing`: the shortest measured length that collapses, in tokens, or None; `text` in words. Whether a
    model collapses whose loss is no number within its training length cannot be said: None."""

    first_failing: int | None
    text: str


def mean_stderr(samples: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (deviation with n - 1, over sqrt(n)); NaN where there are too few."""
    x = np.asarray(samples, dtype=float)
    if x.size == 0:
        return math.nan, math.nan
    with np.errstate(invalid="ignore"):  # infinite ones have no spread
        return float(x.mean()), float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.nan


# The 97.5% quantile of Student's t with 1, 2, ... 18 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101)  # fmt: skip


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t; beyond the table by its expansion about the
    normal's (Abramowitz and Stegun 26.7.5), to 1e-3."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], n_boot: int = 2000, seed: int = 0) -> Interval:
    """Mean of a - b and its 95% interval; a[i] and b[i] were measured on the same slice.

    From 20 slices on the percentile bootstrap: slices are resampled with replacement, always in pairs, so that what
    is hard about a slice cancels. Below, where that is too narrow (at 4 slices it excludes 0 by chance once in 5),
    Student's t on the differences. ValueError: sizes differ, or there are none.
    """
    with np.errstate(invalid="ignore"):  # two infinite losses have no difference
        d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float) if len(a) == len(b) else np.empty(0)
    if d.size == 0:
        raise ValueError(f"pairs need as many samples on both sides, and some: got {len(a)} and {len(b)}")
    if d.size == 1 or not np.isfinite(d).all():
        return Interval(float(d.mean()), math.nan, math.nan, d.size)
    if d.size < 20:
        half = student(d.size - 1) * float(d.std(ddof=1)) / math.sqrt(d.size)
        return Interval(float(d.mean()), float(d.mean()) - half, float(d.mean()) + half, d.size)
    picks = np.random.default_rng(seed).integers(0, d.size, size=(n_boot, d.size))
    low, high = np.quantile(d[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(d.mean()), float(low), float(high), d.size)


def crossed(samples: Sequence[Sequence[float]]) -> Interval:
    """Mean over models (seeds) of values on the same slices, samples[seed][slice], and its 95% interval.

    Both seeds and slices were drawn: the variances of the mean that the one and the other show are added, and degrees
    of freedom are Satterthwaite's. The noise within a cell is counted in both, so the interval is rather too wide. One
    seed gives the interval over slices, one slice that over seeds. ValueError: no samples, or not the same slices.
    """
    if not samples or not len(samples[0]) or any(len(row) != len(samples[0]) for row in samples):
        raise ValueError(f"expected as many samples of every seed, and some: got {[len(row) for row in samples]}")
    x = np.asarray(samples, dtype=float)
    n = x.shape[1]
    with np.errstate(invalid="ignore"):  # infinite ones may have no mean
        value = float(x.mean())
    if not np.isfinite(x).all() or x.size == 1:
        return Interval(value, math.nan, math.nan, n)
    parts = [(means.var(ddof=1) / len(means), len(means) - 1) for means in (x.mean(1), x.mean(0)) if len(means) > 1]
    variance = sum(v for v, _ in parts)
    if not variance:
        return Interval(value, value, value, n)
    freedom = max(1, int(1e-9 + variance**2 / sum(v**2 / f for v, f in parts)))  # (a whole number stays one)
    half = student(freedom) * math.sqrt(variance)
    return Interval(value, value - half, value + half, n)


def wilson(successes: float, n: float, level: float = 0.95) -> Interval:
    """Proportion with Wilson's score interval (1927), which stays sensible at 0 and n successes out of n. Of answers
    that hang together, `n` is the effective number, and need not be whole."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"successes must lie in 0..n with n > 0: got {successes} of {n}")
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / n
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The ends are 0 and 1 exactly where all failed or all succeeded; rounding would leave 1e-17.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Interval(p, low, high, int(n))


def peak_within(
    lengths: Sequence[int], losses: Sequence[float], train_length: int, peak: float | None = None
) -> float | None:
    """The highest loss seen within the training length: `peak` if measured, else the loss at the largest
    length <= train_length, else None."""
    if peak is not None and not math.isnan(peak):
        return peak
    within = [(length, loss) for length, loss in zip(lengths, losses) if length <= train_length]
    return max(within)[1] if within else None


def not_finite(lengths: Sequence[int], losses: Sequence[float]) -> str | None:
    """Where losses are no numbers, in words, or None: "the loss is not a number from 1K on"."""
    pairs = sorted(zip(lengths, losses))
    bad = [length for length, loss in pairs if not math.isfinite(loss)]
    if not bad:
        return None
    what = "infinite" if all(math.isinf(loss) for _, loss in pairs if not math.isfinite(loss)) else "not a number"
    on = len(bad) > 1 and all(length in bad for length, _ in pairs if length >= bad[0])
    return f"the loss is {what} " + (f"from {format_length(bad[0])} on" if on else f"at {_and(bad)}")


def _and(lengths: Sequence[int]) -> str:
    *before, last = map(format_length, lengths)
    return f"{', '.join(before)} and {last}" if before else last


def verdict(
    lengths: Sequence[int], losses: Sequence[float], train_length: int | None, peak: float | None = None
) -> Verdict:
    """Does a model collapse? (Stuffed Mamba, arXiv 2410.07145 v2+: the T_forget rule.)

    It fails at a length beyond its training length if its loss there exceeds twice the highest loss seen
    within the training length. `losses` are nats per token over positions (L/2, L] at each of `lengths`, in
    any order; NaN and infinite ones fail, and within the training length allow no verdict. `peak` is the highest mean
    loss over bins of (0, train_length]; without it, see peak_within.
    """
    bad = not_finite(lengths, losses)
    if train_length is None:
        return Verdict(None, "training length unknown" + (f"; {bad}" if bad else ""))
    if bad and any(length <= train_length and not math.isfinite(loss) for length, loss in zip(lengths, losses)):
        return Verdict(
            None,
            f"{bad}, already within the training length, so whether it collapses cannot be said: "
            "measure in float32, or look at the weights",
        )
    beyond = sorted((length, loss) for length, loss in zip(lengths, losses) if length > train_length)
    if not beyond:
        return Verdict(None, "not measured beyond the training length")
    peak = peak_within(lengths, losses, train_length, peak)
    if peak is None:
        return Verdict(None, "not measured within the training length")
    for length, loss in beyond:
        if not loss <= 2 * peak:  # "not <=" rather than ">", so that NaN fails
            why = f"{loss:.2f} > 2 x {peak:.2f}" if math.isfinite(loss) else bad
            return Verdict(length, f"collapses at {format_length(length)} ({why})")
    return Verdict(None, f"no collapse up to {format_length(beyond[-1][0])}")
