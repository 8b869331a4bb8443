"""The parts of a layer beside its scan: PyTorch, and on a GPU one kernel each, with gradients one more."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.ssd import Gate, fused


def _kernels(x: Tensor) -> bool:
    if not x.is_cuda or torch.compiler.is_compiling():  # a compiler fuses these itself
        return False
    return x.dtype in fused.DTYPES and fused.missing() is None


def _made_by() -> ModuleType:
    """Kernels that keep what a gradient needs, where one is asked for."""
    from rnn_longctx.models import layer_grads, layer_kernels

    return layer_grads if torch.is_grad_enabled() else layer_kernels


class Unscaled(NamedTuple):
    """values (B,T,dim) that a norm's factor a token, 1 / rms, is still to multiply. squares (B,T,·), float32, add up to
    the `width` squares of which rms^2 is the mean, and eps."""

    values: Tensor
    squares: Tensor
    width: int
    eps: float

    def scaled(self) -> Tensor:
        factor = (self.squares.sum(-1, keepdim=True) / self.width + self.eps).rsqrt()
        return (self.values * factor).to(self.values.dtype)


class RMSNorm(nn.Module):
    """Over the last axis, or over each of `groups` equal parts of it (arXiv 2405.21060)."""

    def __init__(self, dim: int, eps: float, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x (..., dim), times silu(gate) before it is normed."""
        if _kernels(x):
            return _made_by().norm(x, self.weight, self.eps, self.groups, gate)[0]
        return self._norm(x, gate).to(x.dtype)

    def gate(self, z: Tensor) -> Gate | None:
        """For a scan to apply this norm, gated by z (B,T,H,P); None where kernels are not to be used, or cannot, and
        where a gradient is asked for."""
        return Gate(z, self.weight) if self.groups == 1 and not torch.is_grad_enabled() and _kernels(z) else None

    def add(self, x: Tensor, more: Tensor | Unscaled | None, in_fp32: bool) -> tuple[Tensor, Tensor]:
        """The norm of x + more, in the weight's type (by kernels in the one that autocast multiplies in), and x + more
        itself: float32 if asked for (float64 stays). The sum is normed as it is, not rounded to the weight's type first
        as in transformers: in bf16 that rounding is the difference."""
        wide = torch.float32 if in_fp32 and x.dtype != torch.float64 else x.dtype
        if _kernels(x):
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else self.weight.dtype
            return _made_by().norm(x, self.weight, self.eps, self.groups, add=more, dtype=dtype, total=wide)
        if more is not None:
            x = x.to(wide) + (more.scaled() if isinstance(more, Unscaled) else more)
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


def causal_conv(x: Tensor, conv: nn.Conv1d, before: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution and SiLU of x (B, T, channels), and the inputs (B, channels, taps-1) to go on from.

    Args: before: what the call before returned; reset (B, T) bool: a document begins at this token, and no tap
        reaches back over it.
    A sum over taps in this layout: on a CPU twice as fast as turning channels first for a library call."""
    if hasattr(conv, "base_layer"):  # its weight alone is not what it computes
        raise InputError("an adapter around a convolution is not read: merge it first (merge_and_unload)")
    if reset is None and conv.kernel_size[0] <= 4 and _kernels(x):
        return _made_by().conv_silu(x, conv.weight, conv.bias, before)
    taps, length = conv.kernel_size[0] - 1, x.shape[1]
    before = x.new_zeros(x.shape[0], x.shape[2], taps) if before is None else before.to(x.dtype)
    whole = torch.cat([before.transpose(1, 2), x], 1)  # (B, taps + T, channels)
    weight = conv.weight[:, 0].t().to(x.dtype).contiguous()  # (taps + 1, channels)
    bias = conv.bias.to(x.dtype) if conv.bias is not None else x.new_zeros(x.shape[2])
    document = None if reset is None else F.pad(reset.long().cumsum(1), (taps, 0))[..., None]  # (B, taps + T, 1)
    y = bias.expand_as(x)
    for k in range(taps + 1):
        tap = whole[:, k : k + length]
        if document is not None:
            tap = tap * (document[:, k : k + length] == document[:, taps:])
        y = torch.addcmul(y, tap, weight[k])
    after = whole[:, length:]
    if document is not None:
        after = after * (document[:, length:] == document[:, -1:])
    return F.silu(y), after.transpose(1, 2).contiguous()
