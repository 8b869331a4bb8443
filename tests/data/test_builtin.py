"""The frozen text that remedies and monitors are calibrated on: the same bytes in every kind of installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from rnn_longctx.data import load_text

HASH = "d71685ef0d6dbfbd"
ROOT = Path(__file__).parents[2]
TASKS = {"rnn_longctx_passkey.yaml", "rnn_longctx_qa.yaml", "rnn_longctx_summary.yaml", "utils.py"}  # of lm-eval
READ = """
import site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])  # other packages; the .pth files there, which may name this package, are not read
import rnn_longctx
from rnn_longctx.data import load_text
print(rnn_longctx.__file__, load_text("builtin").hash)
"""
BUILD = """
import sys
from pathlib import Path
from setuptools import build_meta  # which changes sys.argv
folder = Path(sys.argv[1])
for kind in ("wheel", "editable", "sdist"):
    (folder / kind).mkdir()
    getattr(build_meta, f"build_{kind}")(str(folder / kind))
"""


def test_it_never_changes() -> None:
    text = load_text("builtin")
    documents = list(text.documents())
    assert (text.name, text.hash, len(text), len(documents)) == ("builtin", HASH, 621_021, 81)
    assert all(d.decode() for d in documents)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the checkout, and the wheel, the editable wheel and the source archive made of it."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("rnn_longctx", "eval", "mitigations", "probes"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=copy, check=True, capture_output=True)
    return folder


def read_from(site: Path, folder: Path) -> tuple[Path, str]:
    """Where a fresh interpreter finds the package that is installed in `site`, and the hash of its text."""
    command = [sys.executable, "-I", "-S", "-c", READ, str(site), sysconfig.get_paths()["purelib"]]
    where, digest = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()
    return Path(where).parent, digest


@pytest.mark.parametrize("kind", ["wheel", "editable", "sdist", "checkout"])
def test_it_is_the_same_however_installed(built: Path, tmp_path: Path, kind: str) -> None:
    where = tmp_path / "rnn_longctx"
    if kind == "sdist":
        with tarfile.open(next((built / kind).glob("*.tar.gz"))) as archive:
            archive.extractall(tmp_path, filter="data")
        tmp_path = next(tmp_path.iterdir())
        where = tmp_path / "rnn_longctx"
    elif kind == "checkout":
        tmp_path = built / kind
        where = tmp_path / "rnn_longctx"
    else:
        with zipfile.ZipFile(next((built / kind).glob("*.whl"))) as archive:
            archive.extractall(tmp_path)
        where = where if kind == "wheel" else built / "checkout" / "rnn_longctx"
    assert read_from(tmp_path, built) == (where, HASH)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_files_that_are_no_modules_are_in_it(built: Path, kind: str) -> None:
    """Whatever git has of the package: task files of lm-eval, checkpoints; folders that are links included."""
    if kind == "sdist":
        with tarfile.open(next((built / kind).glob("*.tar.gz"))) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
    else:
        with zipfile.ZipFile(next((built / kind).glob("*.whl"))) as archive:
            names = set(archive.namelist())
    folder = "rnn_longctx/eval/harness/lm_eval_tasks/"
    assert {name.removeprefix(folder) for name in names if name.startswith(folder)} - {""} == TASKS
    for module in ("cli/commands/lm_eval", "eval/bench/cpu", "mitigations/state_norm", "models/mixers/mamba2"):
        assert f"rnn_longctx/{module}.py" in names, "what registries look for by the names of files"
    assert {"rnn_longctx/py.typed", "rnn_longctx/data/builtin.txt.xz"} < names
    assert "rnn_longctx/checkpoints/demo/config.json" in names
