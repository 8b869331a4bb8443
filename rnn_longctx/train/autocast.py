"""The precision of a forward pass in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from rnn_longctx.train.config import TrainConfig

Autocast = Callable[[], AbstractContextManager]  # gives a context for one read


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the context that `config.amp` asks for: bf16 over float32 weights, or nothing."""
    enabled = device.type == "cuda" if config.amp == "auto" else bool(config.amp)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
