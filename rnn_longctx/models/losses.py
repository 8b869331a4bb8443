"""Next-token losses from hidden states, without all logits at once: neither on the way there nor, in training, back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that asks for nothing, as in PyTorch and transformers
LOGITS = 2**22  # the most logits held at once
LOGITS_ON_CUDA = 2**26  # in training there: fewer, larger products


def token_losses(logits: Callable[[Tensor], Tensor], vocab: int, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) in nats, (B, T), from hidden states (B, T, d_model), with at most LOGITS logits at once; 0
    where a target is IGNORED. (Gradients through it keep all of them: see `head_losses`.)"""
    flat, goal = hidden.flatten(0, 1), targets.flatten()
    rows = max(1, LOGITS // vocab)
    parts = [
        F.cross_entropy(logits(flat[i : i + rows]), goal[i : i + rows], reduction="none", ignore_index=IGNORED)
        for i in range(0, len(flat), rows)
    ]
    return torch.cat(parts).view(targets.shape)


def head_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the same for logits hidden @ weight^T, weight (V, d_model), with gradients. Backwards the logits are made
    once more, a third of the head's work on top, and the weight's gradient is summed in float32 over the pieces.
    Products are in autocast's type where that is on, in the weight's otherwise; the rest is at least float32."""
    kind = hidden.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    low = torch.float64 if weight.dtype == torch.float64 else low
    return _HeadLosses.apply(hidden, weight, targets, low)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, low: torch.dtype) -> Tensor:
        wide = torch.promote_types(low, torch.float32)
        losses = torch.empty(targets.shape, dtype=wide, device=hidden.device)  # no view: FSDP2 warns of those
        ignored = targets == IGNORED
        flat, goal = losses.view(-1), targets.masked_fill(ignored, 0).flatten()
        for piece, logits in _pieces(hidden.flatten(0, 1), weight, low):
            flat[piece] = F.cross_entropy(logits, goal[piece], reduction="none")
        ctx.save_for_backward(hidden, weight, targets, losses)
        ctx.low = low
        return losses.masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        whole, weight, targets, losses = ctx.saved_tensors
        hidden, goal, losses, grad = whole.flatten(0, 1), targets.flatten(), losses.view(-1), grad.flatten()
        ignored = goal == IGNORED
        goal, grad = goal.masked_fill(ignored, 0), grad.masked_fill(ignored, 0)
        d_hidden, d_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for piece, logits in _pieces(hidden, weight, ctx.low):
            target = goal[piece, None]
            total = losses[piece, None] + logits.gather(1, target)  # log of the sum of exponentials
            p = logits.sub_(total).exp_()
            p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            p = p.mul_(grad[piece, None]).to(ctx.low)
            with torch.autocast(hidden.device.type, enabled=False):
                d_hidden[piece] = p @ weight.to(ctx.low)
                if d_weight is not None:
                    d_weight += p.t() @ hidden[piece].to(ctx.low)
        return d_hidden.view_as(whole), None if d_weight is None else d_weight.to(weight.dtype), None, None


def _pieces(hidden: Tensor, weight: Tensor, low: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows, and their logits, which are the caller's to overwrite."""
    w = weight.to(low).t()
    rows = max(1, (LOGITS_ON_CUDA if hidden.is_cuda else LOGITS) // len(weight))
    for i in range(0, len(hidden), rows):
        piece = slice(i, i + rows)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden[piece].to(low) @ w
        yield piece, logits.to(torch.promote_types(low, torch.float32))
