"""Processes of a study: which GPU each sees."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.eval.cells import _gpus, run_cells
from rnn_longctx.eval.pool import Pool

SEES = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES')); input()"]


def _seen(log):
    for _ in range(3000):  # half a minute and more
        if log.exists() and log.read_text().endswith("\n"):
            return log.read_text().split()
        time.sleep(0.01)
    raise AssertionError("it has said nothing")


def test_every_process_sees_the_gpu_that_fewest_have(tmp_path):
    with Pool(3, ["GPU-a", "4"]) as pool:
        for name in "xyz":
            pool.start(name, SEES, tmp_path / name)
        assert [_seen(tmp_path / name) for name in "xyz"] == [["GPU-a"], ["4"], ["GPU-a"]]
        pool._running["y"][0].kill()
        assert [ended.name for ended in pool.ended()] == ["y"]
        pool.start("again", SEES, tmp_path / "again")
        assert _seen(tmp_path / "again") == ["4"]


def test_without_a_choice_it_sees_what_its_parent_does(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with Pool(1) as pool:
        pool.start("x", SEES, tmp_path / "x")
        assert _seen(tmp_path / "x") == ["7"]


@pytest.mark.parametrize(
    ("device", "there", "visible", "expected"),
    [
        ("cpu", 4, None, []),
        ("cuda", 1, None, []),
        ("cuda:1", 4, None, []),
        ("cuda", 3, None, ["0", "1", "2"]),
        ("cuda", 2, "5,GPU-a", ["5", "GPU-a"]),
    ],
)
def test_gpus(device, there, visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpus(torch.device(device)) == expected


class Decided:
    """Two cells that train; what the first is to be beyond that only the second decides: it is then to be measured."""

    def __init__(self, folder, ends):
        self.here, self.ends, self.runs = folder, ends, {"a": 0, "b": 0}

    def due(self):
        return [name for name in self.runs if not self.is_done(name)]

    def command(self, name):
        self.runs[name] += 1
        return ["sh", "-c", "echo trained"]

    def folder(self, name):
        return self.here / name

    def is_done(self, name):
        return self.runs[name] >= (self.ends if name == "a" else 1)

    def gather(self):
        pass


def test_a_cell_that_others_make_due_again_has_not_failed(tmp_path):
    cells, said = Decided(tmp_path, 2), []
    run_cells(cells, 2, torch.device("cpu"), said.append)
    assert cells.runs == {"a": 2, "b": 1} and said[-1] == "2 cells run"
    cells = Decided(tmp_path, 9)
    with pytest.raises(InputError, match="1 cell failed, the first of them a: trained"):
        run_cells(cells, 2, torch.device("cpu"), said.append)
    assert cells.runs == {"a": 2, "b": 1}
