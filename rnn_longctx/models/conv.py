"""The causal convolution of a layer: PyTorch, and on a GPU one kernel, with gradients one more; and the shift by one
token, a convolution of a single tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.kernels import choose

LIBRARY_NUMBERS = 2**18  # from which on a library call pays on a CPU


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
    return F.silu(y, inplace=not y.requires_grad), after


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
    if document is None and _library_is_faster(whole, weight):
        bias = None if bias is None else bias.to(whole.dtype)
        y = F.conv2d(whole.mT[:, :, None], weight[:, :, None], bias, groups=len(weight))[:, :, 0].mT
    else:
        y = _sum_of_taps(whole, weight, bias, document)
    after = whole[:, length:]
    if document is not None:
        after = after * (document[:, length:] == document[:, -1:])
    return y, after.transpose(1, 2).contiguous()


def _library_is_faster(whole: Tensor, weight: Tensor) -> bool:
    """Whether the library's convolution of an image one pixel high, whose channels come last in memory as they do here,
    is faster than a sum over taps: by a third and more, of many numbers, in float32, on a CPU of the kinds that it has
    code for. With gradients, and of a few tokens, it is slower."""
    return (
        whole.device.type == "cpu"
        and whole.dtype == weight.dtype == torch.float32
        and whole.numel() >= LIBRARY_NUMBERS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


def _sum_of_taps(whole: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor | None) -> Tensor:
    """Return the convolution (B, T, channels) of whole (B, taps - 1 + T, channels), where document (B, taps - 1 + T, 1)
    numbers the document of every input. On a CPU twice as fast as turning channels first for a library call."""
    taps = weight.shape[-1] - 1
    length = whole.shape[1] - taps
    weight = weight[:, 0].t().to(whole.dtype).contiguous()  # (taps, channels)
    y = whole.new_zeros(whole.shape[2]) if bias is None else bias.to(whole.dtype)
    for k in range(taps + 1):
        tap = whole[:, k : k + length]
        if document is not None:
            tap = tap * (document[:, k : k + length] == document[:, taps:])
        y = y.addcmul_(tap, weight[k]) if k else torch.addcmul(y, tap, weight[k])
    return y


def shifted(x: Tensor, before: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the token before each of x (B, T, channels), zeros where there is none, and (B, channels, 1) to go on
    from. Arguments are those of `causal_conv`."""
    first = torch.zeros_like(x[:, :1]) if before is None else before.to(x.dtype).transpose(1, 2)
    y = torch.cat([first, x[:, :-1]], 1)
    if reset is not None:
        y = y.masked_fill(reset[..., None], 0.0)
    last = x[:, -1:].transpose(1, 2).clone(memory_format=torch.contiguous_format)  # a view would hold all of x
    return y, last
