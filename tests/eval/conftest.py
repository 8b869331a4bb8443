"""A synthetic table of results, shaped like the collapse story of a small model trained at 256 tokens; and a small
model, with texts to evaluate and to calibrate it on."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from evaluated import make_model

from rnn_longctx.eval.results import COLUMNS

LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
FLAT = [0.81, 0.74, 0.66, 0.72, 0.80, 0.74, 0.75, 0.76, 0.78]
LOSSES = {
    "none": [0.81, 0.72, 0.69, 0.91, 1.69, 2.57, 4.14, 4.80, 5.24],
    "state-norm": FLAT,
    "rri:alpha=0.999,beta=0.75": [x - 0.015 * (i > 2) for i, x in enumerate(FLAT)],
    "rri:alpha=0.99": [x + 0.03 for x in FLAT],
    "recompute:last=512": [x - 0.008 for x in FLAT],
    "reset:every=512,overlap=256": [x + 0.04 for x in FLAT],
}
RECALL = {
    "none": [1.0, 0.97, 0.9, 0.45, 0.05, 0, 0, 0, 0],
    "state-norm": [1.0, 1.0, 0.97, 0.6, 0.1, 0, 0, 0, 0],
    "rri:alpha=0.999,beta=0.75": [1.0, 0.99, 0.98, 0.7, 0.4, 0.1, 0, 0, 0],
    "rri:alpha=0.99": [0.8, 0.25, 0.1, 0, 0, 0, 0, 0, 0],
    "recompute:last=512": [1.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0, 0],
    "reset:every=512,overlap=256": [1.0, 0.7, 0.35, 0.2, 0.1, 0.05, 0, 0, 0],
}
SHARED = {
    "model": "mamba2-bytes-3m",
    "weights_hash": "0123abcd",
    "text": "stdlib",
    "text_hash": "89efcdab01234567",
    "tokenizer": "bytes",
    "batch": 8,
    "dtype": "float32",
    "backend": "chunked",
    "device": "cpu",
    "train_length": 256,
    "version": "0.1.0",
}


def make_frame(lengths=LENGTHS, slices: int = 16, per_depth: int = 10, seed: int = 0, **shared) -> pd.DataFrame:
    """Rows for both tasks; slices share their difficulty, so that pairing matters. More columns: `shared`."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, 0.08, slices)
    rows = []

    def row(mitigation, task, metric, length, samples, depth=None):
        samples = [float(s) for s in samples]
        stderr = np.std(samples, ddof=1) / len(samples) ** 0.5 if len(samples) > 1 else None
        text = {} if task == "lm" else {"text": None, "text_hash": None}
        what = {"mitigation": mitigation, "task": task, "metric": metric, "length": length, "depth": depth}
        measured = {"value": np.mean(samples), "stderr": stderr, "n": len(samples), "samples": samples}
        rows.append(dict.fromkeys(COLUMNS) | SHARED | text | what | measured | shared)

    for mitigation in LOSSES:
        row(mitigation, "lm", "nats_per_token_peak", 256, LOSSES[mitigation][0] + 0.1 + hard)
        for length in lengths:
            i = LENGTHS.index(length)
            noise = rng.normal(0, 0.01, slices)
            row(mitigation, "lm", "nats_per_token", length, LOSSES[mitigation][i] + hard + noise)
            hits = []
            for depth in (np.arange(10) + 0.5) / 10:
                p = RECALL[mitigation][i]
                hits += list(at := (rng.random(per_depth) < np.clip(p + (p % 1 > 0) * (depth - 0.5), 0, 1)) * 1.0)
                row(mitigation, "passkey", "accuracy", length, at, float(depth))
            row(mitigation, "passkey", "accuracy", length, hits)
    return pd.DataFrame(rows, columns=list(COLUMNS))


@pytest.fixture
def story() -> pd.DataFrame:
    return make_frame()


@pytest.fixture
def make():
    return make_frame


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(torch.randint(32, 127, (6000,)).tolist()))
    return str(path)


@pytest.fixture
def unseen(tmp_path):
    """To calibrate on: what is evaluated is refused for that."""
    path = tmp_path / "unseen.txt"
    path.write_bytes(bytes(torch.randint(32, 127, (6000,)).tolist()))
    return str(path)
