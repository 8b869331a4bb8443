"""Processes of a study: which GPU each sees."""

from __future__ import annotations

import sys

import pytest
import torch

from rnn_longctx.eval.cells import _gpus
from rnn_longctx.eval.pool import Pool

SEES = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES')); input()"]


def _seen(log):
    while not log.exists() or not log.read_text().endswith("\n"):
        pass
    return log.read_text().split()


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
