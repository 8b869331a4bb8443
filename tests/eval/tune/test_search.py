"""The search: killed and gone on with, its budgets, its guard, what it refuses. Trials are measured in this process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from rnn_longctx.errors import InputError
from rnn_longctx.eval.tune.budget import Budget
from rnn_longctx.eval.tune.problem import Held, folder_of
from rnn_longctx.eval.tune.process import Ended
from rnn_longctx.eval.tune.space import Space
from rnn_longctx.spec import Range, parse, tuned

optuna = pytest.importorskip("optuna")

from rnn_longctx.eval.tune import run as module  # noqa: E402
from rnn_longctx.eval.tune.run import run_tune  # noqa: E402
from rnn_longctx.eval.tune.search import Search  # noqa: E402

MB = 2**20


@dataclass(frozen=True)
class Knobs:
    size: int = tuned(4, over=(1, 2, 4, 8, 16, 32))
    rate: float = tuned(0.5, over=Range(1e-3, 1.0, "log"))

    def __post_init__(self) -> None:
        if self.size == 1 and self.rate > 0.5:
            raise InputError("knobs: size 1 takes a rate of at most 0.5")


@dataclass
class Made:
    """A problem whose answers are known: the least loss is at size 8, rate 0.01; size 32 forgets, size 16 is large."""

    gain: float = 1.0
    parameters: str = "knobs"
    device: str = "cpu"
    seeds: int = 5
    metric: str = "loss"
    comparison: float = 2.0
    warmup: int = 2
    kind: str = "mixer"
    measured: list[str] = field(default_factory=list)

    @property
    def space(self) -> Space:
        return Space.of("mixer", self.parameters, {"knobs": Knobs})

    def prepared(self, out: Path) -> Made:
        return self

    def described(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "gain": self.gain}

    def check(self, setting: str) -> None:
        parse(setting, {"knobs": Knobs}, "mixer")

    def loss(self, setting: str) -> float:
        knobs = parse(setting, {"knobs": Knobs}, "mixer")
        return 1 + 0.1 * abs(math.log2(knobs.size / 8)) + 0.1 * abs(math.log(knobs.rate / 0.01))

    def recall(self, setting: str) -> float:
        return 0.5 if "size=32" in setting else 0.9

    def reports(self, folder: Path) -> dict[int, float]:
        loss = self.loss((folder / "setting").read_text())
        return {step: loss + 1 / step for step in (1, 2, 3, 4)}

    def tidy(self, folder: Path) -> None:
        (folder / "setting").unlink()

    def compare(self, settings: Any, out: Path, say: Any) -> dict[str, list[list[Held]]]:
        noise = [0.0, 0.01, -0.01, 0.02, -0.02]
        return {
            s: [[Held("loss", "text", 64, self.gain * self.loss(s) + n * i), Held("recall", "task", 64, 0.9)]
                for n in noise] for i, s in enumerate(settings)
        }  # fmt: skip


@pytest.fixture
def process(monkeypatch):
    """Trials take 10 seconds each by a clock that is told; `kill_at` kills the search in the n-th, half way."""
    told: dict[str, Any] = {"kill_at": None, "runs": 0, "seconds": 10.0}

    def run(self: Search, setting: str, folder: Path, look: Any) -> Ended:
        told["runs"] += 1
        (folder / "setting").write_text(setting)
        peak = (900 if "size=16" in setting else 300) * MB
        if told["runs"] == told["kill_at"]:
            look(told["seconds"] / 2, 200 * MB)
            raise KeyboardInterrupt
        if how := look(told["seconds"], peak):
            return Ended(how, peak)
        result = {"value": self.problem.loss(setting), "recall": self.problem.recall(setting), "about": {}, "fault": ""}
        (folder / "result.json").write_text(json.dumps(result | {"peak_bytes": peak}))
        return Ended("done", peak)

    monkeypatch.setattr(Search, "_process", run)
    return told


def tune(out: Path, problem: Any = None, seconds: float = 115, memory: int | None = None, say: Any = lambda line: None):
    return run_tune(problem or Made(), out, Budget(seconds, memory), say)


def trials(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "trials.csv")


def test_finds_a_better_setting_and_says_so(tmp_path, process):
    found = tune(tmp_path)
    table = trials(tmp_path)
    assert table.loc[0, "setting"] == "knobs:size=4,rate=0.5" == found.default, "the default is tried first"
    best = table[table["feasible"]].sort_values("value").iloc[0]
    assert found.tuned == best["setting"] and best["value"] < table.loc[0, "value"]
    assert found.beats and "beats the default" in found.verdict
    assert yaml.safe_load((tmp_path / "tuned.yaml").read_text())["mixer"] == found.tuned
    assert (table["state"] == "pruned").any(), "what is worse than the median ends early"
    assert not list(tmp_path.glob("trials/*/setting")), "trials are tidied up"


def test_killed_and_gone_on_with_the_trials_are_the_same(tmp_path, process):
    whole = tmp_path / "whole"
    tune(whole)
    runs = process["runs"]
    killed = tmp_path / "killed"
    for at in (1, runs):  # the default's, the sampler's
        process.update(kill_at=at, runs=0)
        with pytest.raises(KeyboardInterrupt):
            tune(killed / str(at))
        process.update(kill_at=None)
        tune(killed / str(at), seconds=140)  # (half a trial is made twice)
        columns = ["trial", "setting", "state", "value", "recall", "feasible", "note"]
        expected = trials(whole)[columns]
        pd.testing.assert_frame_equal(trials(killed / str(at))[columns][: len(expected)], expected)


def test_run_again_it_makes_no_more_trials(tmp_path, process):
    first = tune(tmp_path)
    runs = process["runs"]
    again = tune(tmp_path)
    assert process["runs"] == runs and again.verdict == first.verdict
    tune(tmp_path, seconds=130)
    assert process["runs"] > runs, "with more time it goes on"


def test_recall_below_the_default_s_is_not_chosen(tmp_path, process, monkeypatch):
    monkeypatch.setattr(Made, "recall", lambda self, setting: 0.89 if "size=8" in setting else 0.9)
    assert tune(tmp_path, Made(parameters="knobs:rate=0.01")) is None
    table = trials(tmp_path).set_index("setting")
    assert table.loc["knobs:size=8,rate=0.01", "note"] == "recall below the default's"
    assert table.loc["knobs:size=8,rate=0.01", "value"] == table["value"].min(), "its loss is the least"


def test_memory_over_the_budget_is_measured_and_excluded(tmp_path, process):
    lines: list[str] = []
    tune(tmp_path, Made(parameters="knobs:rate=0.01"), memory=600 * MB, say=lines.append)
    row = trials(tmp_path).set_index("setting").loc["knobs:size=16,rate=0.01"]
    assert row["note"] == "ended over the memory budget, at 900 MB" and row["peak_bytes"] == 900 * MB
    assert not row["feasible"] and any("900 MB" in line for line in lines)
    with pytest.raises(InputError, match=r"no setting fits the memory budget of 100 MB.*300 MB"):
        tune(tmp_path / "less", Made(parameters="knobs:rate=0.01"), memory=100 * MB)


def test_every_setting_is_tried_once_and_then_it_ends(tmp_path, process):
    lines: list[str] = []
    tune(tmp_path, Made(parameters="knobs:rate=0.6"), seconds=500, say=lines.append)
    table = trials(tmp_path)
    assert process["runs"] == 5, "six sizes, one of which is refused"
    assert "no new setting is left to try" in lines
    assert table["setting"].dropna().is_unique and (table["state"] == "complete").sum() <= 5
    refused = table[table["state"] == "refused"]
    assert len(refused) and refused["note"].str.contains("size 1 takes a rate of at most 0.5").all()


def test_nothing_better_is_said(tmp_path, process, monkeypatch):
    monkeypatch.setattr(Made, "loss", lambda self, setting: 1.0)
    lines: list[str] = []
    assert tune(tmp_path, say=lines.append) is None
    assert "no setting that was tried is better than the default, knobs:size=4,rate=0.5" in lines
    assert not (tmp_path / "tuned.yaml").exists()


@pytest.mark.parametrize("seconds", [5, 35])
def test_a_budget_that_fits_no_trial(tmp_path, process, seconds):
    for _ in range(2):  # run again, it says so again
        with pytest.raises(InputError, match=f"a budget of {seconds} s fits no trial") as error:
            tune(tmp_path, seconds=seconds)
        assert "\n" not in str(error.value)
    assert tune(tmp_path, seconds=120) is not None, "with more time it goes on"


def test_another_study_s_folder_and_storage_are_refused(tmp_path, process):
    tune(tmp_path / "a", seconds=60)
    before = (tmp_path / "a" / "tune.db").read_bytes()
    with pytest.raises(InputError, match="another config"):
        tune(tmp_path / "a", Made(gain=2.0))
    assert (tmp_path / "a" / "tune.db").read_bytes() == before
    other = tmp_path / "b"
    other.mkdir()
    (other / "tune.db").write_bytes(before)
    with pytest.raises(InputError, match="storage of another study"):
        tune(other, Made(gain=2.0))
    assert (other / "tune.db").read_bytes() == before
    foreign = tmp_path / "c"
    foreign.mkdir()
    optuna.create_study(storage=f"sqlite:///{foreign / 'tune.db'}", study_name="mine")
    with pytest.raises(InputError, match="storage of another study"):
        tune(foreign)
    file = tmp_path / "d" / "tune.db"
    file.parent.mkdir()
    file.write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match="cannot be read as a storage of Optuna") as error:
        tune(file.parent)
    assert "\n" not in str(error.value) and file.read_bytes() == b"no database" * 100


def test_without_optuna_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(InputError, match=r"tuning needs optuna: pip install 'rnn-longctx\[tune\]'"):
        tune(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_two_at_once_are_refused(tmp_path):
    with module._alone(tmp_path), pytest.raises(InputError, match="another process is tuning there"):
        tune(tmp_path)


def test_a_failing_default_says_why(tmp_path, monkeypatch):
    def fails(self: Search, setting: str, folder: Path, look: Any) -> Ended:
        (folder / "log.txt").write_text("noise\nthe text is too short\n")
        (folder / "setting").write_text(setting)
        look(1.0, MB)
        return Ended("failed", MB)

    monkeypatch.setattr(Search, "_process", fails)
    with pytest.raises(InputError, match="cannot be measured: the text is too short"):
        tune(tmp_path, replace(Made()))
    assert folder_of(tmp_path, "knobs:size=4,rate=0.5").exists()
