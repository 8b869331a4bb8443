"""The checkpoint that comes with the package, and the story that its demo tells."""

import csv
import json

import pytest

import rnn_longctx
from rnn_longctx.models.checkpoint import DEMO


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


def test_its_files_name_no_folder():
    for file in DEMO.glob("*.json"):
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
