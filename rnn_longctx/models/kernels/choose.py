"""Where kernels are used, and which: those that keep what a gradient needs, where one is asked for."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rnn_longctx.recurrence import triton

# Whether layers of the delta rule and MLPs take the kernels of `delta_inputs` and `swiglu`, and products side by side;
# rotary positions the one of `rotary`; LongNet, and full attention that goes on from a carry, flash attention's.
# `rnn-longctx bench delta-layer` turns it off to time a layer of the delta rule without them.
FUSED_LAYERS = True


def fits(x: Tensor) -> bool:
    if not x.is_cuda or torch.compiler.is_compiling():  # a compiler fuses these itself
        return False
    return x.dtype in triton.DTYPES and triton.missing() is None


def fuses(x: Tensor) -> bool:
    """Return whether kernels may be used that keep nothing for a gradient: none is asked for."""
    return not torch.is_grad_enabled() and fits(x)


def fuses_layers(x: Tensor) -> bool:
    """Return whether the kernels that FUSED_LAYERS is about may be used."""
    return FUSED_LAYERS and fuses(x)


def chosen() -> ModuleType:
    """Kernels that keep what a gradient needs, where one is asked for."""
    from rnn_longctx.models.kernels import conv_norm, conv_norm_grads

    return conv_norm_grads if torch.is_grad_enabled() else conv_norm
