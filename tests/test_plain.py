"""Names from elsewhere steer no terminal and are no formulas in CSV files, wherever they come out."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rnn_longctx import cli
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.eval.results import Results
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.plain import csv_text, guarded, plain, plain_table, unguarded

# Harmless here: they would colour, clear, rename the window, ring, turn a line around, break it, open a link, add.
STEERING = [
    "\x1b[31mred",
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x07",
    "a\u202eb",
    "a\nb",
    "a\rb",
    "\x9b31m",
    "\u2028",
    "\x7f",
]
FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", '=HYPERLINK("x","y")', "-", "=", "--x", "'=x", "''+1+1"]


@pytest.mark.parametrize("text", STEERING)
def test_what_steers_a_terminal_is_spelled_out(text):
    shown = plain(text)
    assert shown.isprintable() and shown != text and "\\" in shown
    assert plain(shown) == shown, "once is enough"


def test_what_does_not_stays():
    for text in ("demo", "état", "日本語", "a-b_c.d", "ß", "🙂", "क्‍ष", "x\\y", "[red]x[/red]"):
        assert plain(text) == text
    assert plain("a\n\tb", lines=True) == "a\n\tb" and plain("a\r\nb", lines=True) == "a\\r\nb"
    assert plain("\udcff") == "\\udcff"


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_text_in_csv_and_come_back(text):
    cell = guarded(text)
    assert unguarded(cell) == text
    assert not (cell.startswith(("=", "+", "-", "@")) and len(cell) > 1)


@pytest.mark.parametrize("value", ["-0.5", "+3", "-1e-05", "-inf", -0.5, None, 3, "plain", "'quoted", "a=b", ""])
def test_what_is_no_formula_stays(value):
    assert guarded(value) is value or guarded(value) == value
    if isinstance(value, str):
        assert unguarded(value) == value


def test_a_table_as_csv():
    samples = [[0.5, 1.0], None]
    frame = pd.DataFrame({"=name": ["=1+1", "\x1b[31m"], "value": [-0.5, math.nan], "n": [1, 2], "samples": samples})
    rows = list(csv.reader(io.StringIO(csv_text(frame))))
    assert rows == [
        ["'=name", "value", "n", "samples"],
        ["'=1+1", "-0.5", "1", "[0.5, 1.0]"],
        ["\\x1b[31m", "", "2", ""],
    ]
    assert frame["=name"].tolist() == ["=1+1", "\x1b[31m"], "the table itself stays"
    shown = plain_table(frame)
    assert shown["=name"].tolist() == ["=1+1", "\\x1b[31m"] and shown["samples"].tolist() == samples
    days = pd.DataFrame({"t": pd.to_datetime(["2024-01-02"], utc=True), "ok": [True]})
    assert csv_text(days) == days.to_csv(index=False)
    doubled = pd.DataFrame([["=a", "=b"]], columns=["x", "x"])
    assert csv_text(doubled) == "x,x\n'=a,'=b\n"


def test_a_row_of_results_is_harmless_and_found_again(tmp_path):
    name = random.choice(["=1+1", "-x", "@x"]) + random.choice(STEERING)
    store = Results(tmp_path)
    row = {"model": name, "text": name, "task": "lm", "length": 8, "metric": "nats_per_token", "value": 1.0, "n": 1}
    store.put(row)
    assert store.get(row)["model"] == plain(name)
    store.gather()
    text = (tmp_path / "results.csv").read_text()
    assert text.count("\n") == 2 and text.replace("\n", "").isprintable()
    assert f"'{name[:2]}" in text
    gathered = Results.read(tmp_path)
    (tmp_path / "results.parquet").unlink()
    assert Results.read(tmp_path)["model"].tolist() == gathered["model"].tolist() == [plain(name)]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", *map(str, words)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return call


def harmless(*texts: str) -> bool:
    return all(all(c.isprintable() or c == "\n" for c in text) for text in texts)


@pytest.fixture
def hostile(tmp_path):
    """A folder with a model and a text whose names would steer a terminal; its results go into one of that kind."""
    torch.set_num_threads(1)
    folder = tmp_path / "=1+1\x1b[31m\nloss 0.000"
    folder.mkdir()
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=1, headdim=16, d_state=8)).eval()
    model.train_length, model.tokenizer, model.name = 64, ByteTokenizer(), "tiny"
    checkpoint.save(model, folder, dtype=torch.float32)
    text = tmp_path / "+text\x1b]0;owned\x07\n[bold]x.txt"
    text.write_bytes(bytes(np.random.default_rng().integers(97, 123, 2000, dtype=np.uint8)))
    return folder.name, text.name


def test_an_evaluation_of_hostile_names(run, hostile, tmp_path):
    model, text = hostile
    out = tmp_path / "out\x1b[2J[red]"
    words = (
        "eval",
        f"./{model}",
        "--lengths",
        "64,100",
        "--task",
        "lm:slices=2,tokens=0",
        "--text",
        text,
        "--out",
        out,
    )
    code, printed, said = run(*words, "--mitigation", "none", "--mitigation", "rri")
    assert code == 0, said
    assert not [line for line in (printed + said).splitlines() if line.strip().startswith("loss 0.000")]
    assert harmless(printed, said) and "\\x1b[31m" in printed and "[bold]" in printed and "[red]" in printed
    for file in out.glob("*.csv"):
        rows = list(csv.reader(file.open(newline="")))
        cells = [cell for row in rows for cell in row]
        assert harmless(*cells) and len({len(row) for row in rows}) == 1, file
        assert not [c for c in cells if c.startswith(("=", "+", "@"))], file
    frame = Results.read(out)
    assert len(frame) > 4 and set(frame["model"]) == {plain(model)}
    again = run(*words, "--mitigation", "none", "--mitigation", "rri")
    assert again[0] == 0 and "4 of 4 cells were there" in again[2], "a hostile name is the same name the next time"
    for command in (("plot", out), ("compare-runs", out, out)):
        code, printed, said = run(*command)
        assert code == 0 and harmless(printed, said), said
    document = json.loads(run("compare-runs", out, out, "--json")[1])
    assert document["a"] == str(out), "a document has what is, escaped by JSON"


def test_mistakes_that_name_hostile_things(run, hostile, tmp_path):
    model, text = hostile
    for words in (
        ("eval", "\x1b[31mnowhere\nrnn-longctx: all is well"),
        ("eval", f"./{model}", "--text", f"no{text}", "--out", "r"),
        ("eval", f"./{model}", "--mitigation", "\x1b[31mstate-norm"),
        ("plot", "\x1b[2Jnowhere"),
        ("--plugin", "\x1b[2J.py", "doctor"),
    ):
        code, printed, said = run(*words)
        assert code == 2 and harmless(printed, said) and said.count("\n") == 1, words


def test_warnings_and_logs(run, monkeypatch, capsys, hostile, tmp_path):
    run("plot", "nowhere")  # which sets them up, as every command does
    print(warnings.formatwarning("of \x1b[31mx\ny", RuntimeWarning, "f", 1))
    assert capsys.readouterr().out == "rnn-longctx: warning: of \\x1b[31mx y\n\n"
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "%s is torn", ("\x1b[31mx",), None)
    assert logging.lastResort.format(record) == "\\x1b[31mx is torn"


def test_what_a_model_writes_is_spelled_out_on_a_terminal_alone(run, hostile, tmp_path, monkeypatch):
    model, _ = hostile
    written = ["a\x1b[31m", "b\n"]
    monkeypatch.setattr("rnn_longctx.generate_stream", lambda *given, **more: iter(written), raising=False)
    words = ("generate", f"./{model}", "--prompt", "x")
    assert run(*words)[1] == "a\x1b[31mb\n\n", "a pipe has it as it is"
    monkeypatch.setattr("rnn_longctx.cli.output.on_terminal", lambda: True)
    assert run(*words)[1] == "a\\x1b[31mb\n\n"


def test_no_table_is_written_as_csv_in_another_way():
    """The one decision holds where `to_csv` and csv's writers are used nowhere else, or beside `guarded`."""
    root = Path(__file__).parents[1]
    files = [f for name in ("rnn_longctx", "eval", "probes", "mitigations") for f in (root / name).rglob("*.py")]
    for file in files:
        text = file.read_text()
        if file.name != "plain.py" and file.parent.name != "bench":
            assert ".to_csv(" not in text, f"{file} writes a table: use rnn_longctx.plain.csv_text"
        if "csv.writer(" in text or "csv.DictWriter(" in text:
            assert "guarded" in text, f"{file} writes rows: use rnn_longctx.plain.guarded"
