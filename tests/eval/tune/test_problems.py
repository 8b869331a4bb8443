"""What a trial measures of a mixer and of a remedy, what it reports on the way, and what a comparison asks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rnn_longctx.config import load_yaml
from rnn_longctx.data import ByteTokenizer, load_text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.compare import CompareConfig
from rnn_longctx.eval.compare.equal import parameters
from rnn_longctx.eval.search.calibrate import Objective
from rnn_longctx.eval.tune import mixer as mixer_module
from rnn_longctx.eval.tune.mixer import MixerProblem, Run
from rnn_longctx.eval.tune.problem import Held, Outcome, plain
from rnn_longctx.eval.tune.remedy import RemedyProblem
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

CONFIG = """
shape: {d_model: 16, n_layer: 1, mlp: 2}
entries:
  - {name: full, mixer: "full-attention:heads=2"}
  - {name: sparse, mixer: "block-sparse:heads=2,block=4,window=8,top=2,gate=4"}
train:
  data: {text: [text.txt], held_out: 0.2, mix: [{task: "planted:noise=0", fraction: 1.0, lengths: [8, 32], fill: true}]}
  train_length: 32
  batch_size: 4
  steps: 3
  schedule: {warmup: 2}
learning_rates: [1e-3]
seeds: 2
measure:
  {loss: null, recall: {tasks: ["planted:noise=0,n=4"], lengths: [32, 48]}, probe: null, remedies: null, batch: 4}
device: cpu
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "other.txt"):
        Path(name).write_bytes(np.random.default_rng().integers(32, 127, 12000, dtype=np.uint8).tobytes())


@pytest.fixture
def sparse() -> MixerProblem:
    Path("compare.yaml").write_text(CONFIG)
    return MixerProblem(load_yaml(CompareConfig, "compare.yaml"), "block-sparse")


def test_a_mixer_s_default_is_its_entry_s(sparse, tmp_path):
    default = "block-sparse:heads=2,block=4,window=8,sinks=1,top=2,gate=4,positions=rope"
    assert sparse.space.default_text == default
    assert replace(sparse, mixer="block-sparse:top=8").space.default_text == default.replace("top=2", "top=8")
    assert replace(sparse, mixer="two-stage").space.default_text.startswith("two-stage:heads=4,block=16")
    prepared = sparse.prepared(tmp_path)
    again = MixerProblem.of(plain(prepared.described()))
    assert again == prepared and again.metric == "recall"
    with pytest.raises(InputError, match="window"):
        sparse.check(default.replace("window=8", "window=9"))
    with pytest.raises(InputError, match="recall guards"):
        config = replace(sparse.config, measure=replace(sparse.config.measure, recall=None))
        replace(sparse, config=config).prepared(tmp_path)


def test_candidates_are_as_large_as_the_default(sparse):
    setting = sparse.space.text({"gate": 32})
    study = sparse._study([setting])
    default, candidate = (parameters(study.models[entry.name]) for entry in study.entries)
    assert abs(candidate - default) <= 0.02 * default
    assert study.models[study.entries[1].name].mlp < study.models["default"].mlp


def test_a_mixer_s_trial_trains_two_seeds_reports_and_is_tidied_up(sparse, tmp_path):
    setting, folder = sparse.space.default_text, tmp_path / "trial"
    outcome = sparse.measure(setting, folder)
    assert outcome.value == pytest.approx(1 - outcome.recall) and 0 <= outcome.recall <= 1
    assert outcome.about["learning_rate"] == 1e-3 and not outcome.fault
    reports = sparse.reports(folder)
    assert list(reports) == [1, 2, 3, 4, 5, 6] and all(0 <= v <= 1 for v in reports.values())
    rows = [line.split(",") for line in (folder / "lr0.001-s1001" / "eval.csv").read_text().splitlines()[1:]]
    last = [1 - float(row[-1]) for row in rows if row[0] == "3"]
    assert reports[6] == pytest.approx(sum(last) / 2) and len(last) == 2, "of both lengths"
    (tmp_path / "early" / "lr0.001-s1000").mkdir(parents=True)
    head = (folder / "lr0.001-s1000" / "eval.csv").read_text().splitlines()[:6]  # the second step's first length
    (tmp_path / "early" / "lr0.001-s1000" / "eval.csv").write_text("\n".join(head) + "\n2,256,48,4.")
    assert list(sparse.reports(tmp_path / "early")) == [1], "a step counts when it is whole"
    assert sparse.measure(setting, folder) == outcome, "gone on with, it is the same"
    sparse.tidy(folder)
    assert not list(folder.glob("*/snapshots")) and not list(folder.glob("*/model"))
    assert sparse.reports(folder) == reports


def test_a_rate_that_diverges_is_no_use(sparse, monkeypatch, tmp_path):
    config = replace(sparse.config, learning_rates=[1e-3, 2e-3])
    problem = replace(sparse, config=config)

    def trained(self: MixerProblem, setting: str, run: Run, folder: Path) -> Outcome:
        value = {1e-3: 0.5, 2e-3: 0.1}[run.rate]
        fault = "diverged" if run == Run(2e-3, 1001) else ""
        return Outcome(value, 1 - value, {"held_out_loss": 1.0}, fault)

    monkeypatch.setattr(MixerProblem, "_trained", trained)
    outcome = problem.measure(problem.space.default_text, tmp_path)
    assert (outcome.value, outcome.recall, outcome.about["learning_rate"]) == (0.5, 0.5, 1e-3)
    assert problem.comparison == pytest.approx(2 * (2 + 1) / 4), "two settings, three trainings each, of four a trial"


def test_a_mixer_s_comparison_reads_the_study_s_cells(sparse, monkeypatch, tmp_path):
    tuned = sparse.space.text({"top": 1})
    ran = []

    def run_study(config, jobs, only, say):
        ran.append([str(entry.mixer) for entry in config.entries])
        return Path(config.out)

    def measured(config, cell, study):
        value = 0.25 if cell.entry == "default" else 0.5
        of = {"task": "planted", "length": 32, "text": ""}
        return {}, [
            {"metric": "accuracy", "value": value + cell.seed / 8, **of},
            {"metric": "chance", "value": 0, **of},
        ]

    monkeypatch.setattr(mixer_module, "run_study", run_study)
    monkeypatch.setattr(mixer_module, "measured", measured)
    monkeypatch.setattr(mixer_module, "chosen", lambda config, entry, study: 1e-3)
    held = sparse.compare([sparse.space.default_text, tuned], tmp_path, print)
    assert ran == [[sparse.space.default_text, tuned]]
    assert held[tuned] == [[Held("recall", "planted", 32, 0.5)], [Held("recall", "planted", 32, 0.625)]]
    assert held[sparse.space.default_text][1][0].value == 0.375


@pytest.fixture
def remedy() -> RemedyProblem:
    config = Mamba2Config(d_model=16, n_layer=1, headdim=8, d_state=8, A_init=(1e-3, 1.0), A_log_uniform=True)
    lm = Mamba2LM(config).eval()
    lm.train_length, lm.tokenizer = 128, ByteTokenizer()
    checkpoint.save(lm, "tiny")
    return RemedyProblem("tiny", "rri", 200, "text.txt", "other.txt", slices=2, prompts=2, seeds=2, device="cpu")


def test_a_remedy_s_trial_is_what_calibration_measures(remedy, tmp_path):
    problem = remedy.prepared(tmp_path)
    assert problem.weights and RemedyProblem.of(plain(problem.described())) == problem
    outcome = problem.measure("rri:alpha=0.99,beta=0.5", tmp_path)
    objective = Objective(problem._model, 200, load_text("text.txt"), 0, 2, 2, 128)
    assert outcome.value == pytest.approx(objective.loss("rri:alpha=0.99,beta=0.5"), rel=1e-5)
    recall = objective.recall("rri:alpha=0.99,beta=0.5")
    assert recall and outcome.recall == sum(recall.values()) / len(recall)
    reports = problem.reports(tmp_path)
    assert list(reports) == [1, 2] and reports[2] == outcome.value != reports[1]


def test_a_remedy_s_comparison_is_kept_and_gone_on_with(remedy, tmp_path):
    settings = [remedy.space.default_text, "rri:alpha=0.9,beta=1"]
    held = remedy.compare(settings, tmp_path, lambda line: None)
    assert set(held) == {"none", *settings} and all(len(seeds) == 2 for seeds in held.values())
    assert held["none"][0] != held["none"][1], "another seed has other slices"
    losses = [held[s][0][0] for s in held]
    assert len({h.value for h in losses}) == 3 and {(h.metric, h.length) for h in losses} == {("loss", 200)}
    files = sorted((tmp_path / "compare").glob("*.json"))
    assert len(files) == 6
    rows = json.loads(files[0].read_text())
    rows[0]["value"] = -1.0
    files[0].write_text(json.dumps(rows))
    again = remedy.compare(settings, tmp_path, lambda line: None)
    assert sum(h.value == -1 for seeds in again.values() for seed in seeds for h in seed) == 1


@pytest.mark.parametrize(("change", "words"), [
    ({"target": 128}, "above the training length"),
    ({"held_out": "text.txt"}, "shares text"),
    ({"mitigation": "erase"}, "erases"),
    ({"mitigation": "recompute:last=64"}, "has nothing to tune"),
    ({"model": "nowhere"}, "nowhere"),
])  # fmt: skip
def test_what_a_remedy_cannot_be_tuned_for(remedy, tmp_path, change, words):
    with pytest.raises(InputError) as error:
        replace(remedy, **change).prepared(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
