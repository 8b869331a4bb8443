"""A study: the cells it trains, killed and gone on with, and what the command line makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from called import called

import rnn_longctx
from rnn_longctx.cli.commands.capacity import MeasureOptions
from rnn_longctx.config import load_yaml
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.eval import pool
from rnn_longctx.eval.capacity import CapacityConfig, MeasureConfig, bound, measure, models, study, tables
from rnn_longctx.eval.capacity.cell import STUDY, asked, is_done, run_cell
from rnn_longctx.eval.capacity.config import MQARConfig, PretrainConfig, StudyCell, label
from rnn_longctx.eval.results import Results
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

CONFIG = """
train:
  model: {d_model: 16, n_layer: 1, d_state: 8, headdim: 8, A_init: [1e-3, 0.3], A_log_uniform: true}
  data: {text: [text.txt], held_out: 0.1, passkey: {fraction: 0.3, lengths: [110, 128]}}
  schedule: {warmup: 2}
  train_length: 128
  batch_size: 4
  steps: 6
  checkpoint_every: 2
  device: cpu
shapes: [{}, {d_state: 16}]
train_lengths: [128, 256]
seeds: 1
measure: {limit: 600, slices: 1, width: 0.3, text: text.txt}
mqar: {tasks: [mqar], pairs: [2, 3], vocab_size: 16, batch_size: 8, steps: 4, samples: 12}
out: study
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path, monkeypatch) -> CapacityConfig:
    monkeypatch.chdir(tmp_path)
    words = np.random.default_rng().choice(["def ", "return ", "x", " = ", "(y)\n"], 8000)
    Path("text.txt").write_text("".join(words))
    Path("study.yaml").write_text(CONFIG)
    return load_yaml(CapacityConfig, "study.yaml")


@pytest.fixture
def here(monkeypatch):
    """The first cell runs in a process of its own, as all do; the others in this one, a moment before the one that
    stands for them: to import torch takes longer."""
    command, begun = study.command, []

    def first_alone(one: StudyCell, where: Path) -> list[str]:
        begun.append(one)
        if len(begun) == 1:
            return command(one, where)
        run_cell(load_yaml(CapacityConfig, where / STUDY), one, where)
        return ["true"]

    monkeypatch.setattr(study, "command", first_alone)
    monkeypatch.setattr(pool, "_WAIT", 0.01)


def test_models_of_a_shape_and_seed_go_on_from_one_start(config, here):
    config = replace(config, pretrain=PretrainConfig(192, 3, steps=3), shapes=[{}], mqar=None)
    said: list[str] = []
    out = study.run_study(config, 2, said.append)
    start = config.start_of(StudyCell(config.models[0], 256, 0))
    assert said[0].startswith(start.name) and sum(start.name in line for line in said) == 1  # once, and before the rest
    first = checkpoint.load(out / "models" / start.name / "model")
    cells = [StudyCell(config.models[0], n, 0) for n in (128, 256)]
    made = [checkpoint.load(out / "models" / cell.name / "model") for cell in cells]
    for model in made:
        assert model.provenance["init"]["weights"] == first.weights_hash != model.weights_hash
    about = models.read(out).set_index("model")
    assert start.name not in about.index
    for cell in cells:
        rows = {128: 4, 256: 2}[cell.train_length]
        assert about.loc[cell.name, "train_tokens"] == 6 * rows * cell.train_length + 3 * 3 * 192
    trained = {p: p.stat().st_mtime_ns for p in out.rglob("model/*.safetensors")}
    train = replace(config.train, accumulate=2, log_every=3)
    smaller = replace(config, train=train, measure=replace(config.measure, batch=2))
    study.run_study(smaller, 1, said.append)
    assert said[-1] == "0 cells run", "what else it reads side by side changes nothing"
    study.run_study(replace(config, measure=replace(config.measure, needles=["passkey", "words"])), 1, said.append)
    assert said[-1] == "2 cells run" and "words" in set(Results(out).frame()["task"])
    assert trained == {p: p.stat().st_mtime_ns for p in trained}, "measured, and not trained again"
    with pytest.raises(InputError, match="another"):
        study.run_study(replace(config, pretrain=PretrainConfig(192, 3, steps=4)))


def test_cells_are_trained_measured_and_not_again(config, monkeypatch):
    out = Path("study")
    text, pairs = StudyCell(config.models[0], 128, 0), config.mqar_cells()[0]
    monkeypatch.setattr("rnn_longctx.eval.capacity.mqar.EVERY", 2)
    for cell in (text, pairs):
        run_cell(config, cell, out)
        assert is_done(config, cell, out) and config.find(cell.name) == cell
    row = Results(out).frame().query("model == @text.name and metric == 'nats_per_token' and length == 600").iloc[0]
    assert tables.passes(out, text.name, 600, row["text"]), "it has learned nothing that could be lost"
    with pytest.raises(InputError, match="was not measured"):
        tables.passes(out, text.name, 600, "another text")
    about = models.gather(out).set_index("model")
    c = config.models[0]
    assert about.loc[text.name, "state_elements"] == c.scan_state_elements + c.conv_state_elements
    assert about.loc[text.name, "train_tokens"] == 6 * 4 * 128 and about.loc[pairs.name, "task"] == "mqar"
    frame = Results(out).frame()
    assert set(frame[frame["model"] == pairs.name]["task"]) == {"mqar2", "mqar3"}
    assert set(frame[frame["model"] == text.name]["task"]) == {"lm", "passkey"}
    assert not (out / "models" / text.name / "snapshots").exists()
    before = {p: p.read_bytes() for p in out.rglob("*.json")}
    with monkeypatch.context() as never:
        never.setattr("rnn_longctx.eval.capacity.cell.train", None)
        never.setattr("rnn_longctx.eval.capacity.cell.measure", None)
        run_cell(config, text, out)
        more = replace(config, measure=replace(config.measure, needles=["passkey", "words"]))
        assert not is_done(more, text, out), "what is asked for has changed"
        never.undo()
        never.setattr("rnn_longctx.eval.capacity.cell.train", None)  # measured, and not trained again
        run_cell(more, text, out)
    kept = {p: p.read_bytes() for p in before}
    changed = {p.name for p in before if kept[p] != before[p]}
    assert changed == {"done.json"} and "words" in set(Results(out).frame()["task"])


def test_a_study_is_told_what_to_run_by_outcomes(config, monkeypatch):
    """Processes stand in for training: each is done a moment later, with the losses of a model that passes where it was
    trained long enough for its state."""
    config = replace(config, train_lengths=[128, 192, 256, 320, 384, 448], seeds=3, mqar=None)
    edges = dict(zip((m.d_state for m in config.models), np.random.default_rng().integers(100, 500, 2)))
    out, alive, most, started = Path("study"), [], [0], []

    def losses(cell, at):
        shared = {"model": cell.name, "weights_hash": "0", "mitigation": "none", "task": "lm", "text": "file:text.txt",
                  "batch": 1, "dtype": "float32", "backend": "torch", "device": "cpu", "seed": 0, "stderr": 0.0, "n": 1,
                  "train_length": cell.train_length}  # fmt: skip
        peak = (cell.train_length, "nats_per_token_peak", 1.0)
        for length, metric, value in [peak, *((n, "nats_per_token", loss) for n, loss in at.items())]:
            row = {"length": length, "metric": metric, "value": value, "samples": [value]}
            Results(out).put(shared | row)

    def command(cell, where):
        folder = where / "models" / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        started.append(cell.name)
        done = json.dumps(asked(config, cell))
        passes = cell.train_length >= edges[cell.model.d_state]
        losses(cell, {cell.train_length: 1.0, config.measure.limit: 1.0 if passes else 5.0})
        if cell.name == broken:
            return ["sh", "-c", "echo no memory; exit 3"]
        return ["sh", "-c", f"sleep 0.0$RANDOM; echo '{done}' > {folder}/done.json"]

    def opened(*words, **more):
        alive.append(subprocess.Popen(*words, **more))
        most[0] = max(most[0], sum(p.poll() is None for p in alive))
        return alive[-1]

    monkeypatch.setattr(study, "command", command)
    monkeypatch.setattr(pool, "subprocess", SimpleNamespace(Popen=opened, PIPE=subprocess.PIPE))
    monkeypatch.setattr(pool, "_WAIT", 0.01)
    broken = StudyCell(config.models[1], 448, 0).name
    said: list[str] = []
    with pytest.raises(InputError, match=rf"1 cell failed, the first of them {broken}: no memory"):
        study.run_study(config, 2, said.append)
    assert all(name.startswith(label(config.models[0])) or name == broken for name in started)
    broken = ""
    again = len(started)
    study.run_study(config, 2, said.append)
    assert all(name.startswith(label(config.models[1])) for name in started[again:]), "the rest, and only that"
    for model in config.models:
        mine = {name for name in started if name.startswith(f"{label(model)}-T")}
        assert len(mine) <= 3 + 3 * 3 and f"{label(model)}-T448-s2" in mine
        turn = [n for n in config.train_lengths if n >= edges[model.d_state]]
        if turn:
            assert f"{label(model)}-T{turn[0]}-s2" in mine, "all seeds where the outcome turns"
        else:
            assert len(mine) == 3, "no search where the longest fails"
    assert 1 <= most[0] <= 2
    count = len(started)
    study.run_study(config, 2, said.append)
    assert len(started) == count and said[-1] == "0 cells run"
    with pytest.raises(InputError, match=r"another config \(train\.steps was 6, is 7\)"):
        study.run_study(replace(config, train=replace(config.train, steps=7)), 1, said.append)
    assert (out / STUDY).exists()


def test_mistakes_in_a_config(config, tmp_path):
    data = yaml.safe_load(CONFIG)
    wrong = {
        "shapes: a model has no d_stat": {"shapes": [{"d_stat": 4}]},
        "one is given twice": {"shapes": [{}, {"d_state": 8}]},
        "needs at least one of": {"train_lengths": []},
        "train_lengths: 600 leaves nothing to read up to measure.limit 600": {"train_lengths": [128, 600]},
        "train_lengths: 1 is too short for passkey prompts": {
            "train_lengths": [1],
            "train": {**data["train"], "data": {**data["train"]["data"], "passkey": {"lengths": [50, 60]}}},
        },
        "the search for T_forget goes by none": {"measure": {"limit": 600, "mitigations": ["state-norm"]}},
        "width says how many prompts": {"measure": {"needles": ["words:n=30"]}},
        "measure.seed: expected 0 or more": {"measure": {"seed": -1}},
        "mqar.lr: expected 0 or more": {"mqar": {"lr": -0.1}},
        "asks for no answer": {"measure": {"needles": ["lm"]}},
        'did you mean "passkey"': {"measure": {"needles": ["passky"]}},
        'did you mean "state-norm"': {"measure": {"mitigations": ["state-nrm"]}},
        "lie between 0 and 1": {"measure": {"recall": 1.0}},
        "expected some of mqar": {"mqar": {"tasks": ["mqr"]}},
        "expected numbers of 1 to 8": {"mqar": {"pairs": [9], "vocab_size": 16}},
        "a model of its own": {"train": {**data["train"], "init": "demo"}},
    }
    for said, change in wrong.items():
        file = tmp_path / "wrong.yaml"
        file.write_text(yaml.safe_dump(data | change))
        with pytest.raises(InputError, match=r".*".join(map(str, [said.replace(".", r"\.")]))):
            load_yaml(CapacityConfig, file)
    with pytest.raises(InputError, match="no cell nothing"):
        config.find("nothing")
    assert MQARConfig().pairs and MeasureConfig().limit == 1 << 20
    defaults = {f.name: f.default for f in fields(CapacityConfig)}
    assert Path(str(defaults["out"])) != MeasureOptions().out, "a study and checkpoints do not share a folder"


def test_models_read_as_many_tokens_at_every_length(config):
    for length in (128, 256):
        t = config.training(StudyCell(config.models[1], length, 5), "x")
        assert t.batch_size * length * t.steps == 4 * 128 * 6 and t.seed == 5
        assert t.data.passkey.lengths == (110, length) and t.model.d_state == 16


def tiny(folder: Path, name: str, train_length: int | None = 128) -> None:
    model = Mamba2LM(Mamba2Config(d_model=16, n_layer=1, headdim=8, d_state=8)).eval()
    model.train_length, model.tokenizer, model.name = train_length, ByteTokenizer(), name
    checkpoint.save(model, folder / name, dtype=torch.float32)


def test_the_command_on_checkpoints(config, monkeypatch, capsys, tmp_path):
    for name, length in (("a", 128), ("b", None)):
        tiny(tmp_path, name, length)
    words = ("a", "b", "--limit", "512", "--width", "0.3", "--text", "text.txt", "--slices", "1", "--out", "r",
             "--needle", "passkey:haystack=text.txt", "--mitigation", "none",
             "--mitigation", "rri:alpha=0.9,beta=1")  # fmt: skip
    code, printed, said = called(monkeypatch, capsys, "capacity", *words)
    assert code == 0, said
    frame = pd.read_csv("r/findings.csv")
    a, b = (frame[frame["model"] == name] for name in "ab")
    assert len(a) == 2 * 2 and set(a["quantity"]) == {"forgets", "T_recall of passkey-in-text.txt"}
    assert len(b) == 2 and "training length unknown" in printed
    assert frame[frame["quantity"] != "forgets"]["text"].str.startswith("below ").all(), "they know nothing"
    assert set(a[a["quantity"] == "forgets"]["text"]) == {"no collapse up to 512"}
    line = "a, trained at 128, none: no collapse up to 512; T_recall of passkey-in-text.txt below 128 (the"
    assert (
        f"\n{line}" in printed
        and "\npoints\n" not in printed
        and "findings\n" not in printed
        and "T_forget" not in printed
    )
    cells = {p: p.stat().st_mtime_ns for p in Path("r/cells").glob("*.json")}
    remedies = ["none", "rri:alpha=0.9,beta=1"]
    settings = MeasureConfig(512, 1, ["passkey:haystack=text.txt"], width=0.3, mitigations=remedies, text="text.txt")
    measure(checkpoint.load("a"), settings, "r")
    assert {p: p.stat().st_mtime_ns for p in Path("r/cells").glob("*.json")} == cells, "nothing is measured twice"
    for path in Path("r").glob("*.png"):
        path.unlink()
    assert called(monkeypatch, capsys, "capacity", "plot", "r")[0] == 0 and list(Path("r").glob("T_recall*.png"))
    code, printed, _ = called(monkeypatch, capsys, "capacity", "advise", "--context", "256k")
    assert code == 0 and "a state of 12.9M numbers" in printed and "warning: of other models" in printed


def test_checkpoints_of_one_name_are_no_seeds_of_one_shape(config, monkeypatch, capsys, tmp_path):
    """Measured one after the other, of different sizes, and the first of them again."""
    for width in (16, 32):
        model = Mamba2LM(Mamba2Config(d_model=width, n_layer=1, headdim=8, d_state=8)).eval()
        model.train_length, model.tokenizer, model.name = 128, ByteTokenizer(), "run/last"
        checkpoint.save(model, tmp_path / str(width) / "run" / "last", dtype=torch.float32)
    words = ("--limit", "256", "--width", "0.3", "--text", "text.txt", "--slices", "1", "--out", "r")
    for width in (16, 32, 16):
        code, _, said = called(monkeypatch, capsys, "capacity", f"{width}/run/last", *words)
        assert code == 0, said
    points = pd.read_csv("r/points.csv")
    assert set(points["shape"]) == {"run/last", f"run/last@{rnn_longctx.load('32/run/last').weights_hash[:6]}"}
    assert set(points["quantity"]) == {"T_recall"}, "one training length says nothing of T_forget"
    assert points["state_elements"].nunique() == 2 and set(points["models"]) == {1}


MISTAKES = {
    "missing": "neither a directory nor a hub id",
    "a missing": "neither a directory nor a hub id",
    "a --limit 16": "16 were asked for",
    "a --needle multikey:keys=1": "a prompt holds 2 to 8 keys",
    "a --limit 0": "positive whole number",
    "a --needle lm": "asks for no answer",
    "a --mitigation nothing": "unknown mitigation",
    "a --recall 1.2": "lie between 0 and 1",
    "a --needle passkey:haystack=text.txt --limit 1m": "a context of 1048576 tokens was asked for",
    "train nowhere.yaml": "cannot read config",
    "train study.yaml --set train.data.text=[nowhere.txt]": "no text at nowhere.txt",
    "train study.yaml --set measure.text=nowhere.txt": "no text at nowhere.txt",
    "train study.yaml --set train.device=tpu": "expected auto, cpu, cuda",
    "plot nowhere": "evaluate first",
    "advise --context 4k --study nowhere": "evaluate first",
    "advise --context 4k --recall 0.5": "fits a recall of 0.95 alone",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line(words, config, monkeypatch, capsys, tmp_path):
    tiny(tmp_path, "a")
    code, printed, said = called(monkeypatch, capsys, "capacity", *words.split())
    assert code == 2 and MISTAKES[words] in said and said.count("\n") == 1
    assert not printed, "nothing is measured before a mistake is found"


def test_recall_stops_at_the_sample_it_has(config, tmp_path):
    """A stored row with more prompts answers for fewer, and a first look for no more than itself."""
    tiny(tmp_path, "a")
    model = checkpoint.load(tmp_path / "a")
    c = MeasureConfig(limit=256, width=0.3, text="text.txt", slices=1)
    measure(model, c, "r")
    rows = Results("r").frame()
    whole = rows[(rows["task"] == "passkey") & rows["depth"].isna()]
    assert set(whole["n"]) == {20} and list(whole["length"]) == [128], "64 tokens hold no prompt"
    few = len(list(Path("r/cells").glob("*.json")))
    measure(model, replace(c, recall=0.9), "r")
    assert len(list(Path("r/cells").glob("*.json"))) == few


@pytest.mark.slow
def test_a_killed_study_goes_on(config):
    """In processes, two at once, killed hard in the middle; what it then finds is what one that was not killed does."""

    def start() -> subprocess.Popen:
        words = [sys.executable, "-m", "rnn_longctx.cli", "capacity", "train", "study.yaml", "--parallel", "2"]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start()
    deadline = time.monotonic() + 120
    while not list(Path("study/models").glob("*/model/config.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trained = {p: p.stat().st_mtime_ns for p in Path("study/models").glob("*/model/model.safetensors")}
    assert 1 <= len(trained) < 4
    again = start()
    printed, said = again.communicate(timeout=500)
    assert again.returncode == 0, said
    assert {p: p.stat().st_mtime_ns for p in trained} == trained, "what was trained is not trained again"
    assert "T_recall" in printed and Path("study/mqar.png").exists()
    done = [p.parent.name for p in Path("study/models").glob("*/done.json")]
    assert len(done) >= 4 and sum("mqar" in name for name in done) == 2
    last = start()
    printed, _ = last.communicate(timeout=300)
    assert "0 cells run" in printed


def test_state_size_is_what_a_stream_carries():
    for _ in range(5):
        draws = [int(torch.randint(1, 5, ())) for _ in range(4)]
        c = Mamba2Config(d_model=8 * draws[0], n_layer=draws[1], d_state=3 * draws[2], headdim=4, d_conv=1 + draws[3])
        model = Mamba2LM(c)
        cache = model.new_cache()
        model(torch.zeros(1, 7, dtype=torch.int64), cache)
        line = models.describe(model, shape="x")
        scan = sum(layer.scan.state.numel() for layer in cache.layers)
        conv = sum(layer.conv.numel() for layer in cache.layers)
        assert (line["scan_state_elements"], line["conv_state_elements"]) == (scan, conv)
        assert line["state_elements"] == scan + conv and line["d_state"] == c.d_state and line["shape"] == "x"
        assert line["parameters"] == sum(p.numel() for p in model.parameters())
        assert line["most_pairs"] == bound.most_pairs(scan + conv, c.vocab_size)
        assert models.describe(model, task="mqar")["most_pairs"] == bound.most_pairs(scan + conv, c.vocab_size // 2)
