"""Every command of README and docs is read by the real command line as it stands (test_runs.py runs them, small)."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import tomllib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pages
import pytest
from pages import ROOT, Command, words
from typer.core import TyperCommand

from rnn_longctx.cli.program import app
from rnn_longctx.config import load_yaml, parse_length, parse_lengths
from rnn_longctx.eval import EvalConfig, parse_task
from rnn_longctx.eval.capacity import CapacityConfig
from rnn_longctx.eval.compare import load_comparison
from rnn_longctx.mitigations import parse_remedy
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.spec import arguments
from rnn_longctx.train import TrainConfig, spelled_out

# With a word in capitals in the place of a name, or "...", a command stands for many.
PLACEHOLDER = re.compile(r"(?<![\w/])[A-Z][A-Z_]+(?![\w/=])|\.\.\.")
ALL = pages.all_commands()
OURS = [c for c in ALL if c.text.startswith("rnn-longctx ") or "-m rnn_longctx." in c.text]
LENGTHS = ("length", "target", "context", "limit", "train_length")


@pytest.fixture
def parsed(monkeypatch):
    """A function that gives the command line some words, and returns the values that the command would be called
    with."""
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(TyperCommand, "invoke", lambda self, ctx: calls.append((ctx.command_path, dict(ctx.params))))
    # To make entries equally large takes seconds: tests/eval/compare/test_study.py does it for every config.
    monkeypatch.setattr("rnn_longctx.eval.compare.config.equalised", lambda models, *how: models)

    def parse(line: list[str]) -> tuple[str, dict[str, Any]]:
        app(line, standalone_mode=False, prog_name="rnn-longctx")
        (call,) = calls
        return call

    return parse


@pytest.mark.parametrize("command", OURS, ids=str)
def test_the_command_line_takes_it(command, parsed):
    line = words(command)
    if (
        not line
        or "..." in line
        or "--help" in line
        or line[0].startswith("-")
        or re.search(r"\||NAME", " ".join(line[1:2]))
    ):
        return check_names(line)
    try:
        path, values = parsed(line)
    except Exception as error:
        if command.named and type(error).__name__ in ("MissingParameter", "BadOptionUsage", "NoArgsIsHelpError"):
            return check_names(line)
        raise
    check(path.removeprefix("rnn-longctx "), values, own=command.page.startswith("docs/develop/add-a-"))


def check_names(line: list[str]) -> None:
    """Hold a part of a command to the names of commands and options."""
    if line and not line[0].startswith("-"):
        names = {word.partition("=")[0] for word in line if word.startswith("--")} - {"--help"}
        assert names <= options_of(line), f"it has {sorted(options_of(line))}"


def options_of(line: list[str]) -> set[str]:
    """Return the options of the command that a line begins with."""
    from command_line import commands

    known = commands()
    name = line[0] if f"{line[0]} {line[1:2] and line[1]}" not in known else " ".join(line[:2])
    assert name in known, f"there is no command {name!r}"
    return {option for p in known[name].params for option in (*p.opts, *p.secondary_opts)}


def check(path: str, values: dict[str, Any], own: bool) -> None:
    """Hold a command's values to what it would do with them first: names, lengths and configs. `own`: remedies and
    tasks may be those that a page has one write."""
    for name in LENGTHS:
        if isinstance(values.get(name), str):
            parse_length(values[name], name)
    if values.get("lengths"):
        parse_lengths(values["lengths"])
    for text in several(values.get("mitigation")):
        if not own and text != "all" and not text.endswith(".yaml"):
            parse_remedy(text)
    if path == "eval" and not own:
        for text in several(values.get("task")):
            if "file=" not in text:  # which must be there
                parse_task(text)
    if path in ("tune", "bench parallel") and values.get("mixer"):
        name = values["mixer"].partition(":")[0]
        assert name in MIXERS
        arguments(values["mixer"], fields(MIXERS[name].Config), "mixer")
    config = values.get("config") or (values.get("problem") if path == "tune" else None)
    if config and str(config).endswith(".yaml") and not PLACEHOLDER.search(str(config)):
        load(path, ROOT / config, values, own)


comparison = cache(load_comparison)


def several(value: Any) -> list[str]:
    listed = [value] if isinstance(value, str) else value or []
    return [text for text in listed if not PLACEHOLDER.search(text)]


def load(path: str, config: Path, values: dict[str, Any], own: bool) -> None:
    assert config.exists(), f"no such config: {config.relative_to(ROOT)}"
    if path == "train":
        if not own:
            load_yaml(TrainConfig, config, spelled_out([*(values["set"] or []), *(values["more"] or [])]))
    elif path == "eval":
        load_yaml(EvalConfig, config)
    elif path == "capacity train":
        load_yaml(CapacityConfig, config, values["set"] or [])
    elif path in ("compare", "tune"):
        study = comparison(config)
        entries = {entry.name for entry in study.entries}
        assert set(values.get("only") or []) <= entries
    else:
        raise AssertionError(f"{path} takes a config, and this test does not know of which kind")


@pytest.mark.parametrize("command", [c for c in ALL if c not in OURS], ids=str)
def test_the_files_of_other_commands_are_there(command):
    """make's targets, scripts, tests and extras: what a page has one run beside the command line."""
    line = shlex.split(command.text)
    if line[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(line[1:]) <= set(targets)
    elif line[0] in ("python", "pytest"):
        for word in line[1:]:
            if word.startswith(("benchmarks/", "tests/")):
                assert (ROOT / word.partition("::")[0]).exists(), word
    elif line[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in re.findall(r"\[(\w+)\]", command.text):
            assert name in extras
    else:
        assert line[0] in ("git", "source", "mkdir"), f"no test knows what {line[0]} is"


# As they stand in the pages, and not made small as in test_runs.py; the others take minutes, a GPU, or one's own file.
SLOW = [
    "rnn-longctx probe demo --length 32k --slices 4 --prove --remember",
    "rnn-longctx compare configs/compare/smoke.yaml --jobs 2",
    "rnn-longctx compare configs/compare/growth_smoke.yaml",
    "rnn-longctx train configs/train/tasks/induction.yaml --set out=runs/train/mine",
]


def test_what_is_run_stands_in_the_pages():
    assert {*SLOW, *CONVERSATION} <= {command.text for command in ALL}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a command, here and not in a process of its own, in a folder that has the repository's
    configs and results."""
    for name in ("configs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.xz", "*.png"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)

    def command(text: str, stdin: str = "") -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        app(words(Command("", text.replace("MODEL", "demo"))), standalone_mode=False)

    return command


@pytest.mark.slow
@pytest.mark.parametrize("text", SLOW)
def test_it_runs_in_minutes(text, run):
    run(text)


CONVERSATION = [
    "rnn-longctx generate MODEL --prompt - --save-state doc.state < doc.txt",
    'rnn-longctx generate MODEL --load-state doc.state --prompt "..."',
]


def test_a_document_is_read_once_and_asked(run, capsys):
    read, ask = CONVERSATION
    run(read, "import os\n" * 20)
    capsys.readouterr()
    run(ask.replace("...", "def f(") + " --max-new-tokens 8")
    assert capsys.readouterr().out.strip()
