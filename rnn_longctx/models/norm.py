"""RMSNorm: PyTorch, and on a GPU one kernel, with gradients one more. LayerNorm: PyTorch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.models.deferred import DeferredNorm
from rnn_longctx.models.kernels import choose
from rnn_longctx.recurrence.backends import OutputGate


class RMSNorm(nn.Module):
    """A norm over the last axis, or over each of `groups` equal parts of it (arXiv 2405.21060)."""

    def __init__(self, dim: int, eps: float, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return the norm of x (..., dim), which is multiplied by silu(gate) first."""
        if choose.fits(x):
            return choose.chosen().norm(x, self.weight, self.eps, self.groups, gate)[0]
        return self._norm(x, gate).to(x.dtype)

    def gate(self, z: Tensor) -> OutputGate | None:
        """Return what a scan needs to apply this norm, gated by z (B, T, H, P); None where kernels are not to be used,
        or cannot, and where a gradient is asked for."""
        fits = self.groups == 1 and not torch.is_grad_enabled() and choose.fits(z)
        return OutputGate(z, self.weight) if fits else None

    def add(self, x: Tensor, more: Tensor | DeferredNorm | None, in_fp32: bool) -> tuple[Tensor, Tensor]:
        """Return the norm of x + more, in the weight's type (by kernels in the one that autocast multiplies in), and x
        + more itself: float32 if asked for (float64 stays). The sum is normed as it is, not rounded to the weight's
        type first as in transformers: in bf16 that rounding is the difference."""
        wide = torch.float32 if in_fp32 and x.dtype != torch.float64 else x.dtype
        if choose.fits(x):
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else self.weight.dtype
            return choose.chosen().norm(x, self.weight, self.eps, self.groups, add=more, dtype=dtype, total=wide)
        x = _sum(x, more, wide)
        return self._norm(x, None).to(self.weight.dtype), x

    def _norm(self, x: Tensor, gate: Tensor | None) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if gate is not None:
            x = x * F.silu(gate.to(x.dtype))
        if self.groups == 1:
            x = F.rms_norm(x, x.shape[-1:], None, self.eps)
        else:
            parts = x.unflatten(-1, (self.groups, -1))
            x = F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2)
        return x * self.weight


class LayerNorm(nn.Module):
    """A norm over the last axis that takes the mean away, with a bias (arXiv 1607.06450), as RWKV's blocks have."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x (..., dim)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(wide), x.shape[-1:], None, None, self.eps)
        return (normed * self.weight + self.bias).to(x.dtype)

    def add(self, x: Tensor, more: Tensor | DeferredNorm | None, in_fp32: bool) -> tuple[Tensor, Tensor]:
        """See `RMSNorm.add`."""
        wide = torch.float32 if in_fp32 and x.dtype != torch.float64 else x.dtype
        x = _sum(x, more, wide)
        return self(x).to(self.weight.dtype), x


def _sum(x: Tensor, more: Tensor | DeferredNorm | None, dtype: torch.dtype) -> Tensor:
    if more is None:
        return x
    return x.to(dtype) + (more.scaled() if isinstance(more, DeferredNorm) else more)
