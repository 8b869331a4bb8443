"""The verdict on a tuned setting, and the command's lines for bad input."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from typer.testing import CliRunner

from rnn_longctx import cli
from rnn_longctx.errors import InputError
from rnn_longctx.eval.tune.held_out import judged
from rnn_longctx.eval.tune.problem import Held


def held(losses, recalls):
    return [
        [Held("loss", "text", 64, loss), Held("recall", "a", 64, r), Held("recall", "a", 128, r / 2)]
        for loss, r in zip(losses, recalls)
    ]


def test_differences_are_paired_by_seed_with_student_s_interval():
    base = np.random.default_rng().normal(2, 1, 5)  # seeds differ far more than settings do
    difference = np.array([-0.1, -0.2, -0.15, -0.05, -0.1])
    found = judged(
        {"x": held(base, [0.8] * 5), "y": held(base + difference, [0.8] * 5), "none": held(base + 1, [0.4] * 5)},
        "x", "y", "loss",
    )  # fmt: skip
    row = found.table.set_index(["metric", "what", "length"]).loc[("loss", "text", 64)]
    half = 2.776 * difference.std(ddof=1) / math.sqrt(5)
    assert row["difference"] == pytest.approx(-0.12) and row["seeds"] == 5
    assert (row["low"], row["high"]) == (pytest.approx(-0.12 - half), pytest.approx(-0.12 + half))
    assert row["none"] == pytest.approx(base.mean() + 1)
    recall = found.table[(found.table["metric"] == "recall") & (found.table["what"] == "all")].iloc[0]
    assert recall["default"] == pytest.approx(0.6), "of both lengths"
    assert found.beats and "y beats the default, x, on held-out data: loss -0.12" in found.verdict


@pytest.mark.parametrize(
    ("metric", "loss", "recall", "beats", "words"),
    [
        ("loss", -0.1, 0.0, True, "beats the default"),
        ("loss", 0.1, 0.0, False, "is worse than the default"),
        ("loss", 0.0, 0.1, False, "does not beat the default"),
        ("loss", -0.1, -0.1, False, "but it loses recall"),
        ("recall", 0.1, 0.1, True, "beats the default"),
        ("recall", -0.1, -0.1, False, "is worse than the default"),
        ("recall", 0.0, 0.0, False, "does not beat the default"),
    ],
)
def test_verdicts(metric, loss, recall, beats, words):
    noise = [0.01, -0.01, 0.005, -0.005, 0.0]
    random.shuffle(noise)
    tuned = held([2 + loss + n for n in noise], [0.8 + recall + n for n in noise])
    found = judged({"x": held([2.0] * 5, [0.8] * 5), "y": tuned}, "x", "y", metric)
    assert found.beats is beats and words in found.verdict


def test_one_seed_says_nothing():
    found = judged({"x": held([2.0], [0.5]), "y": held([1.0], [0.5])}, "x", "y", "loss")
    assert not found.beats and "cannot be said" in found.verdict


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["configs/compare/planted.yaml", "--mixer", "full-attention"], "has nothing to tune"),
        (["configs/compare/planted.yaml", "--mixer", "blok-sparse"], "did you mean"),
        (["configs/compare/planted.yaml", "--mixer", "block-sparse:blok=2"], "no parameter 'blok'"),
        (["configs/compare/planted.yaml", "--mixer", "block-sparse", "--budget", "20"], "--budget is a time"),
        (["configs/compare/planted.yaml", "--mixer", "block-sparse", "--memory", "8"], "--memory is a size"),
        (["configs/compare/planted.yaml"], "one of them"),
        (["configs/compare/growth_smoke.yaml", "--mixer", "block-sparse"], "growth_smoke.yaml"),
        (["nowhere.yaml", "--mixer", "block-sparse"], "cannot read config nowhere.yaml"),
        (["demo", "--mitigation", "rry"], "did you mean"),
        (["demo", "--mitigation", "none"], "has nothing to tune"),
        (["demo", "--mitigation", "rri", "--target", "x"], "--target"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, words, line):
    budget = [] if "--budget" in words else ["--budget", "1m"]
    result = CliRunner().invoke(cli.app, ["tune", *words, *budget, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError), result.output
    assert line in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()
