"""`rnn-longctx eval` under torchrun and accelerate: ranks share a sweep, and one that dies loses its try alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from called import called
from evaluated import make_model

import rnn_longctx
from rnn_longctx import ranks
from rnn_longctx.eval import Results
from rnn_longctx.models import checkpoint

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
SWEEP = {
    "lengths": [96, 128],
    "tasks": ["lm:slices=2,tokens=0", "passkey:n=4,least=4"],
    "mitigations": ["none", "state-norm"],
}
# Writes down every cell that is stored, and by which rank. As the file `mode` says, `fragile` kills a process with the
# first answer of a rank, for which the others wait; or whoever is asked at 96 tokens.
PLUGIN = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rnn_longctx
from rnn_longctx import ranks
from rnn_longctx.eval.results import Results
from rnn_longctx.tasks import Example, Task

HERE, RANK, put = Path(__file__).parent, os.environ.get("RANK", "0"), Results.put


def noted(self, row):
    cell = (RANK, *(row[name] for name in ("mitigation", "task", "length", "metric", "depth")))
    with (HERE / "stored.txt").open("a") as file:
        file.write(" ".join(map(str, cell)) + "\\n")
    put(self, row)


Results.put = noted


def answered(length):
    mode, victim = (HERE / "mode").read_text().split()
    if mode in ("exit", "kill"):
        died, until = HERE / "died", time.monotonic() + 60
        if RANK == victim and not died.exists():
            died.touch()
            os._exit(1) if mode == "exit" else os.kill(os.getpid(), signal.SIGKILL)
        while not died.exists() and time.monotonic() < until:
            time.sleep(0.05)
    if mode == "always" and length == 96:
        os._exit(1)


@rnn_longctx.register
@dataclass(frozen=True)
class Fragile(Task):
    name = "fragile"

    def example(self, length, i, n, rng, tokenizer):
        return Example(rng.integers(0, 16, length), np.arange(length) == length - 1)

    def right(self, reply, example, tokenizer):
        answered(len(example.ids))
        return super().right(reply, example, tokenizer)
"""


class Run(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def start(text, unseen, tmp_path):
    """start(launcher, words...) -> what a run said, of one process without a launcher; with a model in tmp_path/tiny
    and results in tmp_path/out."""
    checkpoint.save(make_model(), tmp_path / "tiny", dtype=torch.float32)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "mode").write_text("never -")

    def run(launcher: list[str], *words: str) -> Run:
        module = ["-m", "rnn_longctx.cli"]
        command = [sys.executable, *(["-m", *launcher] if launcher else []), *module, "eval", "tiny", *words]
        command += ["--plugin", "plugin.py", "--text", text, "--calibration-text", unseen, "--out", "out"]
        settings = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            command, env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True, timeout=150
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return run


def stored(folder: Path) -> Counter[str]:
    """How often each cell was stored, in whatever order and by whatever rank."""
    return Counter(line.partition(" ")[2] for line in (folder / "stored.txt").read_text().splitlines())


def words() -> list[str]:
    options = {"--lengths": [",".join(map(str, SWEEP["lengths"]))], "--task": SWEEP["tasks"]}
    options |= {"--mitigation": SWEEP["mitigations"]}
    return [word for name, values in options.items() for value in values for word in (name, value)]


def assert_as_one_process_measures(folder: Path, text: str, unseen: str) -> None:
    """Cell by cell: the same keys (but for the plugin), and the same numbers (but for the noise of float32)."""
    model = rnn_longctx.load(folder / "tiny", device="cpu")
    alone = rnn_longctx.evaluate(model, **SWEEP, text=text, calibration_text=unseen, out=folder / "alone")
    shared = Results.read(folder / "out")
    key = ["mitigation", "calibration", "task", "text_hash", "length", "depth", "metric", "batch", "seed", "n"]
    both = [frame.sort_values(key).reset_index(drop=True) for frame in (alone, shared)]
    pd.testing.assert_frame_equal(*(frame[[*key, "model", "weights_hash", "device", "backend"]] for frame in both))
    for one, other in zip(*(frame.samples for frame in both), strict=True):
        assert list(one) == pytest.approx(list(other), rel=1e-5)
    assert (both[1].seconds > 0).all() and (both[1].peak_bytes > 0).all()


@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)], ids=lambda w: w[0])
def test_two_ranks_measure_what_one_process_does(start, launcher, text, unseen, tmp_path):
    run = start(launcher, *words())
    assert run.code == 0, run.err
    for once in ("trained at  64", "loss in nats per token, ", "passkey accuracy, ", "out: results.parquet"):
        assert len(re.findall(f"^{once}", run.out, re.MULTILINE)) == 1, f"one rank speaks: {run.out}"
    assert "rnn-longctx:" not in run.err, run.err
    assert set(stored(tmp_path).values()) == {1}, "a cell was measured twice"
    assert not list((tmp_path / "out" / "claims").glob("[!l]*"))
    (about,) = map(json.loads, (tmp_path / "out" / "runs.jsonl").read_text().splitlines())
    assert about["command"].startswith("rnn-longctx eval "), "a launcher starts the module, a person the program"
    assert_as_one_process_measures(tmp_path, text, unseen)


@pytest.mark.slow
def test_a_mistake_that_all_ranks_make_is_said_by_one(start):
    run = start(TORCHRUN, "--task", "pasky")
    said = [line for line in run.err.splitlines() if line.startswith("rnn-longctx:")]
    assert run.code != 0 and len(said) == 1 and 'did you mean "passkey"' in said[0], run.err


def test_a_mistake_that_another_rank_makes_alone_is_said_by_it(monkeypatch, capsys):
    """Once the launcher has had the time to end it, had rank 0 made that mistake too."""
    waited: list[float] = []
    monkeypatch.setattr(ranks, "time", SimpleNamespace(sleep=waited.append))
    for rank, waits in (("0", []), ("1", [ranks.PATIENCE])):
        monkeypatch.setenv("RANK", rank)
        code, _, said = called(monkeypatch, capsys, "generate", "./missing/x", "--prompt", "a")
        assert code == 2 and "neither a directory nor a hub id" in said and waited == waits


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "by", "how"), [(0, "kill", "signal 9"), (1, "exit", "exit code 1")])
def test_a_rank_that_dies_goes_on(start, tmp_path, victim, by, how):
    """In the middle of a cell, in a way that no Python notices; everything is there at the end all the same."""
    (tmp_path / "mode").write_text(f"{by} {victim}")
    run = start(TORCHRUN, "--lengths", "64,80,96", "--task", "fragile:n=2,least=2", "--json")
    assert run.code == 0 and (tmp_path / "died").exists(), run.err
    said = [line for line in run.err.splitlines() if line.startswith("rnn-longctx:")]
    assert said == [f"rnn-longctx: rank {victim} died ({how}), and is begun again"]
    assert stored(tmp_path) == {f"none fragile {length} accuracy None": 1 for length in (64, 80, 96)}
    assert {row["length"] for row in json.loads(run.out)["tables"]["results"]} == {64, 80, 96}


@pytest.mark.slow
def test_a_cell_that_all_die_of_is_said_to_be_missing(start, tmp_path):
    """The others are measured, and the line that rank 0 says names the command that goes on. One process, too, measures
    the rest alone."""
    (tmp_path / "mode").write_text("always -")
    question = ["--lengths", "64,80,96", "--task", "fragile:n=2,least=2"]
    run = start(TORCHRUN, *question)
    said = [line for line in run.err.splitlines() if line.startswith("rnn-longctx:")]
    assert run.code != 0 and len(said) == 3 and run.out.count("fragile accuracy, ") == 1, run.err
    assert all(re.search(r"rank [01] died \(exit code 1\), and is begun again", line) for line in said[:2])
    assert said[2].startswith(
        "rnn-longctx: 1 cell is missing: none, fragile at 96 (its process died); go on with: "
        "torchrun --nproc-per-node 2 -m rnn_longctx.cli eval tiny --lengths 64,80,96"
    )
    assert stored(tmp_path) == {f"none fragile {length} accuracy None": 1 for length in (64, 80)}
    (tmp_path / "mode").write_text("never -")
    run = start([], *question)
    assert run.code == 0 and "2 of 3 cells were there, and not measured again" in run.err, run.err
    assert stored(tmp_path) == {f"none fragile {length} accuracy None": 1 for length in (64, 80, 96)}
