from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import TINY

from rnn_longctx.train import TrainConfig
from rnn_longctx.train.config import DataConfig, PasskeyConfig, ScheduleConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    words = np.random.default_rng().choice(["def ", "return ", "x", " = ", "(y)\n"], 8000)
    (tmp_path / "text.txt").write_text("".join(words))
    return TrainConfig(
        model=TINY,
        data=DataConfig(
            text=[str(tmp_path / "text.txt")], held_out=0.1, passkey=PasskeyConfig(fraction=0.3, lengths=(110, 120))
        ),
        schedule=ScheduleConfig(warmup=3),
        train_length=120,
        batch_size=4,
        steps=12,
        log_every=2,
        checkpoint_every=4,
        seed=random.randrange(1 << 30),
        device="cpu",
        out=str(tmp_path / "run"),
    )
