"""The checkpoints that come with the package, and the story that the demo tells."""

import csv
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import rnn_longctx
from rnn_longctx.config import load_yaml
from rnn_longctx.eval import EvalConfig, Results
from rnn_longctx.eval.bench import cpu
from rnn_longctx.models.checkpoint.legacy import old_hashes
from rnn_longctx.models.checkpoint.locate import BUNDLED, DEMOS

DEMO = BUNDLED / "demo"


@pytest.fixture(scope="module")
def demo():
    return rnn_longctx.load("demo")


def test_what_is_shipped(demo):
    assert sum(f.stat().st_size for f in DEMO.iterdir()) < 8 * 2**20
    assert demo.name == "demo" and demo.tokenizer.name == "bytes" and demo.train_length
    made = demo.provenance
    assert {"recipe", "seed", "data", "metrics"} <= set(made) and made["data"]["licences"]
    assert "standard library" in made["data"]["excluded"] and "stdlib" not in made["recipe"]["data"]["text"]
    assert demo.calibration["length"] == demo.train_length and "stdlib" not in demo.calibration["text"]
    with (DEMO / "training_log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert int(log[-1]["step"]) == made["recipe"]["steps"] and float(log[-1]["loss"]) < float(log[0]["loss"])


def test_demo_long_is_the_demo_continued_and_does_not_collapse(demo):
    long = rnn_longctx.load("demo-long")
    assert sum(f.stat().st_size for f in (BUNDLED / "demo-long").iterdir()) < 8 * 2**20
    made = long.provenance
    assert made["init"]["weights"] in old_hashes(demo) and made["folded"][0]["mitigation"] == "a-floor"
    assert "standard library" in made["data"]["excluded"] and made["recipe"]["steps"] <= 500
    table = rnn_longctx.evaluate(long, ["512", "16k"], ["lm:slices=1,tokens=16k", "passkey:n=10,max=4k"])
    loss = table[table.metric == "nats_per_token"].set_index("length").value
    recall = table[(table.metric == "accuracy") & table.depth.isna()].set_index("length").value
    assert loss[16384] < 1.3 * loss[512] and recall[512] >= 0.8


def test_demo_delta_finds_keys_far_back_in_filler_and_in_text():
    delta = rnn_longctx.load("demo-delta")
    folder = BUNDLED / "demo-delta"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8 * 2**20
    made = delta.provenance
    assert made["data"]["licences"] and "standard library" in made["data"]["excluded"]
    assert delta.train_length == delta.calibration["length"] == 262144 and "stdlib" not in delta.calibration["text"]
    with (folder / "training_log.csv").open() as file:
        assert int(list(csv.DictReader(file))[-1]["step"]) == made["recipe"]["steps"]
    forgets, *keep = (-mixer.A for mixer in delta.mixers)
    assert forgets.min() > 1 and all(rates.min() < 1e-4 for rates in keep)  # what is kept is not the first layer's
    tasks = ["passkey:n=4", "passkey:haystack=stdlib,n=4"]
    found = rnn_longctx.evaluate(delta, ["4k"], tasks)
    right = found[(found.metric == "accuracy") & found.depth.isna()].groupby("task").value.first()
    assert right["passkey"] == 1 and right["passkey-in-stdlib"] == 1


@pytest.mark.parametrize("name", DEMOS)
def test_its_files_name_no_folder(name):
    for file in (BUNDLED / name).glob("*.json"):
        assert "/home" not in file.read_text() and "/tmp" not in file.read_text(), file
        json.loads(file.read_text())


def test_it_collapses_and_a_remedy_helps(demo):
    """A short form of the demo: 16K tokens, far beyond training. The whole of it is the slow test below."""
    task = "lm:slices=1,tokens=16k"
    table = rnn_longctx.evaluate(demo, ["16k"], [task], ["none", "state-norm:every=64", "recompute:last=512"])
    loss = table[table.metric == "nats_per_token"].set_index(["mitigation", "length"]).value
    trained = loss["none", demo.train_length]
    assert loss["none", 16384] > 2 * trained
    assert loss["state-norm:every=64", 16384] < 1.2 * loss["recompute:last=512", 16384]


def test_it_answers_passkeys_within_its_training_length(demo):
    table = rnn_longctx.evaluate(demo, [demo.train_length], ["passkey:n=20"])
    assert table[table.depth.isna()].value.item() >= 0.8


@pytest.mark.slow
def test_what_the_demo_must_show(demo, tmp_path):
    """The claims of the README, on configs/eval/demo.yaml as it is."""
    config = load_yaml(EvalConfig, Path(__file__).parents[1] / "configs" / "eval" / "demo.yaml")
    table = rnn_longctx.evaluate(demo, config.lengths, config.tasks, config.mitigations, out=str(tmp_path / "r"))
    loss = table[table.metric == "nats_per_token"].set_index(["mitigation", "length"]).value
    recall = table[(table.metric == "accuracy") & table.depth.isna()].set_index(["mitigation", "length"])
    trained, far = demo.train_length, 64 * 1024
    assert loss["none", far] >= 3 * loss["none", trained]
    remedies = [m for m in config.mitigations if m.startswith(("state-norm", "rri"))]
    good = [m for m in remedies if loss[m, far] <= 1.03 * loss["recompute:last=512", far]]
    assert {m.partition(":")[0] for m in good} == {"state-norm", "rri"}
    gains = {m: recall.value[m] - recall.value["none"] for m in good if recall.value[m, 2 * trained] >= 0.9}
    longer = {(m, n) for m in gains for n in gains[m].index if n > 2 * trained and recall.n[m, n] >= 60}
    assert any(gains[m][n] >= 0.2 for m, n in longer)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a child process as Linux counts it")
def test_a_million_tokens_take_less_than_2_gib(tmp_path):
    words = ["eval", "demo", "--lengths", "1m", "--task", "lm:slices=1,tokens=0", "--out", str(tmp_path / "r")]
    subprocess.run([sys.executable, "-m", "rnn_longctx.cli", *words], check=True, timeout=900)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 2 * 2**30
    assert (Results.read(tmp_path / "r").peak_bytes < 2 * 2**30).all()


@pytest.mark.slow
def test_five_times_as_fast_as_transformers_on_a_cpu(demo):
    said = cpu.cpu(demo)
    assert float(re.search(r"ratio ([\d.]+)x", said)[1]) >= 5, said
    assert float(re.search(r"of logits (\S+)", said)[1]) < 1e-4, said
