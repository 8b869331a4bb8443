"""`--plugin` brings remedies, commands and benches of somebody else's file or module, anywhere on the line."""

from __future__ import annotations

import csv
import importlib
import sys

import pytest

from rnn_longctx import cli
from rnn_longctx.cli.command import COMMANDS
from rnn_longctx.eval.bench.base import BENCHES
from rnn_longctx.mitigations import REMEDIES

REMEDY = """
from dataclasses import dataclass

import rnn_longctx
from rnn_longctx.mitigations import Plan, Remedy
from rnn_longctx.mitigations.base import same_everywhere
from rnn_longctx.recurrence.policy import ScanPolicy


@rnn_longctx.register
@dataclass(frozen=True)
class Toy(Remedy):
    name = "toy-plugin"
    factor: float = 1.5

    def plan(self, model, target_length=None, text=None):
        return Plan(same_everywhere(model, ScanPolicy(mul=self.factor)))
"""
COMMAND = """
from typing import Annotated

import typer

from rnn_longctx.cli.command import command


@command("toy-command")
def toy(word: Annotated[str, typer.Argument()], times: Annotated[int, typer.Option()] = 2) -> None:
    \"\"\"Say a word several times.\"\"\"
    typer.echo(" ".join([word] * times))
"""
BENCH = """
from typing import Annotated

from rnn_longctx.eval.bench.base import bench


@bench("toy-bench")
def toy(*, rows: Annotated[int, "Rows of the table."] = 2):
    \"\"\"Measure nothing.\"\"\"
    for i in range(rows):
        yield {"what": "toy", "row": i}
"""
EVAL = (
    "eval demo --lengths 600 --task lm:slices=1,tokens=0 --mitigation toy-plugin:factor=2 --text text.py --out results"
)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A command line in this process, in a folder of its own: its exit code, output and errors."""
    for registry in (REMEDIES, COMMANDS, BENCHES):  # all that are there, and what comes until the test ends
        monkeypatch.setattr(registry, "_known", dict(registry))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    (tmp_path / "text.py").write_text("def add(a, b):\n    return a + b\n\n\n" * 100)

    def go(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    yield go
    for name in set(sys.modules) - before:
        if "toy" in name:
            del sys.modules[name]


@pytest.mark.parametrize("place", ["first", "middle", "last", "equals", "module"])
def test_a_remedy_of_a_plugin_is_evaluated(run, tmp_path, place):
    (tmp_path / "toy_remedy.py").write_text(REMEDY)
    words = EVAL.split()
    match place:
        case "first":
            words = ["--plugin", "toy_remedy.py", *words]
        case "middle":
            words[3:3] = ["--plugin", str(tmp_path / "toy_remedy.py")]
        case "last":
            words += ["--plugin", "toy_remedy.py"]
        case "equals":
            words += ["--plugin=toy_remedy.py"]
        case "module":
            words += ["--plugin", "toy_remedy"]
    code, _, err = run(*words)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "results" / "results.csv").open()))
    assert {row["mitigation"] for row in rows} == {"toy-plugin:factor=2"}


def test_an_edited_plugin_is_measured_again_in_the_same_folder(run, tmp_path, monkeypatch):
    """Rows name the text of the plugins that they were measured under; those without any name none."""
    values = {}
    for edit in ("", "# a remark\n", ""):
        text = REMEDY.replace("self.factor)", "2 * self.factor)") if edit else REMEDY
        (tmp_path / "toy_remedy.py").write_text(edit + text)
        sys.modules.pop("rnn_longctx_plugin_toy_remedy", None)
        importlib.invalidate_caches()
        code, _, err = run(*EVAL.split(), "--plugin", "toy_remedy.py")
        assert code == 0, err
        rows = list(csv.DictReader((tmp_path / "results" / "results.csv").open()))
        values[edit] = {row["plugins"]: row["value"] for row in rows if row["metric"] == "nats_per_token"}
    assert len(values[""]) == 2 and len({*values[""].values()}) == 2 and values[""] == values["# a remark\n"]
    assert all(len(name) == 8 for name in values[""])
    monkeypatch.setenv("RNN_LONGCTX_PLUGINS", "")  # as in a process that loads none
    code, _, err = run(*EVAL.replace("toy-plugin:factor=2", "rri").split())
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "results" / "results.csv").open()))
    assert {row["plugins"] for row in rows if row["mitigation"].startswith("rri")} == {""}


@pytest.mark.parametrize("words", ["eval", "capacity", "capacity measure", "bench", "generate"])
def test_every_help_names_the_option(run, words):
    code, out, _ = run(*words.split(), "--help")
    assert code == 0 and "--plugin MODULE_OR_FILE.py, anywhere on the line" in " ".join(out.split())


def test_without_the_plugin_there_is_no_such_remedy(run):
    code, _, err = run(*EVAL.split())
    assert code == 2 and "unknown mitigation 'toy-plugin'" in err and err.count("\n") == 1


def test_a_command_of_a_plugin(run, tmp_path):
    (tmp_path / "toy_command.py").write_text(COMMAND)
    assert run("toy-command", "hello")[0] == 2
    assert run("toy-command", "hello", "--times", "3", "--plugin", "toy_command.py") == (0, "hello hello hello\n", "")
    assert "toy-command" in run("--plugin", "toy_command.py", "--help")[1]


def test_a_bench_of_a_plugin(run, tmp_path):
    (tmp_path / "toy_bench.py").write_text(BENCH)
    assert "toy-bench" not in run("bench", "--help")[1]
    code, out, _ = run("bench", "--help", "--plugin", "toy_bench.py")
    assert code == 0 and "toy-bench" in out and "Measure nothing." in out and "scan" in out
    code, out, err = run("bench", "toy-bench", "--rows", "3", "--out", "new/toy.csv")
    assert code == 0 and out.splitlines() == [f"what toy  row {i}" for i in range(3)], err
    rows = list(csv.DictReader((tmp_path / "new" / "toy.csv").open()))
    assert [row["row"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["command"] == "rnn-longctx bench toy-bench --rows 3" and "torch" in rows[0]["versions"]
    code, _, err = run("bench", "toy-bench", "--rows", "0")
    assert code == 2 and "--rows" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no_such_toy", None, "--plugin no_such_toy: no module named 'no_such_toy'"),
        ("no_such_toy.py", None, "--plugin no_such_toy.py: no such file"),
        ("toy_bad.py", "import no_such_package", "--plugin toy_bad.py fails as it is imported: ModuleNotFoundError"),
        ("toy_bad", "1 / 0", "--plugin toy_bad fails as it is imported: ZeroDivisionError: division by zero"),
        ("toy_bad.py", "def f(:", "--plugin toy_bad.py fails as it is imported: SyntaxError"),
        ("toy_bad.py", REMEDY.replace("toy-plugin", "rri"), "--plugin toy_bad.py: two mitigations are called 'rri'"),
        ("", None, "--plugin needs a module, or a file"),
    ],
)
def test_a_plugin_that_cannot_be_had_is_one_line(run, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / f"{name.removesuffix('.py')}.py").write_text(text)
    code, _, err = run("plot", "results", "--plugin", name)
    assert code == 2 and err.startswith(f"rnn-longctx: {message}") and err.count("\n") == 1
