"""`eval` and its kin on the command line: what they print, and what their help shows."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import yaml

from rnn_longctx.config import parse_lengths
from rnn_longctx.eval import EvalConfig

EVAL = ("--lengths", "128,200", "--task", "lm:slices=2,tokens=0", "--text", "text.py")


def test_eval_and_plot(run, tmp_path):
    out = tmp_path / "r"
    remedies = ("none", "rri:alpha=0.99,beta=1", "recompute:last=64")
    words = ("eval", "ok", *EVAL, "--task", "passkey:n=4", *(w for r in remedies for w in ("--mitigation", r)))
    code, printed, said = run(*words, "--out", str(out))
    assert code == 0, said
    # once in each table at the least; the verdict may say it, too
    assert printed.count("without a remedy") >= 2 and "ok, 15.5K parameters" in printed
    assert "trained at  128 tokens" in printed and "n = 4 prompts" in printed
    frame = pd.read_parquet(out / "results.parquet")
    assert set(frame.mitigation) == {"none", "rri:alpha=0.99,beta=1", "recompute:last=64"}
    assert set(frame.length) == {128, 200} and set(frame.task) == {"lm", "passkey"}
    assert len(pd.read_csv(out / "results.csv")) == len(frame)
    drawn = sorted(p.name for p in out.glob("*.png"))
    assert "loss_over_length.png" in drawn and all(name in printed for name in drawn)
    for path in out.glob("*.png"):
        path.unlink()
    code, printed, _ = run("plot", str(out))
    assert code == 0 and sorted(Path(line).name for line in printed.split()) == drawn


def test_a_second_command_into_a_folder_prints_what_it_asked_for(run, store, tmp_path):
    out, words = str(tmp_path / "k"), ("--text", "text.py", "--task")
    lm = (*words, "lm:slices=2,tokens=0", "--out", out)
    first = ("eval", "ok", "--lengths", "128,200", *lm, "--mitigation", "rri", "--mitigation", "recompute:last=64")
    code, printed, said = run(*first)
    assert code == 0 and "before" not in printed and "not shown" not in printed, said
    one = (*words, "lm:slices=1,tokens=0", "--out", out)
    code, printed, said = run("eval", "ok", "--lengths", "64,128", *one, "--mitigation", "none")
    assert code == 0, said
    assert "none" in printed and "recompute:last=64" in printed and "rri" not in printed
    assert "with 2 other settings measured here before; 5 rows of other models" in " ".join(printed.split())
    code, printed, said = run("eval", "ok", "--lengths", "128", *words, "passkey:n=2,least=2", "--out", out)
    assert code == 0 and "passkey accuracy" in printed and "loss in nats" not in printed, said
    frame = pd.read_parquet(tmp_path / "k" / "results.parquet")
    assert set(frame.task) == {"lm", "passkey"} and set(frame[frame.mitigation == "recompute:last=64"].n) == {2}


def test_options_win_over_the_config(run, store, tmp_path):
    (tmp_path / "c.yaml").write_text(f"model: nowhere\nlengths: [64, 1k]\ntasks: [lm]\ntext: {store / 'text.py'}\n")
    out = str(tmp_path / "r")
    code, *_ = run("eval", "ok", "--config", str(tmp_path / "c.yaml"), "--lengths", "64", "--out", out)
    assert code == 0
    assert set(pd.read_csv(tmp_path / "r" / "results.csv").length) == {64}


def test_the_precision_of_states_is_named(run, tmp_path):
    out = str(tmp_path / "r")
    for more in ((), ("--state-dtype", "bfloat16"), ("--state-dtype", "float32")):
        code, printed, said = run("eval", "ok", *EVAL, "--out", out, *more)
        assert code == 0, said
    frame = pd.read_csv(tmp_path / "r" / "results.csv")
    assert set(frame.state_dtype.fillna("-")) == {"-", "bfloat16"}
    code, printed, _ = run("eval", "ok", *EVAL, "--out", str(tmp_path / "s"), "--state-dtype", "bfloat16")
    assert "float32 with states in bfloat16" in printed
    assert run("generate", "ok", "--prompt", "import os", "--max-new-tokens", "4", "--state-dtype", "bfloat16")[0] == 0
    words = ("--text", "text.py", "--slices", "1", "--state-dtype", "bfloat16", "--out")
    header = printed[: printed.index("runs on")]
    code, printed, said = run("probe", "ok", "--length", "512", *words, str(tmp_path / "p"))
    assert code == 0, said
    assert printed.startswith(header) and "float32 with states in bfloat16" in printed, "the header of eval"
    assert json.loads((tmp_path / "p" / "probe.json").read_text())["state_dtype"] == "bfloat16"
    found = str(tmp_path / "found.yaml")
    code, _, said = run("calibrate", "ok", "--mitigation", "a-winsor:share=0.1", "--target", "300", *words, found)
    assert code == 0, said
    assert yaml.safe_load(Path(found).read_text())["scores"]["state_dtype"] == "bfloat16"


def shown(run, monkeypatch, command: str) -> str:
    monkeypatch.setattr("rich.console.Console.width", 400)
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)  # read as it is imported, which another test may have done
    code, printed, _ = run(command, "--help")
    assert code == 0
    return printed


def test_a_key_is_traced(run, tmp_path):
    code, printed, said = run("trace-key", "ok", "--gaps", "100,200", "--n", "2", "--out", str(tmp_path / "t"))
    assert code == 0, said
    assert "share of the keys found" in printed and "keys are not even found" in printed  # (nothing was learned)
    answers = pd.read_csv(tmp_path / "t" / "answers.csv")
    assert len(answers["gap"].unique()) == 3 and {"read", "restored", "undecayed"} <= set(answers["state"])
    assert len(pd.read_csv(tmp_path / "t" / "signals.csv")) == 3 * 4
    code, _, said = run("trace-key", "ok", "--reading", "helt")
    assert code == 2 and "unknown reading 'helt'" in said and "held" in said


def test_help_shows_the_defaults(run, monkeypatch):
    printed = shown(run, monkeypatch, "eval")
    config, also = EvalConfig(), {"tasks": "task", "mitigations": "mitigation"}
    for name, value in vars(config).items():
        option = f"--{also.get(name, name).replace('_', '-')} "
        (line,) = [line for line in printed.splitlines() if f"│ {option}" in line] or [""]
        if name == "model":
            continue
        assert "[default: " in line, option
        default = line.partition("[default: ")[2].partition("]")[0].strip("()")
        if name == "lengths":
            assert parse_lengths(default) == value
        elif value is not None:
            assert default == (" and ".join(value) if isinstance(value, list) else str(value)), option
    for command, options in {
        "probe": ("train-length", "tokenizer", "state-dtype", "log", "device"),
        "calibrate": ("train-length", "tokenizer", "state-dtype", "text"),
        "generate": ("train-length", "tokenizer", "state-dtype", "monitor", "mitigation"),
        "lm-eval": ("train-length", "tokenizer", "state-dtype", "mitigation", "limit", "max-length"),
    }.items():
        lines = shown(run, monkeypatch, command).splitlines()
        for option in options:
            assert any(f"--{option} " in line and "[default: " in line for line in lines), (command, option)
