"""The learning rate of an entry is chosen by held-out loss and recall together."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rnn_longctx.errors import InputError
from rnn_longctx.eval.compare.choice import Trial, best_rate, learns_text
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.train import TrainConfig
from rnn_longctx.train.config import DataConfig, MixedTask


def test_loss_and_recall_both_count():
    assert best_rate({1e-3: Trial(1.30, {"passkey": 1.0}), 3e-3: Trial(1.25, {"passkey": 0.2})}) == 1e-3
    assert best_rate({1e-3: Trial(1.30, {"passkey": 0.5}), 3e-3: Trial(1.25, {"passkey": 0.48})}) == 3e-3
    assert best_rate({1e-3: Trial(1.30, {"a": 1.0, "b": 0.0}), 3e-3: Trial(1.30, {"a": 0.6, "b": 0.6})}) == 3e-3
    assert best_rate({3e-3: Trial(1.2, {"a": 1.0}), 1e-3: Trial(1.2, {"a": 1.0})}) == 1e-3, "of equals the lower"
    assert best_rate({1e-3: Trial(1.2), 3e-3: Trial(1.1)}) == 3e-3, "no task is trained on"


def test_the_order_of_rates_is_nothing():
    rng = np.random.default_rng()
    trials = {float(r): Trial(float(rng.random()), {"a": float(rng.random())}) for r in rng.random(4)}
    best = best_rate(trials)
    assert all(trials[best].score <= t.score for t in trials.values())
    assert best == best_rate(dict(reversed(trials.items())))


def test_a_text_that_is_not_learned_does_not_count():
    """Where examples fill all rows, the loss of held-out text is whatever it is."""
    low, high = (Trial(loss, {"mqar": recall}, learned_text=False) for loss, recall in ((9.0, 0.4), (2.0, 0.3)))
    assert best_rate({1e-3: low, 3e-3: high}) == 1e-3 and low.score == pytest.approx(0.6)
    assert math.isinf(Trial(math.nan, {"mqar": 1.0}, learned_text=False).score)


THIRDS = [("induction", 0.6), ("planted", 0.3), ("mqar:pairs=2,vocab_size=9", 0.1)]  # 0.9999999999999999


@pytest.mark.parametrize(
    ("mix", "learned"),
    [
        ([MixedTask("induction", 1.0, (8, 64), fill=True)], False),
        ([MixedTask("induction", 0.5, (64, 64)), MixedTask("planted", 0.5, (9, 64), fill=True)], False),
        ([MixedTask(name, share, (9, 64), fill=True) for name, share in THIRDS], False),
        ([MixedTask("induction", 0.9, (8, 64), fill=True)], True),
        ([MixedTask("induction", 1.0, (8, 64))], True),
        ([], True),
    ],
)
def test_text_is_learned_where_some_rows_hold_it(mix, learned):
    data = DataConfig(text=["builtin"], mix=mix)
    assert learns_text(TrainConfig(model=ModelConfig("gla", d_model=16), data=data, train_length=64)) == learned


def test_what_diverged_is_not_chosen():
    diverged = Trial(math.nan, fault="20 steps in a row were skipped")
    assert best_rate({1e-3: Trial(9.0, {"a": 0.0}), 1.0: diverged}) == 1e-3
    with pytest.raises(InputError, match="diverges at every learning rate: 20 steps in a row"):
        best_rate({1e-1: diverged, 1.0: diverged})
