"""What `rnn-longctx watch` costs the model: two streams of the demo model with a monitor, side by side on
two cores, one of whose logs is followed by a watch that is asked every second.

    python benchmarks/watch.py            # writes benchmarks/results/watch.csv, and prints the ratios
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pandas as pd

import rnn_longctx

TOKENS, REPEATS = 16_384, 6
MONITOR = "monitor.json"
STREAM = """
import sys, time, resource, torch, rnn_longctx
from rnn_longctx.data import load_text, tokens
torch.set_num_threads(1)
model = rnn_longctx.load("demo")
monitor = rnn_longctx.CollapseMonitor.load(sys.argv[3], model)
ids = torch.from_numpy(tokens(load_text("stdlib"), model.tokenizer, 0, int(sys.argv[2]))[0])[None]
print("ready", flush=True)
sys.stdin.readline()
before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
with torch.inference_mode(), monitor.on(model, action="mitigate:state-norm", log=sys.argv[1]):
    for _ in model.stream(ids, segment=1024):
        pass
after = resource.getrusage(resource.RUSAGE_SELF)
print(time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


def stream(log: Path) -> subprocess.Popen[str]:
    """Start a process that reads once it is told to, and says the seconds that passed and those of its core."""
    command = [sys.executable, "-W", "ignore", "-c", STREAM, str(log), str(TOKENS), str(log.parent / MONITOR)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def ask(url: str, done: threading.Event, counts: list[int]) -> None:
    """Ask a watch for what is new every second, as the page does."""
    since = 0
    while not done.wait(1.0):
        with urllib.request.urlopen(f"{url}data?era=0&since={since}") as answer:
            since = json.load(answer)["number"]
        counts.append(since)


def pair(folder: Path, first_watched: bool) -> dict[str, float]:
    """Return seconds of both streams, and of the core, with a watch and without."""
    logs = {"watched": folder / "watched.jsonl", "alone": folder / "alone.jsonl"}
    order = list(logs) if first_watched else list(logs)[::-1]
    processes = {name: stream(logs[name]) for name in order}
    command = [sys.executable, "-u", "-m", "rnn_longctx.cli", "watch", str(logs["watched"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        url, done, counts = watch.stdout.readline().split()[0], threading.Event(), [0]
        asking = threading.Thread(target=ask, args=(url, done, counts))
        asking.start()
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        out = {name: process.communicate()[0].split() for name, process in processes.items()}
        time.sleep(1.5)
        done.set()
        asking.join()
        watch.kill()
    row: dict[str, float] = {"reports": counts[-1], "asked": len(counts) - 1}
    for name, (seconds, core) in out.items():
        row |= {f"{name}_seconds": float(seconds), f"{name}_core_seconds": float(core)}
    for log in logs.values():
        log.unlink()
    return row


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rnn_longctx.CollapseMonitor.calibrated(rnn_longctx.load("demo")).save(Path(folder) / MONITOR)
        rows = []
        for i in range(REPEATS):
            rows.append(pair(Path(folder), i % 2 == 0))
            print(rows[-1], flush=True)
    frame = pd.DataFrame(rows)
    for what in ("seconds", "core_seconds"):
        frame[f"{what}_ratio"] = frame[f"watched_{what}"] / frame[f"alone_{what}"]
    frame.round(4).to_csv(Path(__file__).parent / "results" / "watch.csv", index=False)
    print(frame.round(3).to_string(index=False))
    print(frame.filter(like="ratio").describe().round(3).to_string())


if __name__ == "__main__":
    main()
