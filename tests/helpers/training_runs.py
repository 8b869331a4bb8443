"""Training runs to compare, bit for bit."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rnn_longctx.config import to_dict
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.train import TrainConfig
from rnn_longctx.train.carries import state_map
from rnn_longctx.train.snapshots import newest_snapshot

TINY = Mamba2Config(d_model=16, n_layer=2, vocab_size=256, d_state=8, headdim=8)


class Killed(BaseException):
    pass


def final(config: TrainConfig) -> dict[str, Any]:
    snapshot = newest_snapshot(Path(config.out) / "snapshots", torch.device("cpu"))
    assert snapshot is not None and snapshot["state"]["step"] == config.steps
    return snapshot


def rows(config: TrainConfig) -> list[dict[str, float]]:
    with (Path(config.out) / "log.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, all the way down."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a: TrainConfig, b: TrainConfig, but: tuple[str, ...] = ()) -> None:
    """The same weights, moments and log; but: columns that one of the logs cannot have."""
    one, two = final(a), final(b)
    for part in one.keys() - {"state"}:
        assert_same(one[part], two[part], part)
    timed = ("tokens_per_second", "seconds", *but)
    logs = [[{k: str(v) for k, v in row.items() if k not in timed} for row in rows(c)] for c in (a, b)]
    assert logs[0] == logs[1]  # as text: NaN stands where no row had an answer


def run_and_kill(config: TrainConfig, file: Path, deadline: float = 60) -> None:
    """By `rnn-longctx train` in a process of its own, which takes 0.1 s a step longer and is killed by the system some
    time after its first snapshot. file: written, the config."""
    file.write_text(yaml.safe_dump(to_dict(config)))
    slow = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from rnn_longctx import cli\n"
        "from rnn_longctx.train.corpus import Corpus\n"
        "batch = Corpus.batch\n"
        "Corpus.batch = lambda *a: (time.sleep(0.1), batch(*a))[1]\n"
        "sys.argv = ['rnn-longctx', 'train', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", slow, str(file)], env=environment, stdout=subprocess.PIPE)
    try:
        end = time.monotonic() + deadline
        while not list((Path(config.out) / "snapshots").glob("step-*.pt")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        time.sleep(random.random() * 0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL and not (Path(config.out) / "model").exists()


def random_start(model: Any, rows: int) -> Cache:
    return state_map(torch.randn_like, model.new_cache(rows))


def states(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, the last inputs of its convolution and its scan's state."""
    return [(layer.conv, layer.scan.state) for layer in cache.layers]
