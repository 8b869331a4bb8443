"""The optimizer of a run and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from rnn_longctx.train.config import OptimizerConfig, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate of update `step` (from 0) of `steps`, as a share of the peak."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "cosine":
        progress = (step - schedule.warmup) / max(1, steps - schedule.warmup)
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        falling = min(1.0, (steps - step) / max(1.0, schedule.decay * steps))
    return schedule.min_lr + (1 - schedule.min_lr) * falling


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; vectors and parameters flagged `_no_weight_decay` have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1 and not getattr(p, "_no_weight_decay", False)]
    chosen = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in chosen], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=parameters[0].is_cuda)
