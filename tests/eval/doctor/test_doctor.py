"""`rnn-longctx doctor`: everything that can be missing is examined, what is broken is called so, and the exit code says
whether the core works."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rnn_longctx import cli
from rnn_longctx.eval.doctor import checks, core_works, examine, machine, tries
from rnn_longctx.eval.doctor.checks import AFTER, Check
from rnn_longctx.recurrence.backends import Backend
from rnn_longctx.recurrence.interface import RECURRENCES

OPTIONAL = {"mamba_ssm", "causal_conv1d", "fla", "lm_eval", "accelerate", "datasets", "peft", "wandb", "tensorboard"}
LIGHT = ("demo checkpoint", "pyarrow", "memory", "disk")  # what is quick to try


@pytest.fixture
def quick(monkeypatch):
    """Without the packages that take seconds to import."""
    monkeypatch.setattr(checks, "AFTER", tuple(check for check in AFTER if check.name in LIGHT))


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", "doctor", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    return call


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.mark.slow
def test_everything(run):
    _holds(*run("--json"))


def test_the_core_works_here_and_the_document_says_so(quick, run):
    state = torch.get_rng_state()
    _holds(*run("--json"))
    assert torch.equal(torch.get_rng_state(), state), "a try drew from the program's random numbers"


def _holds(code, printed, said):
    document = json.loads(printed)
    assert code == 0 and document["core_works"] is True and not said
    found = {row["name"]: row for row in document["tables"]["findings"]}
    assert {row["state"] for row in found.values()} <= {"works", "missing", "not here"}
    assert all(row["state"] == "works" for row in found.values() if row["core"])
    assert found["torch"]["version"] == torch.__version__ and not found["torch"]["install"]
    backends = {f"backend {r.name} {name}" for r in RECURRENCES.values() for name in r.backends.known}
    assert backends <= set(found)


def test_every_optional_package_is_examined_and_has_a_line_that_installs_it():
    known = {check.package.replace("-", "_").removesuffix("_core") for check in AFTER}
    assert known >= OPTIONAL | {"triton", "transformers", "pyarrow", "optuna"}
    assert all(check.install for check in AFTER if check.package)
    assert all(check.needed_for for check in AFTER)


def test_a_backend_that_is_wrong_is_broken(quick, run):
    backends = RECURRENCES["ssd"].backends
    right = backends.known["torch"]

    def wrong(reading):
        y, carry = right.run(reading)
        return y * 1.01, carry

    backends.register(replace(right, run=wrong))
    try:
        code, printed, _ = run()
    finally:
        backends.register(right)
    assert code == 1 and "the core does not work: backend ssd torch" in printed
    assert "broken: backend ssd torch, for everything: pip install" in printed


def test_a_backend_that_fails_on_a_gpu_alone_leaves_the_core(quick):
    def fails(reading):
        raise OSError("no such kernel\nin two lines")

    backends = RECURRENCES["ssd"].backends
    backends.register(Backend("extra", fails, lambda: None, lambda policy, call: None))
    try:
        findings = examine()
    finally:
        backends.remove("extra")
    assert core_works(findings)
    found = by_name(findings)["backend ssd extra"]
    assert found.state == "broken" and found.said == "OSError: no such kernel in two lines" and not found.core


def test_a_backend_that_reads_nothing_here_says_why(monkeypatch):
    ssd = RECURRENCES["ssd"]
    monkeypatch.setitem(ssd.backends.known, "far", Backend("far", None, lambda: None, lambda policy, call: "is far"))
    with pytest.raises(tries.NotHere, match="is far"):
        tries.scan(ssd, "far")


def test_what_is_not_installed_is_missing_and_what_fails_is_broken():
    def attempt():
        raise AssertionError("it is not tried")

    missing = Check("x", "flying", attempt, "no-such-package-here", "pip install x").run()
    assert (missing.state, missing.version, missing.install) == ("missing", None, "pip install x")
    unused = Check("x", "flying", attempt, "no-such-package-here", "pip install x", gpu_only=True).run()
    assert unused.state == ("missing" if torch.cuda.is_available() else "not here")
    assert unused.install == "pip install x"

    def breaks():
        print("noise")
        raise ImportError("undefined symbol")

    broken = Check("x", "flying", breaks, "torch", "pip install x", core=True).run()
    assert (broken.state, broken.said) == ("broken", "ImportError: undefined symbol")
    assert broken.version == torch.__version__ and not core_works([broken])


def test_without_torch_it_says_so():
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['rnn-longctx', 'doctor']\n"
    code += "from rnn_longctx.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "broken: torch, for everything: pip install torch" in done.stdout
    assert done.stdout.endswith("the core does not work: torch\n")


def test_memory_that_is_free(tmp_path):
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal:       16 kB\nMemAvailable:    8 kB\n")
    assert machine.available_memory(proc, tmp_path) == 8192
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machine.available_memory(proc, tmp_path) == 8192
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.available_memory(proc, tmp_path) == 4000, "a container's limit is lower"
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert machine.available_memory(proc, tmp_path) == 4300, "what it keeps of files is given up"
    assert machine.available_memory(tmp_path / "none", tmp_path) is None


def test_too_little_memory_or_disk_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "available_memory", lambda: 0)
    monkeypatch.setattr(machine, "held", lambda: 0)
    with pytest.raises(MemoryError, match=r"a million tokens take 0\.0 GiB, 0\.0 GiB are free"):
        machine.memory()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="are free in"):
        machine.disk()


def test_the_page_names_every_state():
    page = (Path(__file__).parents[3] / "docs" / "doctor.md").read_text()
    assert all(f"`{state}`" in page for state in ("works", "broken", "missing", "not here"))
