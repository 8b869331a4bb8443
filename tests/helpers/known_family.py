"""Studies of models whose T_forget and T_recall are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from rnn_longctx.eval.capacity import models
from rnn_longctx.eval.capacity.recall import search
from rnn_longctx.eval.results import COLUMNS, to_frame

LIMIT = 1 << 16
STATES = [100_000, 200_000, 400_000, 800_000, 1_600_000]


def t_forget(state: int) -> float:
    """Tokens, by a line."""
    return 1024 * (0.2 + 2 * state / 1e6)


def t_recall(state: int) -> float:
    return 1024 * (3 * math.exp(1.2 * state / 1e6) - 2)


class Family:
    """Rows of a study, written at once (a study's own cells are a file each)."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.lines: list[dict] = []

    def put(self, name: str, task: str, metric: str, length: int, samples, **more) -> None:
        samples = [float(x) for x in samples]
        self.rows.append(dict.fromkeys(COLUMNS) | {
            "model": name, "weights_hash": "0", "mitigation": "none", "task": task, "text": task, "tokenizer": "bytes",
            "length": length, "metric": metric, "batch": 8, "dtype": "float32", "backend": "torch", "device": "cpu",
            "seed": 0, "value": float(np.mean(samples)), "stderr": 0.01, "n": len(samples), "samples": samples, **more,
        })  # fmt: skip

    def add(self, state: int, train: int, seed: int, forgets: bool, edge: float) -> None:
        """A model that recalls up to `edge` tokens."""
        name = f"s{state}-T{train}-s{seed}"
        self.lines.append(dict.fromkeys(models.COLUMNS) | {
            "model": name, "weights_hash": "0", "shape": f"s{state}", "task": "text", "train_length": train,
            "train_seed": seed, "parameters": 5 * state + 1000, "scan_state_elements": state - 100, "n_layer": 4,
            "conv_state_elements": 100, "state_elements": state,
        })  # fmt: skip
        self.put(name, "lm", "nats_per_token_peak", train, [1.0, 1.2], train_length=train)
        length = train
        while length <= LIMIT:
            loss = 1.0 if forgets or length < 8 * train else 5.0
            speed = 1e9 / state
            self.put(name, "lm", "nats_per_token", length, [loss] * 2, train_length=train, tokens_per_second=speed)
            length *= 2
        step = search(lambda n, k: (k if n <= edge else 0, k), lambda n: n > 30, 512, LIMIT, 0.95, 90)
        for length, (right, asked) in step.items():
            answers = [1.0] * right + [0.0] * (asked - right)
            for depth in range(10):
                self.put(name, "passkey", "accuracy", length, answers[depth::10], train_length=train,
                         depth=(depth + 0.5) / 10)  # fmt: skip
            self.put(name, "passkey", "accuracy", length, answers, train_length=train)

    def write(self, folder) -> None:
        to_frame(self.rows).to_parquet(folder / "results.parquet")
        pd.DataFrame(self.lines, columns=list(models.COLUMNS)).to_csv(folder / "models.csv", index=False)


def grown(folder, edge=t_recall) -> Family:
    """A study of a model a state, trained at 1024 tokens, that recalls up to `edge` of its state."""
    family = Family()
    for state in STATES:
        family.add(state, 1024, 0, True, edge(state))
    family.write(folder)
    return family
