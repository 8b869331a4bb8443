from __future__ import annotations

import math

import numpy as np
import pytest

from rnn_longctx.eval.stats import mean_stderr, paired_bootstrap, peak_within, student, verdict, wilson


def fresh() -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence().entropy)


def test_students_quantile():
    from scipy.stats import t

    for freedom in (1, 4, 18, 19, 25, 200):
        assert student(freedom) == pytest.approx(t.ppf(0.975, freedom), abs=1e-3)


def test_mean_and_standard_error():
    assert mean_stderr([1, 2, 3, 4]) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))
    mean, error = mean_stderr([7.0])
    assert mean == 7.0 and math.isnan(error)
    assert all(math.isnan(v) for v in mean_stderr([]))


def test_bootstrap_covers_a_known_difference_about_as_often_as_it_says():
    rng, covered = fresh(), 0
    for _ in range(200):
        a = rng.normal(1.0, 0.5, 40)
        interval = paired_bootstrap(a, a - 0.3 + rng.normal(0, 0.2, 40), n_boot=400)
        covered += interval.low <= 0.3 <= interval.high
    assert 170 <= covered <= 199  # 95% of 200, less what a percentile interval at n = 40 loses


def test_bootstrap_has_the_width_of_theory_and_uses_the_pairs():
    rng = fresh()
    hard = rng.normal(0, 5, 400)  # shared by both sides, so it must cancel
    a, b = hard + rng.normal(0, 0.1, 400), hard + rng.normal(0, 0.1, 400)
    interval = paired_bootstrap(a, b)
    width = 2 * 1.96 * np.std(a - b, ddof=1) / 20
    assert interval.high - interval.low == pytest.approx(width, rel=0.15)
    assert interval.value == pytest.approx(np.mean(a) - np.mean(b)) and interval.n == 400
    loose = paired_bootstrap(a, rng.permutation(b))
    assert loose.high - loose.low > 10 * width


@pytest.mark.parametrize("n", [2, 4, 8, 19])
def test_intervals_of_few_samples_are_wide_enough(n):
    """95 of 100 intervals hold the truth, which the percentile bootstrap is far from here."""
    pairs = fresh().normal(size=(1000, 2, n))
    held = sum((i := paired_bootstrap(*pair)).low <= 0 <= i.high for pair in pairs)
    assert 915 <= held <= 982


def test_bootstrap_is_seeded_and_honest_about_few_samples():
    a, b = fresh().normal(size=(2, 25))
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)
    one = paired_bootstrap([3.0], [1.0])
    assert one.value == 2.0 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(paired_bootstrap([1.0, math.nan], [0.0, 0.0]).high)
    for pair in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="as many"):
            paired_bootstrap(*pair)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Newcombe (1998), Two-sided confidence intervals for the single proportion, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_known_values(hits, n, low, high):
    interval = wilson(hits, n)
    assert interval.value == hits / n and interval.n == n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5.1e-5)


def test_wilson_is_symmetric_and_reaches_the_ends():
    a, b = wilson(3, 17), wilson(14, 17)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low))
    assert wilson(0, 7).low == 0.0 and wilson(7, 7).high == 1.0


def test_wilson_refuses_what_is_no_proportion():
    for hits, n in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError):
            wilson(hits, n)


def test_verdict_finds_the_first_length_above_twice_the_peak():
    lengths, losses = [8192, 256, 2048, 1024], [0.5, 0.78, 1.74, 0.69]
    assert verdict(lengths, losses, 256, 0.81) == (2048, "collapses at 2K (1.74 > 2 x 0.81)")
    assert verdict(lengths, losses, 256, 0.88) == (None, "no collapse up to 8K")
    # without a peak the loss at the largest length within the training length stands in: 2 x 0.78 < 1.74
    assert verdict(lengths, losses, 300).text == "collapses at 2K (1.74 > 2 x 0.78)"


def test_verdict_edges():
    assert verdict([256, 512], [1.0, 2.0], 256) == (None, "no collapse up to 512")  # not above twice
    assert verdict([256, 512], [1.0, np.nextafter(2.0, 3)], 256).first_failing == 512
    assert verdict([256, 512], [1.0, 9.0], 512) == (None, "not measured beyond the training length")
    assert verdict([128, 256], [1.0, 9.0], 256, 1.0).first_failing is None  # never within the training length
    assert verdict([], [], 256) == (None, "not measured beyond the training length")
    assert verdict([512], [1.0], 256) == (None, "not measured within the training length")
    assert verdict([512], [1.0], 256, 0.4).first_failing == 512
    assert verdict([256, 512], [1.0, 9.0], None) == (None, "training length unknown")
    for blown, said in ((math.nan, "not a number"), (math.inf, "infinite")):
        words = f"collapses at 1K (the loss is {said} at 1K)"
        assert verdict([256, 512, 1024], [1.0, 1.0, blown], 256) == (1024, words)
        words = f"collapses at 512 (the loss is {said} from 512 on)"
        assert verdict([1024, 256, 512], [blown, 1.0, blown], 256) == (512, words)
        words = f"the loss is {said} from 256 on, already within the training length, so whether it collapses cannot"
        for more in ([], [blown]):
            first, text = verdict([128, 256, 512, *[1024] * len(more)], [1.0, blown, blown, *more], 256, blown)
            assert first is None and text.startswith(words) and "float32" in text and "weights" in text
        assert "at 128, already within" in verdict([128, 256, 512], [blown, 1.0, 9.0], 256).text
        assert verdict([256], [blown], 256).text.startswith(f"the loss is {said} at 256, already within")
        assert verdict([256], [blown], None) == (None, f"training length unknown; the loss is {said} at 256")
    for blown in (math.nan, math.inf):
        assert verdict([256, 512, 1024], [1.0, 1.0, blown], 256).first_failing == 1024
    assert verdict([256, 65536, 1048576], [1, 1, 1], 256, math.nan).text == "no collapse up to 1M"


def test_peak_prefers_the_measured_one():
    assert peak_within([128, 256, 512], [3.0, 1.0, 5.0], 256) == 1.0
    assert peak_within([128, 256, 512], [3.0, 1.0, 5.0], 256, 2.5) == 2.5
    assert peak_within([512], [5.0], 256) is None
