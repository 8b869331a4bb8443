"""The causal convolution of a layer: PyTorch, and on a GPU one kernel, with gradients one more; and the shift by one
token, a convolution of a single tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.kernels import choose


def causal_conv(x: Tensor, conv: nn.Conv1d, before: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the causal depthwise convolution and SiLU of x (B, T, channels), and the inputs (B, channels, taps - 1) to
    go on from.

    Args:
        before: what the call before returned.
        reset: (B, T) bool, True where a document begins; no tap reaches back over it.
    """
    unadapted(conv)
    if reset is None and conv.kernel_size[0] <= 4 and choose.fits(x):
        return choose.chosen().conv_silu(x, conv.weight, conv.bias, before)
    y, after = linear_conv(x, conv.weight, conv.bias, before, reset)
    return F.silu(y), after


def unadapted(conv: nn.Module) -> None:
    """Raise InputError where an adapter is around a convolution: its weight alone is not what it computes."""
    if hasattr(conv, "base_layer"):
        raise InputError("an adapter around a convolution is not read: merge it first (merge_and_unload)")


def linear_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what `causal_conv` does, without the SiLU. weight: (channels, 1, taps); bias: (channels)."""
    taps, length = weight.shape[-1] - 1, x.shape[1]
    before = x.new_zeros(x.shape[0], x.shape[2], taps) if before is None else before.to(x.dtype)
    whole = torch.cat([before.transpose(1, 2), x], 1)  # (B, taps + T, channels)
    document = None if reset is None else F.pad(reset.long().cumsum(1), (taps, 0))[..., None]  # (B, taps + T, 1)
    if document is None and _in_one_call(x):
        bias = None if bias is None else bias.to(x.dtype)
        picture = whole.transpose(1, 2)[:, :, None]  # (B, channels, 1, taps + T), channels last in memory
        y = F.conv2d(picture, weight[:, :, None].to(x.dtype), bias, groups=x.shape[2])[:, :, 0].transpose(1, 2)
    else:  # a sum over taps in this layout: twice as fast as turning channels first for a library call
        weight = weight[:, 0].t().to(x.dtype).contiguous()  # (taps + 1, channels)
        y = x.new_zeros(()).expand_as(x) if bias is None else bias.to(x.dtype).expand_as(x)
        for k in range(taps + 1):
            tap = whole[:, k : k + length]
            if document is not None:
                tap = tap * (document[:, k : k + length] == document[:, taps:])
            y = torch.addcmul(y, tap, weight[k]) if k == 0 else y.addcmul_(tap, weight[k])
    after = whole[:, length:]
    if document is not None:
        after = after * (document[:, length:] == document[:, -1:])
    return y, after.transpose(1, 2).contiguous()


def _in_one_call(x: Tensor) -> bool:
    """Return whether PyTorch convolves x (B, T, channels) fast as it lies: on a CPU in float32, three times as fast as
    a sum over taps, and backwards slower."""
    fast = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return fast and not torch.is_autocast_enabled("cpu")


def shifted(x: Tensor, before: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the token before each of x (B, T, channels), zeros where there is none, and (B, channels, 1) to go on
    from. Arguments are those of `causal_conv`."""
    first = torch.zeros_like(x[:, :1]) if before is None else before.to(x.dtype).transpose(1, 2)
    y = torch.cat([first, x[:, :-1]], 1)
    if reset is not None:
        y = y.masked_fill(reset[..., None], 0.0)
    last = x[:, -1:].transpose(1, 2).clone(memory_format=torch.contiguous_format)  # a view would hold all of x
    return y, last
