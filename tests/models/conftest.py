"""Small models whose gates do something: decays slow and fast, steps short and long, every bias in use."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rnn_longctx.models import Mamba2Config, Mamba2LM


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
def _randomise(model: nn.Module) -> nn.Module:
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "A_log":
            p.uniform_(math.log(0.01), math.log(16.0))
        elif last == "dt_bias":
            p.uniform_(-4.0, 1.0)
        elif last in ("D", "bias"):
            p.normal_(0.0, 0.5)
        elif "norm" in name:
            p.normal_(1.0, 0.3)
        elif "embedding" in name:
            p.normal_()
    return model


@pytest.fixture
def randomise():
    """Fills A_log, dt_bias, D, biases, norms and the embedding with values far from their defaults."""
    return _randomise


@pytest.fixture
def make():
    """make(**fields of Mamba2Config) -> a small random model in eval mode."""

    def build(dtype: torch.dtype = torch.float32, **fields) -> Mamba2LM:
        shape = {"d_model": 24, "n_layer": 2, "vocab_size": 61, "d_state": 8, "headdim": 8, "ngroups": 2}
        return _randomise(Mamba2LM(Mamba2Config(**{**shape, **fields}))).to(dtype).eval()

    return build
