"""The time of a pilot: its estimate, its budget, steps that are too slow, and what is left for more."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from piloted import begun, files

from rnn_longctx.errors import InputError
from rnn_longctx.eval.pilot import run as pilot_run
from rnn_longctx.eval.pilot.config import PilotConfig
from rnn_longctx.eval.pilot.estimate import RESERVE, SAFETY
from rnn_longctx.eval.pilot.run import Pilot, TimeIsUp
from rnn_longctx.eval.pilot.steps import HEADS, Sizes, Step, first_steps
from rnn_longctx.progress import silent
from rnn_longctx.tasks.passkey import Passkey


@pytest.mark.parametrize("slowness", [0.5, 1.2, 5.0])
def test_a_budget_is_kept(model, document, tmp_path, monkeypatch, slowness):
    """By a clock that moves with the steps alone, each so many times as slow as predicted, and looked at ten times."""
    now = [0.0]
    monkeypatch.setattr(pilot_run, "PATIENCE", 20.0)
    monkeypatch.setattr(pilot_run.time, "monotonic", lambda: now[0])
    config = PilotConfig("tiny", "letters/", str(tmp_path / "out"), 120.0, tasks=(Passkey(),), lengths=(64, 256, 512))
    pilot = Pilot(model, document, config, 0.0, silent)
    pilot.speeds.reading, pilot.speeds.token = {"none": 100.0, "recompute:last=64": 70.0}, 0.1
    begun_steps = []

    def read(step, predicted):
        begun_steps.append((step.name, pilot.ledger.spent, predicted))
        for _ in range(10):
            now[0] += slowness * predicted / 10
            pilot._advance(1)

    monkeypatch.setattr(pilot, "_read", read)
    monkeypatch.setattr(pilot, "_probe", lambda step: read(step, pilot.predictor.seconds(step)))
    sizes = Sizes((64, 256, 512), (64, 256, 512), (64, 256, 512), 2, 5, 4, 10)
    pilot.measure(sizes)
    piece = slowness * max(predicted for *_, predicted in begun_steps) / 10
    assert pilot.ledger.spent <= 120 - RESERVE + (piece if slowness > SAFETY else 0) and pilot.not_measured
    assert all(spent + SAFETY * predicted + RESERVE <= 120 for _, spent, predicted in begun_steps)
    assert begun_steps[0][0].startswith("none: loss") and begun_steps[1][0].startswith("recompute")
    named = {step["step"] for step in pilot.not_measured}
    cut = named & {name for name, *_ in begun_steps}
    assert len(cut) == (slowness > SAFETY) and all(cut <= {begun_steps[-1][0]} for _ in cut)
    assert all(pilot.ledger.steps[name]["outcome"] == "stopped" for name in cut)


def test_an_estimate_measures_nothing(model, document, tmp_path):
    sizes, estimate = begun(model, document, tmp_path / "out", tasks=(Passkey(),)).estimate()
    assert files(tmp_path / "out" / "cells") == {}
    assert estimate.seconds > 0 and estimate.peak_bytes > 0 and estimate.price is None
    assert estimate.stages[0]["stage"] == "loss without a remedy"
    first = estimate.stages[0]
    assert first["steps"] == first["begun"] == 1 and first["tokens"] >= sizes.slices * sizes.plain[-1]
    assert sizes.longest <= len(document) // 2


def test_a_budget_for_nothing_says_what_it_would_take(model, document, tmp_path):
    pilot = begun(model, document, tmp_path / "out", budget=0.5)
    sizes, _ = pilot.estimate()
    with pytest.raises(InputError, match=r"a budget of 0 s is too small for anything: .* give --budget \d+s or more"):
        pilot.measure(sizes)
    assert files(tmp_path / "out" / "cells") == {}


def test_the_best_are_read_further_where_time_is_left(model, document, tmp_path):
    """What was thought slow before it began, and is not: the finals go as far as the text does."""
    pilot = begun(model, document, tmp_path / "out")
    pilot.estimate()
    pilot.measure(Sizes((32, 64, 128), (32, 64, 128), (32, 64, 128), 2, 1, 2, 1))
    rows = pilot.frame()
    longest = rows[rows["metric"] == "nats_per_token"].groupby("mitigation")["length"].max()
    assert len(pilot.ledger.finalists) == 3 and longest["none"] == longest["recompute:last=64"] == 2048
    assert all(longest[name] == 2048 for name in pilot.ledger.finalists) and (longest == 128).any()
    again = begun(model, document, tmp_path / "out")
    sizes, _ = again.estimate()
    assert sizes.final[-1] == 2048


def test_a_slow_remedy_leaves_the_finals(model, document, tmp_path, monkeypatch):
    """One step that takes 100 seconds and is stopped: the best are read on, and it is not begun as if it took less."""
    real, later, said = time.monotonic, [0.0], []
    monkeypatch.setattr(pilot_run.time, "monotonic", lambda: real() + later[0])
    read = Pilot._read

    def slow(self, step, predicted):
        if step.remedy == "window:tokens=64":
            later[0] += 100
            raise TimeIsUp
        read(self, step, predicted)

    monkeypatch.setattr(Pilot, "_read", slow)
    sizes = Sizes((64, 256), (64, 256), (64, 256), 2, 1, 3, 1)
    pilot = begun(model, document, tmp_path / "out", lengths=(64, 256))
    pilot.estimate()
    pilot.measure(sizes)
    name = "window:tokens=64: loss up to 256, 2 slices"
    assert pilot.ledger.steps[name]["outcome"] == "stopped" and name in {row["step"] for row in pilot.not_measured}
    assert len(pilot.ledger.finalists) == 3 and any("3 slices" in step for step in pilot.ledger.steps)
    again = begun(model, document, tmp_path / "out", pilot.ledger.spent + 120, said.append, lengths=(64, 256))
    assert again.predictor.seconds(next(s for s in first_steps(sizes, 64, {}) if s.name == name)) >= 200
    again.measure(sizes)
    assert name in {row["step"] for row in again.not_measured} and not any(name in line for line in said)


def test_no_best_are_chosen_without_their_rivals(model, document, tmp_path, monkeypatch):
    read = Pilot._read

    def slow(self, step, predicted):
        if step.remedy.startswith("recompute"):
            raise TimeIsUp
        read(self, step, predicted)

    monkeypatch.setattr(Pilot, "_read", slow)
    pilot = begun(model, document, tmp_path / "out", lengths=(64, 256))
    pilot.estimate()
    pilot.measure(Sizes((64, 256), (64, 256), (64, 256), 2, 1, 3, 1))
    assert pilot.ledger.finalists is None and not any("3 slices" in step for step in pilot.ledger.steps)


def test_a_larger_budget_chooses_its_own_best(model, document, tmp_path):
    pilot = begun(model, document, tmp_path / "out", lengths=(64, 256))
    pilot.estimate()
    pilot.measure(Sizes((64, 256), (64, 256), (64, 256), 2, 1, 2, 1))
    pilot.ledger.finalists = ["state-norm:every=64"]  # as a smaller budget may have chosen
    pilot.ledger.save()
    again = begun(model, document, tmp_path / "out", lengths=(64, 256))
    again.estimate()
    assert again.ledger.finalists == ["state-norm:every=64"]  # of the same budget they stay
    larger = begun(model, document, tmp_path / "out", 2e6, lengths=(64, 256))
    larger.estimate()
    larger.measure(Sizes((64, 256), (64, 256), (64, 256), 2, 1, 2, 1))
    assert larger.ledger.finalists is not None and len(larger.ledger.finalists) == 3


def test_the_probe_is_stopped_as_any_step(model, document, tmp_path, monkeypatch):
    """The clock is looked at after each segment that it reads, and two are all that there is time for."""
    from rnn_longctx.measure import stream

    monkeypatch.setitem(stream.SEGMENTS, "cpu", 64)
    config = PilotConfig("tiny", "letters/", str(tmp_path / "out"), 1e6, lengths=(64, 256, 1024))
    pilot = Pilot(model, document, config, time.monotonic(), silent)
    pilot.estimate()
    looked, advance = [], pilot.measuring.progress

    def progress(tokens):
        looked.append(tokens)
        if len(looked) == 2:
            pilot.latest = 0.0
        advance(tokens)

    pilot.measuring.progress = progress
    step = Step(HEADS, "none", None, (1024,))
    pilot._measure(step)
    assert looked == [64, 64] and pilot.ledger.steps[step.name]["outcome"] == "stopped"
    assert not (tmp_path / "out" / "probe").exists() and not pilot._is_stored(step)
    pilot.measuring.progress = advance
    pilot._measure(step)
    assert pilot._is_stored(step)


@pytest.mark.parametrize("longest", [{"plain": (64, 256, 1024)}, {"final": (64, 256, 1024)}, {"lengths": (64, 1024)}])
def test_memory_is_that_of_the_longest_length(model, document, tmp_path, monkeypatch, longest):
    """By a cache of attention that takes a byte a token and row, and a process that has held nothing yet."""
    monkeypatch.setattr(pilot_run, "own_peak", lambda device: 0)
    monkeypatch.setattr(Pilot, "_growth", lambda self, length, rows: float(length * rows))
    sizes = replace(Sizes((64, 256), (64, 256), (64, 256), 2, 1, 3, 1), **longest)
    monkeypatch.setattr(pilot_run, "choose", lambda *asked: sizes)
    _, estimate = begun(model, document, tmp_path / "out", lengths=(64, 256)).estimate()
    assert estimate.peak_bytes == 3 * 1024


def test_memory_grows_with_the_rows_as_the_trial_reading_has_shown(model, document, tmp_path, monkeypatch):
    monkeypatch.setattr(pilot_run, "own_peak", lambda device: 1000)
    sizes = Sizes((64, 256), (64, 256), (64, 256), 2, 12, 2, 6)
    monkeypatch.setattr(pilot_run, "choose", lambda *asked: sizes)
    pilot = begun(model, document, tmp_path / "out", lengths=(64, 256))
    peak, row = pilot.estimate()[1].peak_bytes, pilot.ledger.speeds["row_bytes"]
    assert peak == 1000 + 3 * row * (12 - 4)
    plain = sum(layer.heads * layer.headdim * layer.d_state for layer in model.mixers) * 4
    assert row > 2 * plain, "a window carries more than the state, and was tried"
