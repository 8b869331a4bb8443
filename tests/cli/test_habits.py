"""What holds for every command: --json, --quiet, examples in the help, exit codes, progress in a log, completion."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from rnn_longctx import cli
from rnn_longctx.cli.command import COMMANDS
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.eval.bench.base import BENCHES
from rnn_longctx.eval.progress import EVERY, Progress
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text()
EVAL = ("eval", "ok", "--lengths", "128,200", "--task", "lm:slices=2,tokens=0", "--text", "text.py", "--out")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small model and a text."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("store")
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=1, headdim=16, d_state=8)).eval()
    model.train_length, model.tokenizer, model.name = 128, ByteTokenizer(), "tiny"
    with torch.no_grad():
        model.lm_head.weight[model.tokenizer.eos_id] = 0  # else one drawn in some hundreds says nothing
    checkpoint.save(model, root / "ok", dtype=torch.float32)
    (root / "text.py").write_bytes(bytes(torch.randint(32, 120, (4000,)).tolist()))
    return root


@pytest.fixture
def run(store, monkeypatch, capsys):
    """run(words...) -> exit code, stdout, stderr, in the store's folder."""
    monkeypatch.chdir(store)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return call


def program():
    group = typer.main.get_command(cli.app)
    group.parse_args(group.context_class(group, resilient_parsing=True), [])  # which fills it from the registry
    return group


def leaves(group, names=()):
    """Every command that runs something, with its words."""
    context = group.context_class(group)
    for name in group.list_commands(context):
        inner = group.get_command(context, name)
        if hasattr(inner, "list_commands"):
            yield from leaves(inner, (*names, name))
        else:
            yield (*names, name), inner


LEAVES = dict(leaves(program()))


def test_there_are_commands():
    """Every file, and what is below it: the tests over LEAVES see them all."""
    assert {words[0] for words in LEAVES} == set(COMMANDS)
    assert {words[1] for words in LEAVES if words[0] == "bench"} == set(BENCHES)
    assert {("capacity", "advise"), ("sensors", "adapt")} <= set(LEAVES)


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_has_the_options_and_examples_that_parse(words):
    command = LEAVES[words]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {"--json", "--quiet", "--help"} <= options | {"--help"}
    before, _, part = command.help.partition("\nExamples:\n")
    lines = [line.strip() for line in part.strip().splitlines()]
    assert lines and before.strip(), f"{' '.join(words)} shows no examples"
    for line in lines:
        assert len(line) <= 100, f"too long to be typed: {line}"
        said = shlex.split(line.partition(" < ")[0])
        if said[0] == "torchrun":
            said = ["rnn-longctx", *said[said.index("rnn_longctx.cli") + 1 :]]
        if said[:2] == ["rnn-longctx", "capacity"] and said[2] not in LEAVES_OF_CAPACITY:
            said.insert(2, "measure")
        assert tuple(said[1 : 1 + len(words)]) == words and said[0] == "rnn-longctx", line
        context = command.make_context("rnn-longctx", said[1 + len(words) :])
        for value in context.params.values():
            if isinstance(value, str | Path) and str(value).startswith("configs/"):
                assert (ROOT / value).is_file(), f"{line}: there is no {value}"


LEAVES_OF_CAPACITY = {words[1] for words in LEAVES if words[0] == "capacity"}


def test_an_example_that_is_wrong_would_be_seen():
    with pytest.raises(Exception, match="--lenghts"):
        LEAVES[("eval",)].make_context("rnn-longctx", ["demo", "--lenghts", "1k"])


def test_examples_keep_their_lines(run, monkeypatch):
    monkeypatch.setattr("rich.console.Console.width", 120)
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 120)
    code, printed, _ = run("plot", "--help")
    assert code == 0 and re.search(r"Examples:\s*\n\s+rnn-longctx plot runs/mine\s*\n", printed)


def document(code, printed, said):
    assert code == 0, said
    return json.loads(printed)


def test_eval_and_plot_as_documents(run, tmp_path):
    out = tmp_path / "r"
    code, printed, said = run(*EVAL, out, "--json")
    found = document(code, printed, said)
    assert found["command"][:2] == ["rnn-longctx", "eval"] and "conclusion" in found
    rows = found["tables"]["results"]
    assert {row["length"] for row in rows} == {128, 200} and all(isinstance(row["samples"], list) for row in rows)
    assert str(out / "results.csv") in found["files"] and all(Path(file).is_file() for file in found["files"])
    assert "parameters" in said and "%" in said, "messages and progress are there"
    code, printed, said = run("plot", out, "--json", "--quiet")
    plots = document(code, printed, said)["tables"]["plots"]
    assert not said and {Path(row["file"]).name for row in plots} >= {"loss_over_length.png"}


def test_other_commands_as_documents(run, tmp_path, monkeypatch):
    words = ("probe", "ok", "--length", "512", "--text", "text.py", "--out", tmp_path / "p", "--json")
    found = document(*run(*words))
    assert found["verdicts"]["ok"] and len(found["tables"]["heads of ok"]) == 4 and len(found["files"]) >= 4
    words = ("calibrate", "ok", "--mitigation", "a-winsor:share=0.1", "--target", "300", "--text", "text.py")
    found = document(*run(*words, "--slices", "1", "--out", tmp_path / "found.yaml", "--json"))
    assert found["remedy"].startswith("a-winsor") and found["helps"] in (True, False)
    words = ("generate", "ok", "--prompt", "import os", "--prompt", "a", "--max-new-tokens", "4")
    alone = [run(*words[:4], "--max-new-tokens", "4")[1], run("generate", "ok", *words[4:])[1]]
    found = document(*run(*words, "--json"))
    assert [f"{answer}\n" for answer in found["answers"]] == alone
    found = document(*run("capacity", "advise", "--context", "256k", "--json"))
    assert "256" in found["advice"]
    words = ("sensors", "make", tmp_path / "plant", "--rows", "2000", "--json")
    assert len(document(*run(*words))["files"]) == 3


def test_a_bench_as_a_document(run, monkeypatch):
    monkeypatch.setattr(BENCHES, "_known", dict(BENCHES))
    from rnn_longctx.eval.bench.base import bench

    @bench("infinite")
    def infinite():
        """Measure nothing."""
        yield {"what": "a", "seconds": float("inf")}
        yield {"what": "b", "seconds": float("nan")}

    code, printed, said = run("bench", "infinite", "--json")
    rows = document(code, printed, said)["tables"]["rows"]
    assert rows == [{"what": "a", "seconds": "inf"}, {"what": "b", "seconds": None}]
    assert said.splitlines() == ["what a  seconds inf", "what b  seconds nan"]
    monkeypatch.setenv("RANK", "1")
    assert run("bench", "infinite", "--json")[1] == "", "one process of several gives the document"
    assert run("bench", "infinite", "--quiet")[1:] == ("what a  seconds inf\nwhat b  seconds nan\n", "")


def test_quiet_leaves_results_and_errors(run, tmp_path):
    loud = run(*EVAL, tmp_path / "a")
    quiet = run(*EVAL, tmp_path / "b", "--quiet")
    assert loud[0] == quiet[0] == 0 and not quiet[2]
    assert quiet[1] in loud[1] and "parameters" not in quiet[1] and "results.csv" not in quiet[1]
    assert "loss in nats per token" in quiet[1]
    code, printed, said = run("eval", "nowhere", "--quiet")
    assert code == 2 and not printed and said.startswith("rnn-longctx: ") and said.count("\n") == 1
    words = ("probe", "ok", "--length", "512", "--text", "text.py", "--out", tmp_path / "p", "--quiet")
    code, printed, said = run(*words)
    assert code == 0 and not said and printed.count("\n") == 1, "the verdict alone"


def test_a_mistake_has_no_document(run):
    code, printed, said = run("eval", "nowhere", "--json")
    assert code == 2 and not printed and said.count("\n") == 1


def test_exit_codes_are_those_of_the_page(run, monkeypatch, store, tmp_path):
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == {0, 1, 2, 130}
    assert run("generate", "ok", "--prompt", "a", "--max-new-tokens", "1")[0] == 0
    assert run("generate", "ok", "--no-such-option")[0] == 2 and run("no-such-command")[0] == 2
    assert run("generate", "nowhere", "--prompt", "a")[0] == 2

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Mamba2LM, "read", interrupted)
    assert run("generate", "ok", "--prompt", "a")[0] == 130


def test_a_reader_that_went_away(store):
    code = "from rnn_longctx.cli import main; main()"
    words = [sys.executable, "-c", code, "generate", "ok", "--prompt", "a", "--max-new-tokens", "4"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, cwd=store, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and not done.stderr


def test_what_was_there_is_said(run, tmp_path):
    out = tmp_path / "r"
    assert "there, and not measured again" not in run(*EVAL, out)[2]
    words = [word if word != "128,200" else "128,200,300" for word in EVAL]
    _, _, said = run(*words, out, "--mitigation", "none", "--mitigation", "rri")
    assert f"{out}: 2 of 6 cells were there, and not measured again\n" in said
    assert "was there" not in run(*words, out, "--mitigation", "none", "--quiet")[2]


def test_progress_in_a_log(monkeypatch, capsys):
    """A line a task, one a minute, and nothing that is written over; forced colours make no terminal of it."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress(True) as bar:
        bar.total(100)
        bar.say("none, lm")
        for _ in range(5):
            now[0] += EVERY / 2 + 1
            bar.advance(10)
        bar.note("a note")
    printed, said = capsys.readouterr()
    assert not printed and "\r" not in said and "\x1b" not in said
    assert said.splitlines() == ["  0% none, lm", " 20% none, lm", " 40% none, lm", "a note"]
    with Progress(False) as bar:
        bar.total(10)
        bar.say("x")
        bar.note("y")
        bar.advance(10)
    assert capsys.readouterr() == ("", "")


def test_progress_of_a_command_in_a_log(run, tmp_path):
    _, printed, said = run(*EVAL, tmp_path / "r")
    assert "\r" not in said + printed and "\x1b" not in said + printed and "  0% none, lm" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [("rnn-longctx ev", "eval"), ("rnn-longctx eval --mit", "--mitigation"), ("rnn-longctx sensors ad", "adapt")],
)
def test_completion(words, expected):
    code = "from rnn_longctx.cli import main; import sys; sys.argv = ['rnn-longctx']; main()"
    asked = {"_RNN_LONGCTX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == [expected], done.stderr
    assert "rnn-longctx --install-completion" in PAGE


def test_completion_is_installed(tmp_path):
    code = "from rnn_longctx.cli import main; import sys; sys.argv[0] = 'rnn-longctx'; main()"
    words = [sys.executable, "-c", code, "--install-completion", "bash"]
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(words, env=os.environ | home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_RNN_LONGCTX_COMPLETE" in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def environment_variables(file: Path) -> set[str]:
    """The names of variables that a file reads or sets."""
    tree = ast.parse(file.read_text())
    named = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call | ast.Subscript | ast.Compare):
            continue
        about = {ast.Call: "func", ast.Subscript: "value", ast.Compare: "comparators"}[type(node)]
        inner = getattr(node, about)
        text = " ".join(map(ast.unparse, inner)) if isinstance(inner, list) else ast.unparse(inner)
        if not re.search(r"\benviron\b|getenv", text):
            continue
        parts = {ast.Call: "args", ast.Subscript: "slice", ast.Compare: "left"}[type(node)]
        inner = getattr(node, parts)
        for part in inner[:1] if isinstance(inner, list) else [inner]:
            for leaf in ast.walk(part):
                value = leaf.value if isinstance(leaf, ast.Constant) else named.get(getattr(leaf, "id", ""))
                names |= {value} if isinstance(value, str) and re.fullmatch("[A-Z_0-9]{3,}", value) else set()
    return names


def test_every_environment_variable_is_on_the_page():
    files = [f for name in ("rnn_longctx", "eval", "probes", "mitigations") for f in (ROOT / name).rglob("*.py")]
    table = PAGE.partition("## Environment variables")[2].partition("\nLibraries beneath")[0]
    listed = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", table.replace("PASSIVE", "")))
    read = {name for file in files for name in environment_variables(file)}
    assert read >= {"RNN_LONGCTX_PLUGINS", "XDG_CACHE_HOME", "TRITON_INTERPRET", "LOCAL_RANK", "MASTER_ADDR"}
    assert read <= listed, f"not on the page: {', '.join(sorted(read - listed))}"
    assert listed <= read | {"RNN_LONGCTX_SEED"}, f"nobody reads {', '.join(sorted(listed - read))}"
