"""The two searches on synthetic models whose answer is known, and what a sample supports."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rnn_longctx.config import format_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity.recall import LOOK, recall_of, samples_for, search, shown
from rnn_longctx.eval.forget import forget_of, majority, next_models


def tail(right: int, asked: int, p: float) -> float:
    """Chance of so many right answers or more where each is right with chance p."""
    return sum(math.comb(asked, k) * p**k * (1 - p) ** (asked - k) for k in range(right, asked + 1))


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


class Model:
    """Answers prompts right with a chance that depends on their length; the first prompts of a length stay the same."""

    def __init__(self, chance, rng):
        self.chance, self.rng, self.drawn, self.asked = chance, rng, {}, []

    def __call__(self, length: int, n: int) -> tuple[int, int]:
        self.asked.append((length, n))
        drawn = self.drawn.setdefault(length, self.rng.random(1000))
        return int((drawn[:n] < self.chance(length)).sum()), n


@pytest.mark.parametrize("where", ["beyond", "before"])
def test_t_recall_of_a_step(rng, where):
    for _ in range(30):
        start = int(rng.integers(200, 3000))
        edge = int(start * rng.uniform(1, 200)) if where == "beyond" else int(rng.integers(101, start))
        model = Model(lambda n, edge=edge: float(n <= edge), rng)
        n = samples_for(0.1, 0.95)
        found = recall_of(search(model, lambda length: length > 25, start, 1 << 20, 0.95, n), 0.95)
        assert found is not None and found.passes is not None and found.fails is not None
        assert found.passes <= edge < found.fails
        assert found.fails - found.passes <= max(1, 0.125 * found.passes)
        assert (found.right, found.asked) == (n, n)
        assert len(model.asked) < 2 * (math.log2(max(edge / start, start / edge)) + 6)
        full = [length for length, asked in model.asked if asked == n]
        assert all(length <= edge for length in full), "a length that has failed is left at the first look"


def test_the_limit_is_not_an_answer(rng):
    for _ in range(10):
        start, limit = int(rng.integers(200, 900)), int(rng.integers(1000, 100_000))
        model = Model(lambda n: 1.0, rng)
        found = recall_of(search(model, lambda n: True, start, limit, 0.9, 50), 0.9)
        assert found is not None and found.fails is None and found.passes == limit
        at_least = f"at least {format_length(limit)} (the longest measured; "
        assert str(found).startswith(at_least) and max(n for n, _ in model.asked) == limit


def test_nothing_passes(rng):
    model = Model(lambda n: 0.3, rng)
    measured = search(model, lambda n: n >= 110, 1000, 1 << 20, 0.95, 100)
    found = recall_of(measured, 0.95)
    assert found is not None and found.passes is None and found.fails == 125
    assert str(found).startswith("below 125 (the shortest measured; ") and min(measured) == 125
    assert recall_of({}, 0.95) is None
    with pytest.raises(InputError, match="no prompt fits"):
        search(model, lambda n: n >= 110, 50, 100, 0.95, 100)
    assert min(search(model, lambda n: n >= 110, 50, 1000, 0.95, 100)) == 200, "a start that is too short is doubled"


def test_never_more_than_the_samples_support(rng):
    """Under a smooth decline what is reported passes an exact binomial test (Wilson's interval is near to it), and is
    hardly ever a length whose true recall is below the target."""
    wrong = 0
    for _ in range(200):
        middle, slope, target = float(rng.uniform(500, 50_000)), float(rng.uniform(1, 8)), 0.95
        model = Model(lambda n, m=middle, k=slope: 1 / (1 + (n / m) ** k), rng)
        found = recall_of(search(model, lambda n: n > 64, 512, 1 << 18, target, 210), target)
        assert found is not None
        if found.passes is not None:
            assert found.asked == 210 and tail(found.right, found.asked, target) < 0.04
            wrong += model.chance(found.passes) < target
    assert wrong < 25  # at most about 2.5% a length asked near the edge


def test_a_lucky_longer_length_does_not_count():
    measured = {100: (90, 90), 200: (90, 90), 300: (50, 90), 400: (90, 90)}
    assert recall_of(measured, 0.95) == (200, 300, 90, 90)
    assert recall_of({300: (50, 90), 400: (90, 90)}, 0.95) == (None, 300, 50, 90)
    assert not shown(LOOK, LOOK, 0.95), "a first look alone shows nothing"


def test_a_first_look_for_one_target_leaves_another_open(rng):
    """A table measured for 95% is asked for less: lengths left after 20 prompts may well recall that."""
    for _ in range(50):
        middle, slope, n = float(rng.uniform(500, 50_000)), float(rng.uniform(0.5, 4)), 210
        model = Model(lambda length, m=middle, k=slope: 1 / (1 + (length / m) ** k), rng)
        measured = search(model, lambda length: length > 64, 512, 1 << 18, 0.95, n)
        most = max(asked for _, asked in measured.values())  # LOOK where every length was left at that
        for target in rng.uniform(0.1, 0.9, 3):
            found = recall_of(measured, target)
            if found.passes is not None:
                assert shown(*measured[found.passes], target)
            if found.fails is not None:
                right, asked = measured[found.fails]
                assert asked == most or tail(right, asked, target) > 0.9 or n - (asked - right) < target * n
    assert recall_of({1024: (208, 210), 2048: (14, 20), 4096: (2, 20)}, 0.6) == (1024, 4096, 208, 210)
    assert recall_of({1024: (208, 210), 2048: (14, 20), 4096: (2, 20)}, 0.95) == (1024, 2048, 208, 210)
    assert recall_of({1024: (14, 20), 2048: (2, 20)}, 0.6) == (None, 1024, 14, 20), "no table tells looks from samples"
    left = recall_of({1024: (208, 210), 2048: (14, 20)}, 0.6)
    assert left == (1024, None, 208, 210) and str(left) == "at least 1K (the longest measured; 208/210)"


def test_samples_follow_from_the_width():
    from scipy.stats import binomtest

    for width, target in ((0.3, 0.95), (0.12, 0.95), (0.06, 0.9), (0.2, 0.5), (0.05, 0.99)):
        n = samples_for(width, target)

        def enough(n, target=target, width=width):
            at = binomtest(round(target * n), n).proportion_ci(method="wilson")
            return at.high - at.low <= width and binomtest(n, n).proportion_ci(method="wilson").low >= target

        assert n % 10 == 0 and enough(n) and not any(enough(m) for m in range(10, n, 10))
    for wrong in ((0, 0.95), (0.1, 1), (1.5, 0.9)):
        with pytest.raises(InputError, match="between 0 and 1"):
            samples_for(*wrong)


def test_t_forget_of_known_thresholds(rng):
    for _ in range(200):
        lengths = sorted(rng.choice(np.arange(1, 60), int(rng.integers(1, 12)), replace=False).tolist())
        seeds = range(int(rng.integers(1, 6)))
        edges = rng.normal(rng.uniform(0, 60), rng.uniform(0, 8), len(seeds))
        outcomes: dict[tuple[int, int], bool] = {}
        while todo := next_models(lengths, seeds, outcomes):
            assert len(set(todo)) == len(todo) and not set(todo) & set(outcomes)
            n, seed = todo[int(rng.integers(len(todo)))]  # whichever process ends first
            outcomes[n, seed] = bool(n >= edges[seed])
        found = forget_of(outcomes)
        assert found is not None
        passing = [n for n in lengths if 2 * sum(n >= edges) > len(edges)]  # monotone in n
        at = lengths.index(passing[0]) if passing else len(lengths)
        # the majority of the seeds at the turn; a first seed that is off may end the search at its own turn only if
        # the majority there agrees with it
        assert found.passes == (passing[0] if passing else None)
        assert found.fails == (lengths[at - 1] if at else None)
        assert str(found).startswith("above" if not passing else "at most" if not at else str(passing[0]))


def test_t_forget_trains_few(rng):
    lengths, most = [2**i for i in range(7, 23)], 0
    for edge in rng.uniform(100, 5e6, 50):
        outcomes: dict[tuple[int, int], bool] = {}
        while todo := next_models(lengths, range(3), outcomes):
            outcomes |= {(n, s): n >= edge for n, s in todo}
        most = max(most, len(outcomes))
    assert most <= 4 + 3 * 3, "bisection over 16 lengths, and three seeds at the turn and at the longest"
    assert next_models([8, 4], [0], {}) == [(8, 0)]
    assert next_models([8, 4], [0, 1], {(8, 0): False}) == [(8, 1)], "no search where the longest fails"
    assert majority({(8, 0): True, (8, 1): False}, 8) is False and majority({}, 8) is None
