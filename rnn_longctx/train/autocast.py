"""The precision of a forward pass in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch

from rnn_longctx.train.config import TrainConfig

Autocast = Callable[[], AbstractContextManager]  # gives a context for one read


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the context that `config.amp` asks for: bf16 over float32 weights, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bfloat16(config.amp, device))


def in_bfloat16(amp: bool | Literal["auto"], device: torch.device) -> bool:
    """Return whether products are of bfloat16 numbers, by the `amp` of a config."""
    return device.type == "cuda" if amp == "auto" else amp
