"""RMSNorm: PyTorch, and on a GPU one kernel, with gradients one more. LayerNorm: PyTorch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.models.deferred import DeferredNorm
from rnn_longctx.models.kernels import choose
from rnn_longctx.recurrence.backends import OutputGate


def unit(x: Tensor, eps: float) -> Tensor:
    """Return x (B, T, H, N), each head of it of length 1: x / sqrt(|x|^2 + eps)."""
    if choose.fuses(x):
        return _kernel()(x, share=1.0, eps=eps)
    n = x.shape[-1]  # the library's norm is of the mean square; what is left is the sum's
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (F.rms_norm(wide, (n,), None, eps / n) * n**-0.5).to(x.dtype)


def _kernel() -> Callable[..., Tensor]:
    from rnn_longctx.models.kernels.head_norm import head_norm

    return head_norm


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

    def gated(self, x: Tensor, z: Tensor, squash: Literal["silu", "sigmoid"] = "silu") -> Tensor:
        """Return (B, T, H * P): the norm of each head of x (B, T, H, P), times what is made of z (B, T, H * P)."""
        if choose.fuses(x):
            return _kernel()(
                x, share=1 / x.shape[-1], eps=self.eps, weight=self.weight, gate=z, sigmoid=squash == "sigmoid"
            ).flatten(-2)
        return self(x).flatten(-2) * (F.silu(z) if squash == "silu" else z.sigmoid())

    def gate(self, z: Tensor) -> OutputGate | None:
        """Return what a scan needs to apply this norm, gated by z (B, T, H, P); None where kernels are not to be used,
        or cannot, and where a gradient is asked for."""
        return OutputGate(z, self.weight) if self.groups == 1 and choose.fuses(z) else None

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
        if not torch.is_grad_enabled():
            return self._norm_in_place(x, gate)
        if gate is not None:
            x = x * F.silu(gate.to(x.dtype))
        parts = self._parts(x)
        return F.rms_norm(parts, parts.shape[-1:], None, self.eps).view(x.shape) * self.weight

    def _norm_in_place(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Return what `_norm` does without gradients: fewer passes over memory, and less of it."""
        if gate is not None:
            x = F.silu(gate.to(x.dtype)).mul_(x)
        parts = self._parts(x)
        length = torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
        factor = (length.square() / parts.shape[-1] + self.eps).rsqrt()
        normed = parts * factor if gate is None else parts.mul_(factor)
        return normed.view(x.shape).mul_(self.weight)

    def _parts(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.unflatten(-1, (self.groups, -1))


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
