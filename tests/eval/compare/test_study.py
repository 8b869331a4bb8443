"""A comparison: its config, its cells killed and gone on with, those that fail, and the command."""

from __future__ import annotations

import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from training_runs import Killed

from rnn_longctx import cli
from rnn_longctx.config import load_yaml, to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.eval import pool
from rnn_longctx.eval.compare import CompareConfig, cell, run_study, study
from rnn_longctx.eval.compare.cell import chosen, folder_of, is_done, measured, run_cell, trial
from rnn_longctx.eval.compare.choice import Trial
from rnn_longctx.eval.compare.measures import MeasureConfig
from rnn_longctx.eval.tables.compare import read
from rnn_longctx.train import TrainingDiverged
from rnn_longctx.train.corpus import Corpus
from rnn_longctx.train.snapshots import claim_folder

ROOT = Path(__file__).parents[3]
CONFIG = """
shape: {d_model: 16, n_layer: 1, mlp: 2}
entries:
  - {name: a, mixer: "mamba2:headdim=8,d_state=8"}
  - {name: b, mixer: "sliding-window:window=16,heads=2", longest: 256}
train:
  data: {text: [text.txt], held_out: 0.2, mix: [{task: passkey, fraction: 0.3, lengths: [120, 128]}]}
  train_length: 128
  batch_size: 4
  steps: 6
  schedule: {warmup: 2}
  checkpoint_every: 2
learning_rates: [1e-3, 3e-3]
seeds: 2
measure:
  loss: {lengths: [128, 256, 512], texts: [other.txt], slices: 2, tokens: 0}
  recall: {tasks: ["passkey:n=2"], lengths: [128]}
  probe: {length: 256, every: 64, text: other.txt}
  remedies: {names: ["rri:alpha=0.9,beta=1"], lengths: [256], texts: [other.txt], slices: 2, tasks: []}
  batch: 4
device: cpu
out: runs
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path, monkeypatch) -> CompareConfig:
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "other.txt"):
        words = np.random.default_rng().choice(["def ", "return ", "x", " = ", "(y)\n"], 4000)
        Path(name).write_text("".join(words))
    Path("compare.yaml").write_text(CONFIG)
    return load_yaml(CompareConfig, "compare.yaml")


@pytest.fixture
def here(monkeypatch):
    """Cells run in this process, a moment before the one that stands for them: to import torch takes longer."""

    def command(name: str, where: Path) -> list[str]:
        settings = load_yaml(CompareConfig, where / cell.STUDY)
        try:
            run_cell(settings, settings.find(name), where)
        except InputError as error:
            return [sys.executable, "-c", f"import sys; sys.exit({str(error)!r})"]
        return ["true"]

    monkeypatch.setattr(study, "command", command)
    monkeypatch.setattr(pool, "_WAIT", 0.005)


def test_rates_first_then_seeds_at_the_best_and_nothing_twice(config, here):
    said: list[str] = []
    out = run_study(config, 2, say=said.append)
    assert said[-1] == "6 cells run" and said[0].startswith("a: ")
    frame = read(out)
    for entry in "ab":
        rate = chosen(load_yaml(CompareConfig, out / cell.STUDY), entry, out)
        own = frame[frame["entry"] == entry]
        of_seeds = own[(own["metric"] == "loss") & own["seed"].notna()]
        assert set(of_seeds["learning_rate"]) == {rate} and set(of_seeds["seed"]) == {0, 1}
        held_out = own[own["metric"] == "held_out_loss"]
        assert sorted(held_out.loc[held_out["seed"] == 0, "learning_rate"]) == [1e-3, 3e-3]
        assert (own[own["metric"] == "verdict"]["seed"].isna()).sum() == 1
    sizes = frame.groupby("entry")["parameters"].first()
    assert abs(sizes["b"] - sizes["a"]) <= 0.02 * sizes["a"]
    a, b = (frame[frame["entry"] == entry] for entry in "ab")
    assert a["length"].max() == 512 and b["length"].max() == 256, "b is read no further"
    metrics = set(a["metric"])
    assert metrics >= {"loss", "gain", "accuracy", "heads_left", "state_growth", "verdict", "T_forget"}
    assert "rri:alpha=0.9,beta=1" in set(a["mitigation"])
    refused = b[b["metric"] == "not_applicable"]
    assert (
        set(refused["mitigation"]) == {"rri:alpha=0.9,beta=1", "none"} and refused["note"].str.contains("recur").all()
    )
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    run_study(config, 1, say=said.append)
    assert said[-1] == "0 cells run"
    more = replace(config, measure=replace(config.measure, loss=replace(config.measure.loss, lengths=[128, 256])))
    run_study(more, 1, say=said.append)
    assert said[-1] == "4 cells run" and before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    with pytest.raises(InputError, match=r"another config \(train\.steps was 6, is 7\)"):
        run_study(replace(config, train=replace(config.train, steps=7)))


def test_a_probe_is_seen_again_under_remedies_and_what_was_measured_without_stays(config, here):
    config = replace(config, learning_rates=[1e-3], seeds=1, entries=config.entries[:1])
    probe_alone = replace(config.measure, loss=None, recall=None, remedies=None)
    config = replace(config, measure=probe_alone)
    remedy = "delta-scale:scale=0.1"  # its decays are weaker, so that states keep more
    config = replace(config, measure=replace(probe_alone, probe=replace(probe_alone.probe, remedies=[remedy])))
    rows = read(run_study(config, 1, say=lambda _: None)).query("metric == 'state_growth' and seed.notna()")
    growth = rows.set_index(["mitigation", "length"])["value"]
    assert set(growth.index) == {(name, length) for name in ("none", remedy) for length in (128, 256)}
    assert growth["none", 256] != growth[remedy, 256]


def test_the_committed_study_is_read_again_by_the_present_code(tmp_path):
    """As docs/results/recurrences.md promises: a setting that came later does not make its cells another study's."""
    with tarfile.open(ROOT / "benchmarks/results/recurrences_cells.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    where = tmp_path / "recurrences"
    present = load_yaml(CompareConfig, ROOT / "configs/compare/recurrences.yaml")
    assert present.settled().models == present.models
    now = to_dict(present.train)
    claim_folder(where, {"train": {k: v for k, v in now.items() if not k.endswith("_every")}}, ["cells"])
    config = load_yaml(CompareConfig, where / cell.STUDY)
    for entry in config.entries:
        rate = chosen(config, entry.name, where)
        assert rate is not None and all(measured(config, seed, where) for seed in config.replicas(entry.name, rate))
    searched = ["mamba2-slow", "deltanet"]  # whose T_forget is known: nothing is left to train, nor of what is probed
    assert config.forget and study._Cells(config, where, searched).due() == []
    erasing = tmp_path / "erasing"
    config = load_yaml(CompareConfig, erasing / cell.STUDY)
    present = load_yaml(CompareConfig, ROOT / "configs/compare/erasing.yaml")
    assert (
        present.models
        and config.measure.probe == present.measure.probe
        and study._Cells(config, erasing, ["deltanet", "kda", "kda-slow"]).due() == []
    )


def test_remedies_alone_stand_beside_the_bare_model_and_nothing_is_measured_of_nothing(config, here):
    config = replace(config, learning_rates=[1e-3], seeds=1, entries=config.entries[:1])
    nothing = replace(config.measure, loss=None, recall=None, probe=None, remedies=None)
    read(run_study(replace(config, measure=nothing), 1, say=lambda _: None))
    remedies = replace(config.measure.remedies, tasks=["passkey:n=2"])
    out = run_study(replace(config, measure=replace(nothing, remedies=remedies)), 1, say=lambda _: None)
    rows = read(out).query("metric == 'loss' or metric == 'accuracy'")
    assert set(zip(rows["metric"], rows["mitigation"])) == {
        (metric, remedy) for metric in ("loss", "accuracy") for remedy in ("none", "rri:alpha=0.9,beta=1")
    }


def test_a_killed_cell_goes_on(config, monkeypatch):
    """In the middle of its training, then in the middle of what is measured; what comes of it is the same."""
    config = replace(config, learning_rates=[1e-3], seeds=1, entries=config.entries[:1])
    one, out = config.trials("a")[0], Path("killed")
    run_cell(config, one, Path("whole"))
    steps: list[int] = []
    batch = Corpus.batch

    def until_killed(self, settings, step):
        steps.append(step)
        if step == 5 and steps.count(5) == 1:
            raise Killed
        return batch(self, settings, step)

    monkeypatch.setattr(Corpus, "batch", until_killed)
    with pytest.raises(Killed):
        run_cell(config, one, out)
    assert trial(config, one, out) is None and not is_done(config, one, out)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(cell, "measure", lambda *_: (_ for _ in ()).throw(Killed))
        run_cell(config, one, out)
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5], "from its snapshot after four steps"
    assert trial(config, one, out) is not None and measured(config, one, out) is None
    with monkeypatch.context() as m:
        m.setattr(cell, "train", None)
        run_cell(config, one, out)
    assert is_done(config, one, out) and not (folder_of(out, one) / "snapshots").exists()

    def values(where: Path):
        about, rows = measured(config, one, where)
        return about, [
            (r["metric"], r["mitigation"], r["length"], r["value"]) for r in rows if r["value"] == r["value"]
        ]

    assert values(out) == values(Path("whole"))
    assert trial(config, one, out) == trial(config, one, Path("whole"))


def test_a_cell_that_fails_is_named_and_the_others_go_on(config, here, monkeypatch):
    config = replace(config, learning_rates=[1e-3], seeds=1)
    works, broken = study.command, "b-lr0.001-T128-s0"
    failing = {broken}

    def command(name, where):
        return ["sh", "-c", "echo no memory; exit 3"] if name in failing else works(name, where)

    monkeypatch.setattr(study, "command", command)
    said: list[str] = []
    with pytest.raises(InputError, match=f"1 cell failed, the first of them {broken}: no memory"):
        run_study(config, 1, say=said.append)
    assert f"{broken}: failed: no memory" in said and set(read(Path("runs"))["entry"]) == {"a"}
    run_study(config, 1, ["a"], said.append)
    assert said[-1] == "0 cells run"
    failing.clear()
    run_study(config, 1, say=said.append)
    assert said[-1] == "1 cell run" and set(read(Path("runs"))["entry"]) == {"a", "b"}


def test_an_entry_that_has_changed_does_not_go_by_the_weights_of_what_it_was(config, here):
    config = replace(config, learning_rates=[1e-3], seeds=1, entries=config.entries[:1], equal=None)
    run_study(config, 1, say=lambda _: None)
    before = read(Path("runs"))
    changed = replace(config, entries=[replace(config.entries[0], mlp=3.0)])
    with pytest.raises(InputError, match=r"holds a run of another config \(model.mlp was .*, is 3.0\)"):
        run_study(changed, 1, say=lambda _: None)
    said: list[str] = []
    run_study(config, 1, say=said.append)
    assert said[-1] == "0 cells run", "nothing is lost"
    pd.testing.assert_frame_equal(read(Path("runs")), before)


def test_a_rate_that_diverges_is_not_chosen_and_no_rate_left_is_a_failure(config, here, monkeypatch):
    config = replace(config, seeds=1, entries=config.entries[:1])
    train, too_large = cell.train, [3e-3]

    def diverging(settings):
        if settings.optimizer.lr in too_large:
            raise TrainingDiverged("20 steps in a row were skipped")
        return train(settings)

    monkeypatch.setattr(cell, "train", diverging)
    run_study(config, 1, say=lambda _: None)
    settings = load_yaml(CompareConfig, Path("runs") / cell.STUDY)
    assert chosen(settings, "a", Path("runs")) == 1e-3
    notes = read(Path("runs")).query("metric == 'held_out_loss'").set_index("learning_rate")["note"]
    assert notes[3e-3].startswith("20 steps") and notes[1e-3] == ""
    too_large.append(1e-3)
    with pytest.raises(InputError, match=r"a-lr0\.00.*: training diverges at every learning rate: 20 steps"):
        run_study(replace(config, out="others"), 1, say=lambda _: None)


def test_a_search_for_t_forget_trains_at_other_lengths(config, here):
    loss = replace(config.measure.loss, lengths=[128, 256, 512])
    measure = MeasureConfig(loss, None, None, None, batch=4)
    config = replace(config, forget=[256], learning_rates=[1e-3], seeds=1, entries=config.entries[:1], measure=measure)
    out = run_study(config, 1, say=lambda _: None)
    longer = json.loads((out / "cells" / "a-lr0.001-T256-s0" / "measured.json").read_text())
    assert longer["as"]["trained"]["batch_size"] == 2 and {r["mitigation"] for r in longer["rows"]} == {"none"}
    forget = read(out).query("metric == 'T_forget'").iloc[0]
    assert forget["note"] == "at most 128 (the shortest trained, which passes)", (
        "it has learned nothing that could be lost"
    )


MISTAKES = {
    'unknown key "entries[0].mixr"; did you mean "mixer"?': {"entries": [{"name": "a", "mixr": "gla"}]},
    "unknown mixer 'gl'; did you mean \"gla\"?": {"entries": [{"name": "a", "mixer": "gl"}]},
    "entries: a is there twice": {"entries": [{"name": "a", "mixer": "gla"}] * 2},
    "entries: a name is of letters": {"entries": [{"name": "a b", "mixer": "gla"}]},
    "entries: expected at least one": {"entries": []},
    "longest must be beyond train_length 128": {"entries": [{"name": "a", "mixer": "gla", "longest": 128}]},
    "seeds: expected at least 1, got 0": {"seeds": 0},
    "learning_rates: expected different ones": {"learning_rates": [1e-3, 1e-3]},
    "learning_rates: expected different ones above 0": {"learning_rates": []},
    'missing key "learning_rates"': {"learning_rates": ...},
    "expected lengths in ascending order, got 256 after 512": {"measure": {"loss": {"lengths": [128, 512, 256]}}},
    "forget: expected lengths in ascending order, got 64 after 128": {"forget": [64]},
    "forget: 4096 is more than the 512 tokens of a step": {"forget": [4096]},
    "unknown mitigation 'state-nrm'; did you mean \"state-norm\"?": {"measure": {"remedies": {"names": ["state-nrm"]}}},
    "unknown task 'passky'; did you mean \"passkey\"?": {"measure": {"recall": {"tasks": ["passky"]}}},
    'unknown key "measure.los"; did you mean "loss"?': {"measure": {"los": None}},
    "text.txt is trained on": {"measure": {"probe": {"text": "text.txt"}}},
    "chosen by held-out text": {"train": {"data": {"held_out": 0}, "train_length": 128}},
    "equal: expected 'parameters' or 'flops' or 'state' or null, got str 'parameter'": {"equal": "parameter"},
    "recall.tasks: mqar:pairs=4,vocab_size=8 and another have one name, mqar4": {
        "measure": {"recall": {"tasks": ["mqar:pairs=4,vocab_size=8", "mqar:pairs=4,vocab_size=16"], "lengths": [64]}}
    },
}


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes_in_a_config_are_one_line(said, config):
    changed = yaml.safe_load(CONFIG) | MISTAKES[said]
    Path("wrong.yaml").write_text(yaml.safe_dump({k: v for k, v in changed.items() if v is not ...}))
    with pytest.raises(InputError) as error:
        load_yaml(CompareConfig, "wrong.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


BEFORE = {
    "other.txt has": {"measure": {"loss": {"lengths": [128, 1048576], "texts": ["other.txt"]}}},
    "probe.remedies: unknown mitigation": {"measure": {"probe": {"text": "other.txt", "remedies": ["nothing-such"]}}},
    "no text at nowhere.txt": {"measure": {"probe": {"text": "nowhere.txt"}}},
    "measure.recall: ": {"measure": {"recall": {"lengths": [16]}, "loss": None, "remedies": None, "probe": None}},
    "512 ids, and the models 256": {
        "measure": {"recall": {"tasks": ["mqar"]}, "loss": None, "remedies": None, "probe": None}
    },
}


@pytest.mark.parametrize("said", BEFORE)
def test_what_cannot_be_measured_is_said_before_anything_is_trained(said, config):
    Path("wrong.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG) | BEFORE[said]))
    with pytest.raises(InputError, match=said):
        run_study(load_yaml(CompareConfig, "wrong.yaml"), say=lambda _: None)
    assert not Path("runs").exists()


def test_an_entry_that_is_not_there(config):
    with pytest.raises(InputError, match="no entry 'c'"):
        run_study(config, 1, ["c"])


def test_a_score_that_is_written_is_read_again():
    how = Trial(1.5, {"passkey": 0.5}, "")
    assert Trial(**json.loads(json.dumps(vars(how)))) == how and how.score == 2.0


@pytest.mark.parametrize("name", ["smoke", "induction", "mqar", "recovery", "ablations", "planted"])
def test_the_configs_that_come_with_the_package(name):
    """The others: the committed study's, above."""
    config = load_yaml(CompareConfig, ROOT / "configs" / "compare" / f"{name}.yaml")
    assert config.settled().models == config.models


def test_the_command(config, monkeypatch, capsys):
    """In processes, as a person would."""
    small = yaml.safe_load(CONFIG) | {"learning_rates": [1e-3], "seeds": 1, "out": "elsewhere"}
    small["measure"] |= {"probe": None, "remedies": None, "recall": None}
    small["train"]["steps"] = 2
    Path("small.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.setattr(sys, "argv", ["rnn-longctx", "compare", "small.yaml", "--out", "o", "--only", "a"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed, said = capsys.readouterr()
    assert not stop.value.code, said
    assert "holds up to 512" in printed and "collapses: beyond" in printed and "1 cell run" in printed
    assert {p.name for p in Path("o").iterdir()} >= {"compare.parquet", "compare.csv", "compare.png", "compare.pdf"}
    assert not Path("elsewhere").exists()
