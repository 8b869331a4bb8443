"""How lengths grow with the size of the state: constant, line, power law and exponential, by least squares.

States s are in millions of numbers, lengths y in K tokens, as in Stuffed Mamba (arXiv 2410.07145), which fits a line to
T_forget and an exponential to T_recall. For a given k the curves y = c + a f(s; k) are linear in a and c, so only k is
searched (variable projection): no starting values, no local optimum missed on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from rnn_longctx.eval.stats import student

MILLION, K = 1e6, 1024
AXES = ("state_elements", "scan_state_elements", "parameters")
FORMS = ("constant", "line", "power", "exponential")
_PARAMETERS = {"constant": 1, "line": 2, "power": 2, "exponential": 3}
_BOOT, _GRID = 400, 161  # resamples of the points; values of k tried
_HUGE = 600.0  # e^_HUGE, and some more, is still a number
_LEAST = 1e-2  # |k| times the range of s, of an exponential: with less it would only be a line
_TEXT = {
    "constant": "y = {c:.4g}",
    "line": "y = {a:.4g} s {c:+.4g}",
    "power": "y = {a:.4g} s^{k:.4g}",
    "exponential": "y = {a:.4g} exp({k:.4g} s) {c:+.4g}",
}
Array = np.ndarray


@dataclass(frozen=True)
class Curve:
    """y = c + a f(s; k), with f = s (line), s^k (power, c = 0) or exp(k s); a = 0 for the constant."""

    form: str
    a: float
    c: float
    k: float

    def __call__(self, s: Array) -> Array:
        return self.c + self.a * _shape(self.form, np.asarray(s, float), self.k)

    @property
    def grows(self) -> bool:
        return self.form != "constant" and self.a * (1.0 if self.form == "line" else self.k) > 0

    def __str__(self) -> str:
        return _TEXT[self.form].format(a=self.a, c=self.c, k=self.k)


@dataclass(frozen=True)
class Fit:
    """A curve and how far to trust it.

    Attributes:
        s, y: the points, millions of numbers and K tokens.
        resampled: the curves of bootstrap samples of the points.
        r2, r2_loo: of the fit, and of predicting every point from the others (below 0: worse than their mean);
            r2_without: of the fit to the others without the point that carries it. NaN where there are too few points.
        aic: Akaike's, with the variance as a parameter; the smaller the better.
        carrier: index of the point that the others predict worst, None with too few points.
    """

    curve: Curve
    s: Array
    y: Array
    resampled: tuple[Curve, ...]
    r2: float
    r2_loo: float
    r2_without: float
    aic: float
    carrier: int | None

    @property
    def tail(self) -> float:
        """Where a 95% interval ends, as a share of the resamples: Hesterberg's expanded percentile (arXiv 1411.5279),
        since resampled fits of few points lie too close together (the percentiles themselves held the truth of a line
        through 5 points 82 to 88 times in 100, these 93 to 95)."""
        n, freedom = len(self.s), len(self.s) - _PARAMETERS[self.curve.form]
        return NormalDist().cdf(-math.sqrt(n / freedom) * student(freedom))

    def interval(self, s: Array) -> tuple[Array, Array]:
        """The 95% bootstrap interval of the curve at states `s`; NaN where there are too few points."""
        s = np.asarray(s, float)
        if not self.resampled:
            return np.full(s.shape, np.nan), np.full(s.shape, np.nan)
        curves = np.stack([curve(s) for curve in self.resampled])
        low, high = np.quantile(curves, [self.tail, 1 - self.tail], axis=0)
        return low, high

    def needed(self, y: float) -> tuple[float, float, float]:
        """The state, in millions, where the curve reaches `y` K tokens, and its interval; inf where it never does."""
        sizes = sorted(inverse(curve, y) for curve in self.resampled)
        if not sizes:
            return inverse(self.curve, y), math.nan, math.nan
        ends = [sizes[round(q * (len(sizes) - 1))] for q in (self.tail, 1 - self.tail)]
        return inverse(self.curve, y), ends[0], ends[1]


def fit(form: str, s: Sequence[float], y: Sequence[float], n_boot: int = _BOOT, seed: int = 0) -> Fit | None:
    """The least-squares fit; None with fewer points than parameters. At that many it is exact, and r2 and aic NaN."""
    x, goal, least = np.asarray(s, float), np.asarray(y, float), _PARAMETERS[form]
    if len(np.unique(x)) < least or len(x) == 0:
        return None
    curve, n = _curve(form, x, goal), len(x)
    rss, total = float(((curve(x) - goal) ** 2).sum()), float(((goal - goal.mean()) ** 2).sum())
    r2 = 1 - rss / total if total > 0 and n > least else math.nan
    aic = n * math.log(max(rss / n, 1e-300)) + 2 * (least + 1) if n > least else math.nan
    keep = [np.arange(n) != i for i in range(n)]
    r2_loo, r2_without, carrier = math.nan, math.nan, None
    if n > least and total > 0 and all(len(np.unique(x[k])) >= least for k in keep):
        others = [_curve(form, x[k], goal[k]) for k in keep]
        missed = np.array([float(c(x[i : i + 1])[0] - goal[i]) for i, c in enumerate(others)])
        r2_loo, carrier = 1 - float((missed**2).sum()) / total, int(np.abs(missed).argmax())
        rest = goal[keep[carrier]]
        left = float(((rest - rest.mean()) ** 2).sum())
        if n - 1 > least and left > 0:
            r2_without = 1 - float(((others[carrier](x[keep[carrier]]) - rest) ** 2).sum()) / left
    return Fit(
        curve,
        x,
        goal,
        _resampled(form, x, goal, n_boot, seed) if n > least else (),
        r2,
        r2_loo,
        r2_without,
        aic,
        carrier,
    )


def fit_all(s: Sequence[float], y: Sequence[float], n_boot: int = _BOOT) -> dict[str, Fit]:
    """Every form that there are points for; none through fewer than three, which say nothing of a form."""
    if len(s) < 3:
        return {}
    fits = {form: fit(form, s, y, n_boot) for form in FORMS}
    return {form: one for form, one in fits.items() if one is not None}


def best(fits: dict[str, Fit]) -> str | None:
    """The form that predicts points left out best; by AIC where that is not known; None where none can be judged."""
    judged = {form: f for form, f in fits.items() if not math.isnan(f.r2_loo)}
    if judged:
        return max(judged, key=lambda form: judged[form].r2_loo)
    return min((f for f in fits if not math.isnan(fits[f].aic)), key=lambda form: fits[form].aic, default=None)


def table(points: pd.DataFrame, axes: Sequence[str] = AXES) -> pd.DataFrame:
    """A line a remedy, quantity, axis and form. Axes but the first are there to be compared with it, without intervals:
    is the size of the state what lengths go by? Points known only as a bound are counted (`bounds`) and not fitted;
    `contradicts` says how many of them a curve lies on the wrong side of."""
    lines = []
    for (mitigation, quantity), group in points.groupby(["mitigation", "quantity"], sort=False):
        exact, bounds = group[group["bound"] == ""], group[group["bound"] != ""]
        for axis in axes:
            s, y = exact[axis].astype(float) / MILLION, exact["value"].astype(float) / K
            fits = fit_all(s.to_list(), y.to_list(), _BOOT if axis == axes[0] else 0)
            chosen = best(fits)
            for form, f in fits.items():
                ends = _ends(f)
                carrier = None if f.carrier is None else exact["shape"].iloc[f.carrier]
                lines.append(
                    {
                        "mitigation": mitigation,
                        "quantity": quantity,
                        "axis": axis,
                        "form": form,
                        "best": form == chosen,
                        "points": len(exact),
                        "bounds": len(bounds),
                        "contradicts": contradicted(f.curve, bounds, axis),
                        "curve": str(f.curve),
                        "a": f.curve.a,
                        **ends["a"],
                        "c": f.curve.c,
                        **ends["c"],
                        "k": f.curve.k,
                        **ends["k"],
                        "r2": f.r2,
                        "r2_loo": f.r2_loo,
                        "aic": f.aic,
                        "carrier": carrier,
                        "r2_without": f.r2_without,
                    }
                )
    return pd.DataFrame(lines)


def contradicted(curve: Curve, bounds: pd.DataFrame, axis: str = AXES[0]) -> int:
    """How many points that are known only as a bound the curve lies on the wrong side of."""
    at, y = curve(bounds[axis].to_numpy(float) / MILLION), bounds["value"].to_numpy(float) / K
    above = bounds["bound"].to_numpy() == "above"
    return int(((at < y) & above | (at > y) & ~above).sum())


def _ends(f: Fit) -> dict[str, dict[str, float]]:
    """Bootstrap intervals of the parameters."""
    found = {}
    for name in ("a", "c", "k"):
        values = [getattr(curve, name) for curve in f.resampled]
        low, high = np.quantile(values, [f.tail, 1 - f.tail]) if values else (math.nan, math.nan)
        found[name] = {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _shape(form: str, s: Array, k: float | Array) -> Array:
    if form == "power":
        return s**k
    return np.exp(k * s) if form == "exponential" else s


def _curve(form: str, s: Array, y: Array) -> Curve:
    if form == "constant":
        return Curve(form, 0.0, float(y.mean()), 0.0)
    if form == "line":
        _, a, c = _linear(s[None], y, True)
        return Curve(form, float(a[0]), float(c[0]), 0.0)
    # a power from s^-8 to s^8; an exponential from one that bends by 1% over the range to one of e^30, either way
    if form == "power":
        grid, scale = np.linspace(-8, 8, _GRID), 1.0
    else:
        span = max(float(np.ptp(s)), 1e-12)
        most = min(30.0, max(2 * _LEAST, _HUGE * span / float(s.max())))  # of states close together, see _HUGE
        half = np.geomspace(_LEAST, most, _GRID // 2)
        grid, scale = np.concatenate([-half[::-1], half]), 1 / span
    shift = float(s.max()) if form == "exponential" else 0.0  # so that no exponential overflows
    unit = float(s.max()) if form == "power" else 1.0
    for _ in range(5):
        f = _shape(form, (s / unit - shift)[None], grid[:, None] * scale)
        rss, a, c = _linear(f, y, form == "exponential")
        i = int(rss.argmin())
        found, width = grid[i] * scale, max(grid[min(i + 1, len(grid) - 1)] - grid[i], grid[i] - grid[max(i - 1, 0)])
        result = float(a[i]), float(c[i]), float(found)
        grid = np.linspace(grid[i] - width, grid[i] + width, 21)
        if form == "exponential":
            grid = grid[np.abs(grid) >= _LEAST]
    a_, c_, k_ = result
    return Curve(form, a_ * math.exp(-k_ * shift) if form == "exponential" else a_ / unit**k_, c_, k_)


def _linear(f: Array, y: Array, intercept: bool) -> tuple[Array, Array, Array]:
    """For every row of f: the residual sum of squares, slope and intercept of y over it."""
    mean_f, mean_y = (f.mean(1, keepdims=True), y.mean()) if intercept else (np.zeros((len(f), 1)), 0.0)
    centred = f - mean_f
    square = (centred**2).sum(1)
    a = np.divide((centred * (y - mean_y)).sum(1), square, out=np.zeros(len(f)), where=square > 0)
    c = mean_y - a * mean_f[:, 0]
    return ((c[:, None] + a[:, None] * f - y) ** 2).sum(1), a, c


def _resampled(form: str, s: Array, y: Array, n_boot: int, seed: int) -> tuple[Curve, ...]:
    """Fits to points drawn with replacement; a draw with too few different states is drawn again."""
    rng = np.random.default_rng(seed)
    found: list[Curve] = []
    while len(found) < n_boot:
        picks = rng.integers(0, len(s), len(s))
        if len(np.unique(s[picks])) >= _PARAMETERS[form]:
            found.append(_curve(form, s[picks], y[picks]))
    return tuple(found)


def inverse(curve: Curve, y: float) -> float:
    """The state at which a growing curve reaches y; 0 where it is above from the start, inf where it never is."""
    rise = y - curve.c
    with np.errstate(all="ignore"):
        if curve.form == "constant" or curve.a == 0:
            return 0.0 if rise <= 0 else math.inf
        if not curve.grows:
            return math.inf
        if curve.form == "line":
            return max(0.0, rise / curve.a)
        if curve.form == "power":
            log = math.log(rise / curve.a) / curve.k
            return math.exp(log) if log < _HUGE else math.inf  # a curve that hardly grows
        share = rise / curve.a
        if curve.k > 0:
            return max(0.0, math.log(share) / curve.k) if share > 0 else 0.0
        return max(0.0, math.log(share) / curve.k) if share > 0 else math.inf  # rises to c and no further
