"""A tiny model and a text for pilots, of which no step is stopped because the machine is busy."""

from __future__ import annotations

import math

import pytest
import torch
from evaluated import make_model
from piloted import CANARY

from rnn_longctx.data import Text
from rnn_longctx.eval.pilot import run as pilot_run
from rnn_longctx.eval.pilot.steps import other_steps


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A step may take as long as it does: what a slow one is comes from the clock of the test that is about it."""
    monkeypatch.setattr(pilot_run, "PATIENCE", math.inf)


@pytest.fixture(autouse=True)
def few_others(monkeypatch):
    """Of the remedies that come last a few are enough here."""
    monkeypatch.setattr(pilot_run, "other_steps", lambda *asked: other_steps(*asked)[:4])


@pytest.fixture
def document():
    letters = torch.randint(97, 122, (4000,)).tolist()
    return Text(
        "dir:letters", b"\0".join(bytes(letters[i : i + 400]) + f" {CANARY} ".encode() for i in range(0, 4000, 400))
    )


@pytest.fixture
def model(seed):
    return make_model(seed)
