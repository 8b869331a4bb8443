"""What this library computes, as one tree of plain values: float32, on the CPU, one thread, from fixed texts and seeds.

    python tests/helpers/golden.py > tests/helpers/golden.json

Recorded before the code was moved into its present folders, and held bit for bit since (tests/test_golden.py). Only
what a person can call is used here, so that what lies behind it may move. Record it again only where a result is meant
to change, and say in the commit which and why.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from adopted_families import SCAN_FAMILIES
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rnn_longctx
from rnn_longctx import cli
from rnn_longctx.data import ByteTokenizer, Text, load_text
from rnn_longctx.eval import calibrate

REMEDIES = (
    "none", "state-norm:every=64,quantile=0.99", "rri:alpha=0.998,beta=1", "window:tokens=512", "a-floor",
    "token-filter", "delta-scale:scale=0.7", "recompute:last=512", "reset:every=512,overlap=256",
)  # fmt: skip
PROMPT = "import os\n\n\ndef walk(top):\n"


def texts() -> tuple[Text, Text]:
    """One to evaluate on and one to calibrate on: every other document of the frozen text."""
    documents = list(load_text("builtin").documents())
    return Text("golden", b"\0".join(documents[::2])), Text("calibration", b"\0".join(documents[1::2]))


def cells() -> dict[str, float]:
    text, calibration = texts()
    tasks = ["lm:slices=1,tokens=0", "passkey:n=4,tokens=8k,max=1k"]
    table = rnn_longctx.evaluate(
        rnn_longctx.load("demo"), ["512", "1k", "4k"], tasks, REMEDIES, text=text, calibration_text=calibration
    )
    columns = table[["mitigation", "task", "metric", "length", "depth", "value"]].itertuples(index=False)
    return {" ".join(map(str, key)): float(value) for *key, value in columns}


def generated() -> dict[str, list[int]]:
    model, out = rnn_longctx.load("demo"), {}
    for remedy in ("none", "state-norm", "rri:alpha=0.998,beta=1"):
        with rnn_longctx.mitigate(model, remedy):
            out[remedy] = rnn_longctx.generate(model, PROMPT * 20, 40)[0].tolist()
            out[f"{remedy} sampled"] = rnn_longctx.generate(model, PROMPT, 40, temperature=1.0, seed=3)[0].tolist()
    return out


def probed() -> dict[str, Any]:
    """A trace of the states, and what `probe` says of it."""
    text, model = texts()[0], rnn_longctx.load("demo")
    with torch.inference_mode(), rnn_longctx.record(model, every=512) as trace:
        for _ in model.stream(torch.from_numpy(model.tokenizer.encode(text.slice(0, 2048)))[None]):
            pass
    table = trace.table().select_dtypes("number").astype(float)
    return {name: [float(v) for v in column[::7]] for name, column in table.items()}


def monitored() -> list[Any]:
    text, model = texts()[0], rnn_longctx.load("demo")
    monitor = rnn_longctx.CollapseMonitor.calibrated(model, texts()[1])
    with torch.inference_mode(), monitor.on(model, lambda report: None) as watch:
        for _ in model.stream(torch.from_numpy(model.tokenizer.encode(text.slice(1, 8192)))[None]):
            pass
    return [asdict(report) for report in watch.reports[::4]]


def trained(folder: Path) -> list[list[float]]:
    """Losses and norms of twenty steps that pass their states on, with prompts mixed in."""
    (folder / "text.txt").write_bytes(texts()[0].data.replace(b"\0", b"\n")[:60_000])
    config = {
        "model": {"d_model": 32, "n_layer": 2, "vocab_size": 256, "d_state": 16, "headdim": 16},
        "data": {
            "text": str(folder / "text.txt"), "held_out": 0.1, "passkey": {"fraction": 0.3, "lengths": [110, 120]},
        },
        "passing": {"segment": 64, "bptt": 1}, "schedule": {"warmup": 3}, "train_length": 128, "batch_size": 4,
        "steps": 20, "log_every": 1, "checkpoint_every": 20, "seed": 5, "device": "cpu", "out": str(folder / "run"),
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    run("train", str(folder / "train.yaml"))
    lines = [line.split(",") for line in (folder / "run" / "log.csv").read_text().split()]
    held = [i for i, name in enumerate(lines[0]) if name not in ("seconds", "tokens_per_second")]
    return [[float(line[i] or "nan") for i in held] for line in lines[1:]]


def calibrated(folder: Path) -> dict[str, Any]:
    """A calibration, with a fifth of its usual prompts."""
    text = Text("calibration.txt", texts()[1].data.replace(b"\0", b"\n")[:100_000])
    remedy = calibrate(rnn_longctx.load("demo"), "a-winsor", 1024, text, slices=1, prompts=4)
    remedy.save(folder / "remedy.yaml")
    return yaml.safe_load((folder / "remedy.yaml").read_text())


def carried(folder: Path) -> dict[str, dict[str, Any]]:
    """Of a state of every adopted family, as it is saved: shapes, sums, and a digest of the bits."""
    from safetensors.torch import load_file

    from rnn_longctx.models.saved_state import save_state

    out = {}
    for name, config in SCAN_FAMILIES.items():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config()).eval()
        ours = rnn_longctx.adopt(model, name=name, tokenizer=ByteTokenizer(), train_length=16)
        cache, ids = ours.new_cache(), torch.randint(2, 97, (2, 21))
        with torch.no_grad(), rnn_longctx.mitigate(ours, "rri:alpha=0.99,beta=0.9"):
            for part in ids.split(8, 1):
                ours(part, cache)
            save_state(folder / f"{name}.state", cache, ours)
        tensors = load_file(folder / f"{name}.state")
        out[name] = {k: {"sum": float(t.double().sum()), "bits": digest(t)} for k, t in sorted(tensors.items())}
    return out


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def run(*words: str) -> None:
    result = CliRunner().invoke(cli.app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def machine() -> list[str]:
    """What the last bit of a float depends on, beside the code: versions, and a digest of the kind of processor."""
    kinds = ("vendor_id", "cpu family", "model", "stepping", "flags")
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else [platform.processor()]
    processor = sorted(line for line in lines if line.startswith(kinds))
    kind = hashlib.sha256("\n".join(processor).encode()).hexdigest()[:16]
    return [torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability(), kind]


def compute() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tree = {
                "cells": cells(), "generated": generated(), "probed": probed(), "monitored": monitored(),
                "trained": trained(folder), "calibrated": calibrated(folder), "carried": carried(folder),
            }  # fmt: skip
        return json.loads(json.dumps(tree))  # floats survive JSON exactly
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), "results": compute()}, indent=0))
