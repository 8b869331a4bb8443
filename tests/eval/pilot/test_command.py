"""The command, in this process and killed as nothing can be caught."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from called import called
from evaluated import make_model

from rnn_longctx.cli.options import ModelOptions
from rnn_longctx.errors import InputError
from rnn_longctx.eval.pilot.config import option_words, parse_tasks
from rnn_longctx.models import checkpoint
from rnn_longctx.tasks.passkey import Passkey


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder with a model and documents, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rnn_longctx.cli.commands.pilot.process_seconds", lambda: 0.0)  # (of all tests so far)
    checkpoint.save(make_model(), tmp_path / "tiny", dtype=torch.float32)
    (tmp_path / "docs").mkdir()
    for i in range(4):
        (tmp_path / "docs" / f"{i} [b]\n.txt").write_bytes(bytes(torch.randint(97, 122, (800,)).tolist()))
    return tmp_path


def piloted(monkeypatch, capsys, *words):
    return called(monkeypatch, capsys, "pilot", *words)


WORDS = ["tiny", "--text", "docs", "--lengths", "64,128", "--out", "out"]


def test_an_estimate_then_a_pilot_then_the_same_again(store, monkeypatch, capsys):
    code, out, err = piloted(monkeypatch, capsys, *WORDS, "--estimate", "--price", "3.5")
    assert code == 0, err
    assert "What a pilot will take" in out and "at a price of" in out and "open" not in out
    assert not (store / "out").exists(), "an estimate leaves nothing behind"
    (store / "q.jsonl").write_text('{"document": "docs are here", "question": "where?", "answer": "here"}\n')
    words = [*WORDS, "--budget", "1h", "--task", "qa:q.jsonl"]
    monkeypatch.setattr("rnn_longctx.eval.pilot.run.other_steps", lambda *some: [])
    code, out, err = piloted(monkeypatch, capsys, *words)
    assert code == 0, err
    assert out.rstrip().endswith("open out/report.html") and "none: qa-q up to 128, 1 prompt" in out
    found = json.loads((store / "out" / "pilot.json").read_text())
    assert found["recommendation"]["words"][0][:40] in " ".join(out.split())
    code, again, _ = piloted(monkeypatch, capsys, *words)
    assert code == 0 and "cells had been measured before" in again and "none: loss up to" not in again


def test_a_budget_that_is_refused_leaves_nothing_behind(store, monkeypatch, capsys):
    words = ["tiny", "--text", "docs", "--lengths", "64,128", "--out", "runs/out", "--budget", "1s"]
    code, _, err = piloted(monkeypatch, capsys, *words)
    assert code == 2 and "a budget of 1 s is too small for anything" in " ".join(err.split())
    assert not (store / "runs").exists()
    (store / "runs" / "out").mkdir(parents=True)
    assert piloted(monkeypatch, capsys, *words)[0] == 2 and (store / "runs" / "out").is_dir(), "a person made it"
    assert piloted(monkeypatch, capsys, *words[:-2], "--estimate")[0] == 0
    code, _, err = called(monkeypatch, capsys, "compare-runs", "runs/out", "runs/out")
    assert code == 2 and "the pilot in runs/out has not finished: it has no table yet" in " ".join(err.split())


def test_the_help_says_what_a_kill_costs(monkeypatch, capsys):
    code, out, _ = piloted(monkeypatch, capsys, "--help")
    assert code == 0 and "it begins the step that was killed again, and repeats nothing else" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny", "--text", "empty"], "text dir:empty is empty"),
        (["tiny", "--text", "docs", "--budget", "soon"], "--budget is a time such as 90s, 20m or 2h, not 'soon'"),
        (["tiny", "--text", "docs", "--price", "-1"], "--price is the price of an hour, at least 0, got -1"),
        (["tiny", "--text", "docs", "--task", "qa:bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["tiny", "--text", "docs", "--task", "qa:gone.jsonl"], "cannot read gone.jsonl: No such file"),
        (["tiny", "--text", "docs", "--task", "lm"], "lm asks for no answer"),
        (["tiny", "--text", "docs/0 [b]\n.txt", "--lengths", "64,64k"], "reads 64K tokens: give it at least 65537"),
    ],
)
def test_bad_input_is_one_line(store, monkeypatch, capsys, words, message):
    (store / "empty").mkdir()
    (store / "bad.jsonl").write_text('{"document": "a b", "question": "c", "answer": "d"}\n{"question: \n')
    code, _, err = piloted(monkeypatch, capsys, *words)
    line = err.strip().splitlines()[-1]
    assert code == 2 and re.search(message, line) and line.startswith("rnn-longctx: ")


def test_questions_are_named_by_their_file_alone(store):
    (store / "q.jsonl").write_text('{"document": "docs are here", "question": "where?", "answer": "here"}\n')
    tasks = parse_tasks(["qa:q.jsonl", "qa:file=q.jsonl", "passkey"])
    assert [task.label for task in tasks] == ["qa-q", "passkey"] and parse_tasks(None) == (Passkey(),)
    with pytest.raises(InputError, match="unknown task"):
        parse_tasks(["qq:q.jsonl"])


def test_the_words_that_name_the_model_are_kept():
    options = ModelOptions(train_length="2k", tokenizer="bytes", device="cpu")
    assert option_words(options) == ("--tokenizer", "bytes", "--train-length", "2k", "--device", "cpu")
    assert option_words(ModelOptions()) == ()


@pytest.mark.slow
def test_killed_by_the_system_and_run_again(store):
    """SIGKILL in the middle: what was measured stays as it is, and the time that it took counts."""
    command = [sys.executable, "-m", "rnn_longctx.cli", "pilot", *WORDS, "--budget", "1h"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "passkey" in line or sum("] " in line for line in lines) > 8:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cells = {path: path.read_bytes() for path in (store / "out" / "cells").glob("[!.]*.json")}
    spent = json.loads((store / "out" / "pilot_state.json").read_text())["spent"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert cells
    for path, data in cells.items():  # as it was, or measured again on more text, which begins with the same
        was, now = json.loads(data)["row"], json.loads(path.read_bytes())["row"]
        assert path.read_bytes() == data or (now["n"] > was["n"] and len(now["samples"]) > len(was["samples"])), path
    first, second = (
        {line.split("] ")[1].split(", about")[0] for line in some if "] " in line}
        for some in (lines, ended.stdout.splitlines())
    )
    assert len(first & second) <= 1
    assert json.loads((store / "out" / "pilot_state.json").read_text())["spent"] > spent
    reused = re.search(r"(\d+) cells had been measured before", ended.stdout)
    assert reused is not None and 0 < int(reused[1]) <= len(cells)
