"""The states of numbers that each decay for themselves, S_t = decay_t S_{t-1} + added_t, with all of them kept: what
the scan is for heads of headdim 1 (Mamba-1).

On a GPU a walk token by token would launch a kernel a token. There the tokens are cut into stretches, about as many as
a stretch is long, and all stretches are walked side by side from zero; then the state goes from stretch to stretch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def states(decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """Return the state after every token.

    Args:
        decay, added: (B, T, ...).
        start: (B, ...), before the first token.
    Returns: (B, T, ...).
    """
    return _Walk.apply(decay, added, start) if decay.is_cuda else walked(decay, added, start)


def walked(decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """Return what `states` does, token by token."""
    after, last = [], start
    for factor, more in zip(decay.unbind(1), added.unbind(1), strict=True):
        last = torch.addcmul(more, factor, last)
        after.append(last)
    return torch.stack(after, 1)


def walked_in_stretches(decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """Return what `states` does, without gradients."""
    length = decay.shape[1]
    size = 1 << math.ceil(math.log2(length) / 2)
    rest = -length % size
    if rest:  # tokens that nobody reads
        pad = (0, 0) * (decay.ndim - 2) + (0, rest)
        decay, added = F.pad(decay, pad), F.pad(added, pad)
    after = added.unflatten(1, (-1, size)).clone()  # (B, stretches, size, ...)
    product = decay.unflatten(1, (-1, size)).clone()  # of the decays of a stretch, up to and with each token's
    for t in range(1, size):
        after[:, :, t].addcmul_(product[:, :, t], after[:, :, t - 1])
        product[:, :, t].mul_(product[:, :, t - 1])
    before, last = [], start
    for i in range(after.shape[1]):
        before.append(last)
        last = torch.addcmul(after[:, i, -1], product[:, i, -1], last)
    after.addcmul_(product, torch.stack(before, 1)[:, :, None])
    return after.flatten(1, 2)[:, :length]


class _Walk(torch.autograd.Function):
    """`walked_in_stretches` with gradients: that of a state goes to the one before it times its decay, so it is such a
    walk too, from the end."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
        after = walked_in_stretches(decay, added, start)
        ctx.save_for_backward(decay, after, start)
        return after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, after, start = ctx.saved_tensors
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        grad = walked_in_stretches(later.flip(1), grads[0].flip(1), torch.zeros_like(start)).flip(1)
        before = torch.cat([start[:, None], after[:, :-1]], 1)
        return grad * before, grad, grad[:, 0] * decay[:, 0]
