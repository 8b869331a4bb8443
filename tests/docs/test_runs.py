"""Every command of README and docs is run, a page's in their order in one folder, made small (tests/helpers/
small_commands.py says how), or stands in NOT_RUN with the reason. All are parsed as they stand (test_commands.py)."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pages
import pytest
import small_commands
from called import called
from pages import Command, words

from rnn_longctx.mitigations import REMEDIES
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.recurrence.interface import RECURRENCES
from rnn_longctx.tasks import TASKS

ALL = pages.all_commands()
# A command is matched from its beginning on. One that nothing here matches is run.
NOT_RUN = {
    r"make ": "makes an environment, or runs all tests: CI does both",
    r"(git|source|mkdir) ": "is the shell's own",
    r"pip ": "needs a network",
    r"pytest ": "is a part of these tests",
    r"python examples/": "tests/test_examples.py runs it",
    r"python fragment": "is the name of a kind of block",
    r"python benchmarks/(watch|retrofit|sensors|million)\.py": "measures for minutes to hours; tables are committed",
    r"(torchrun|accelerate) ": "needs several GPUs: tests/train/test_team.py, tests/eval/test_ranks.py run CPUs",
    r"rnn-longctx bench (scan|delta|model|decode|train|parallel|delta-layer)\b(?!-cpu)": "needs a GPU",
    r"rnn-longctx watch ": "serves until it is stopped: tests/eval/show/watch starts and stops it",
    r"rnn-longctx tune ": "takes what time it is given, in processes of their own: tests/eval/tune runs it",
    r"rnn-longctx --install-completion": "writes into a person's shell",
}
# A part of a command in a sentence, or one that stands for many.
NAME = re.compile(r"\.\.\.(?!\"$)|NAME|CONFIG\b|FILE_OR_MODULE| \S+\|\S+$")
SLOW_PAGES = (  # that take 5 seconds of a core or more
    "docs/command-line.md", "docs/guides/calibrate-and-fold.md", "docs/guides/capacity.md", "docs/guides/compare.md",
    "docs/guides/lm-eval.md", "docs/reproduce.md", "docs/results/capacity.md", "docs/results/probes.md",
    "docs/results/recurrences.md", "docs/results/training.md",
)  # fmt: skip


def reason(command: Command) -> str | None:
    return next((why for beginning, why in NOT_RUN.items() if re.match(beginning, command.text)), None)


def is_name(command: Command) -> bool:
    """Whether it names a command in a sentence, without what it would need."""
    alone = re.fullmatch(r"rnn-longctx [\w-]+( --[\w-]+)?", command.text) is not None
    return command.named and (alone or NAME.search(command.text) is not None)


class Here:
    """Stands for a process of a study's pool, which it runs in this one: no interpreter begins for a cell."""

    def __init__(self, command: list[str], stdout: BinaryIO, **_: object):
        argv, self.returncode = command[command.index("-m") + 1 :], 0
        log = io.TextIOWrapper(stdout, write_through=True)
        with (
            warnings.catch_warnings(),
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            patch.setattr(sys, "argv", argv)
            warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: the package has imported the module by then
            try:
                runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
            except SystemExit as end:
                self.returncode = int(bool(end.code))
        log.detach()

    def poll(self) -> int:
        return self.returncode


def to_run() -> dict[str, list[Command]]:
    """Return the commands that are run, by page; what stands in several pages, in the first where it is no part of a
    sentence."""
    found: dict[str, Command] = {}
    for command in sorted(ALL, key=lambda command: command.named):
        if not is_name(command) and reason(command) is None:
            found.setdefault(line_of(command), command)
    by_page: dict[str, list[Command]] = {}
    for command in (command for command in ALL if command in found.values()):
        by_page.setdefault(command.page, []).append(command)
    return by_page


def line_of(command: Command) -> str:
    """Return what is run: those of several pages are often one, made small."""
    return command.text if command.text.startswith("python ") else shlex.join(small_commands.small(words(command)))


RUN = to_run()


def test_what_is_not_run_stands_in_the_pages():
    for beginning in NOT_RUN:
        assert any(re.match(beginning, command.text) for command in ALL), f"{beginning}: no page has it any more"


def test_every_command_is_run_or_has_a_reason():
    """A name in a sentence is held to be one that the command line knows (test_commands.py)."""
    run = {line_of(command) for commands in RUN.values() for command in commands}
    for command in ALL:
        assert reason(command) or is_name(command) or line_of(command) in run, command
    assert len(run) > 60


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "folder"
    folder.mkdir()
    small_commands.prepare(folder)
    return folder


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """A copy of the prepared folder, in which the commands of a page are run; with the plugin that the page writes."""
    for registry in (REMEDIES, TASKS, MIXERS, RECURRENCES):
        monkeypatch.setattr(registry, "_known", dict(registry))
    monkeypatch.setattr("rnn_longctx.eval.pool.subprocess", SimpleNamespace(Popen=Here, PIPE=None))
    monkeypatch.setattr("rnn_longctx.eval.pilot.run.other_steps", lambda *some: [])  # they take what time is left
    monkeypatch.setattr("rnn_longctx.cli.commands.pilot.process_seconds", lambda: 0.0)  # (of all tests so far)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = set(sys.modules)
    shutil.copytree(prepared, tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    yield tmp_path / "folder"
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run_small(command: Command, folder: Path, monkeypatch, capsys) -> None:
    """Run a command, made small, in this process."""
    line = small_commands.small(words(command))
    plugin = re.search(r"--plugin (\S+)", command.text)
    read = re.search(r" < (\S+)", command.text)
    given = (folder / read[1]).read_bytes() if read else b""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    more = ["--plugin", plugin[1]] if plugin else []
    code, out, err = called(monkeypatch, capsys, *line, *more)
    assert code == 0, f"{shlex.join(line)}\n{err[-2000:]}"
    if "--json" in line:
        json.loads(out)


def run_script(text: str, folder: Path, monkeypatch) -> None:
    """Run a script of benchmarks/ from the copy that writes into the folder."""
    _, script, *arguments = shlex.split(text)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(folder / script), run_name="__main__")


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow if p in SLOW_PAGES else ()) for p in RUN])
def test_the_commands_of_a_page_run(page, folder, monkeypatch, capsys):
    for title, code in pages.python_blocks(pages.ROOT / page):
        if page.startswith("docs/develop/add-a-") and not title:
            plugins = {m[1] for c in RUN[page] if (m := re.search(r"--plugin (\S+)", c.text))}
            for name in plugins:
                (folder / name).write_text(code)
    for command in RUN[page]:
        if command.text.startswith("python "):
            run_script(command.text, folder, monkeypatch)
        else:
            run_small(command, folder, monkeypatch, capsys)
