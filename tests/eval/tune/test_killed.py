"""The command itself, killed as nobody can catch it, and run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("optuna")

CONFIG = """
shape: {d_model: 16, n_layer: 1, mlp: 2}
entries: [{name: sparse, mixer: "block-sparse:heads=2,block=4,window=8,top=2,gate=4"}]
train:
  data: {text: [text.txt], held_out: 0.2, mix: [{task: "planted:noise=0", fraction: 1.0, lengths: [8, 32], fill: true}]}
  train_length: 32
  batch_size: 8
  steps: 30
  schedule: {warmup: 2}
learning_rates: [1e-2]
seeds: 2
measure:
  {loss: null, recall: {tasks: ["planted:noise=0,n=20"], lengths: [32, 64]}, probe: null, remedies: null, batch: 10}
device: cpu
"""


def started(out: str) -> subprocess.Popen[str]:
    words = ["tune", "compare.yaml", "--mixer", "block-sparse:top=2,gate=4,block=4,window=8", "--budget", "2h"]
    command = [sys.executable, "-m", "rnn_longctx.cli", *words, "--memory", "8g", "--out", out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def alive(out: str) -> list[str]:
    """Command lines of trials that run."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if "eval.tune.trial" in line and out in line]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes by /proc")
def test_killed_and_run_again_the_trials_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(np.random.default_rng().integers(32, 127, 12000, dtype=np.uint8).tobytes())
    (tmp_path / "compare.yaml").write_text(CONFIG)
    whole = started("whole")
    said, _ = whole.communicate()
    assert whole.returncode == 0 and ("on held-out data" in said or "is better than the default" in said), said
    killed = started("killed")
    assert killed.stdout is not None
    next(line for line in killed.stdout if line.startswith("trial 0:"))
    while not alive("killed"):
        time.sleep(0.1)
    time.sleep(2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for _ in range(100):
        if not alive("killed"):
            break
        time.sleep(0.1)
    assert not alive("killed"), "its trial ends with it"
    again = started("killed")
    said, _ = again.communicate()
    assert again.returncode == 0, said
    columns = ["trial", "setting", "state", "value", "recall", "feasible", "note"]
    tables = [pd.read_csv(tmp_path / out / "trials.csv") for out in ("whole", "killed")]
    assert len(tables[0]) >= 3
    pd.testing.assert_frame_equal(tables[1][columns], tables[0][columns])
    assert (tables[0].loc[tables[0]["state"] == "complete", "peak_bytes"] > 2**26).all()
