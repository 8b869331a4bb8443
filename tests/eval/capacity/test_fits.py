from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from rnn_longctx.eval.capacity import fits, paper
from rnn_longctx.eval.capacity.fits import fit, fit_all

TRUE = {
    "constant": lambda s, a, c, k: np.full(len(s), c),
    "line": lambda s, a, c, k: c + a * s,
    "power": lambda s, a, c, k: a * s**k,
    "exponential": lambda s, a, c, k: c + a * np.exp(k * s),
}


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("form", TRUE)
def test_exact_curves_are_found(rng, form):
    for _ in range(10):
        s = np.sort(rng.uniform(0.02, 20, 9))
        a, c, k = rng.uniform(0.5, 5), rng.uniform(-5, 5), rng.uniform(0.1, 0.6)
        y = TRUE[form](s, a, c, k)
        found = fit(form, s, y)
        assert found is not None
        wide = np.linspace(0.02, 20, 50)
        want = TRUE[form](wide, a, c, k)
        assert found.curve(wide) == pytest.approx(want, rel=1e-3, abs=1e-3 * np.ptp(y) + 1e-9)
        if form != "constant":
            assert found.r2 > 0.99999 and found.r2_loo > 0.9999
            goal = float(want[30])
            assert found.needed(goal)[0] == pytest.approx(wide[30], rel=2e-3)


def test_the_papers_points_give_its_fits():
    """To the accuracy of what was read off its figure, and only with a point that is no model: no state, no tokens."""
    for quantity, stated in (
        ("T_forget", lambda s: 5.172 * s - 4.469),
        ("T_recall", lambda s: 4.756 * (1.365**s - 1) - 0.742),
    ):
        curve, sizes, lengths = paper.of(quantity)
        assert curve(np.array(sizes)) == pytest.approx(stated(np.array(sizes)))
        refitted = fit(curve.form, (0, *sizes), (0, *lengths))
        assert (refitted.curve.a, refitted.curve.c, refitted.curve.k) == pytest.approx(
            (curve.a, curve.c, curve.k), rel=0.015
        )
        assert fit(curve.form, sizes, lengths).curve.c != pytest.approx(curve.c, rel=0.1)
    assert fit("line", *zip((0, 0), *paper.POINTS["T_forget"])).r2 == pytest.approx(0.985, abs=5e-4)
    assert paper.of("T_recall of words") == paper.of("T_recall") and paper.of("mqar") is None


def test_judgements_against_their_definitions(rng):
    s = rng.uniform(0.1, 3, 8)
    y = 2 * s + 1 + rng.normal(0, 0.5, 8)
    found = fit("line", s, y)
    slope, start = np.polyfit(s, y, 1)
    assert (found.curve.a, found.curve.c) == pytest.approx((slope, start))
    rest, total = y - slope * s - start, y - y.mean()
    assert found.r2 == pytest.approx(1 - (rest @ rest) / (total @ total))
    assert found.aic == pytest.approx(8 * math.log((rest @ rest) / 8) + 2 * 3)
    out = []
    for i in range(8):
        a, c = np.polyfit(np.delete(s, i), np.delete(y, i), 1)
        out.append(y[i] - a * s[i] - c)
    assert found.r2_loo == pytest.approx(1 - np.dot(out, out) / (total @ total))
    assert found.carrier == int(np.abs(out).argmax())
    constant = fit("constant", s, y)
    assert constant.r2 == pytest.approx(0, abs=1e-12) and constant.r2_loo < 0


def test_nonlinear_fits_are_as_good_as_scipys(rng):
    from scipy.optimize import curve_fit

    for form, start in (("power", (1, 1)), ("exponential", (1, 0.3, 0))):
        s = np.sort(rng.uniform(0.3, 8, 10))
        y = TRUE[form](s, 1.5, 2.0, 0.5) * (1 + rng.normal(0, 0.05, 10))
        curve = {"power": lambda s, a, k: a * s**k, "exponential": lambda s, a, k, c: c + a * np.exp(k * s)}[form]
        parameters, _ = curve_fit(curve, s, y, p0=start, maxfev=20_000)
        theirs = ((curve(s, *parameters) - y) ** 2).sum()
        ours = ((fit(form, s, y).curve(s) - y) ** 2).sum()
        assert ours <= theirs * (1 + 1e-4)


def test_one_point_that_carries_an_exponential_is_named(rng):
    s = np.array([0.8, 1.6, 2.4, 4.8, 12.9])
    y = np.array([2.0, 3.1, 4.2, 5.0, 256.0]) * rng.uniform(0.98, 1.02, 5)
    found = fit("exponential", s, y)
    assert found.carrier == 4 and found.r2 > 0.99 > found.r2_loo
    rest = fit("exponential", s[:4], y[:4])
    assert rest is not None and found.r2_without == pytest.approx(rest.r2)


def test_intervals_cover_the_truth(rng):
    inside = 0
    for i in range(20):
        s = rng.uniform(0.2, 4, 25)
        low, high = fit("line", s, 3 * s + 2 + rng.normal(0, 1, 25), n_boot=200, seed=i).interval(np.array([2.0]))
        inside += bool(low[0] <= 8 <= high[0])
    assert inside >= 14
    s, inside = np.geomspace(0.02, 0.28, 5), 0  # plain percentiles hold the truth 82 times in 100, these 94
    for i in range(150):
        found = fit("line", s, 20 * s + 1 + rng.normal(0, 0.6, 5), seed=i)
        low, high = found.interval(s)
        inside += int(((low <= 20 * s + 1) & (20 * s + 1 <= high))[[2, -1]].sum())
    assert inside >= 265
    s = rng.uniform(0.2, 4, 25)
    sure = fit("line", s, 3 * s + 2)
    state, low, high = sure.needed(11)
    assert (state, low, high) == pytest.approx((3, 3, 3))
    assert fit("line", s, 5 - s).needed(11)[0] == math.inf
    assert fit("constant", s, np.full(25, 5.0)).needed(4)[0] == 0


def test_too_few_points_say_nothing():
    assert fit("line", [1.0], [2.0]) is None and set(fit_all([], [])) == set()
    exact = fit("line", [1.0, 2.0], [3.0, 5.0])
    assert math.isnan(exact.r2) and math.isnan(exact.aic) and exact.carrier is None and exact.resampled == ()
    assert str(exact.curve) == "y = 2 s +1" and all(np.isnan(exact.interval([1.5])[0]))
    assert "exponential" not in fit_all([1.0, 2.0, 2.0], [3.0, 5.0, 5.1])
    assert fits.best({"line": exact}) is None
    assert fits.best(fit_all([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.1, 2.0, 2.9, 4.1, 5.0, 6.0])) in ("line", "power")


def test_the_table_leaves_bounds_out(rng):
    s = rng.uniform(0.1, 1, 6) * 1e6
    frame = pd.DataFrame({
        "mitigation": "none", "quantity": "T_recall", "shape": list("abcdef"), "state_elements": s,
        "scan_state_elements": s * rng.uniform(0.5, 2, 6), "parameters": rng.uniform(1, 9, 6) * 1e6,
        "value": 2048 + s / 1e6 * 10_240, "bound": ["", "", "above", "", "", "below"],
    })  # fmt: skip
    frame.loc[2, "value"] = 1 << 20
    frame.loc[5, "value"] += 100
    table = fits.table(frame)
    line = table[(table["axis"] == "state_elements") & (table["form"] == "line")].iloc[0]
    assert (line["points"], line["bounds"], line["contradicts"]) == (4, 2, 1), "a megatoken is above the line"
    assert (line["a"], line["c"]) == pytest.approx((10, 2)) and line["a_low"] == pytest.approx(10)
    others = table[(table["form"] == "line") & (table["axis"] != "state_elements")]
    assert len(others) == 2 and (others["r2"] < line["r2"]).all()


def test_a_curve_that_hardly_grows_asks_for_no_finite_state(rng):
    """100K tokens from any state: for 10 times as many a power law needs more states than there are numbers."""
    y = 100 + np.array([0, 0.1, 0, 0.2, 0.1]) * rng.uniform(0.9, 1.1)
    found = fit("power", [1.0, 2, 3, 4, 5], y)
    assert 0 < found.curve.k < 0.002 and found.needed(1000)[0] == math.inf
    assert found.needed(float(found.curve(np.array([6.0]))[0]))[0] == pytest.approx(6)


def test_states_close_together_do_not_overflow(rng):
    """Three of the shapes of configs/capacity/small.yaml lie within 4%, and a bootstrap may draw them alone."""
    s = np.array([70_144, 72_448, 73_216]) / 1e6
    for y in ([8.0, 1.0, 1.0], [1.0, 1.0, 8.0]):
        found = fit("exponential", s, np.array(y) * rng.uniform(1, 2))
        assert np.isfinite(found.curve(s)).all() and math.isfinite(found.curve.a)
    many = fit("exponential", np.tile(s, 3), np.tile([8.0, 1.0, 1.0], 3) + rng.normal(0, 0.1, 9))
    assert all(np.isfinite(end).all() for end in many.interval(s))
