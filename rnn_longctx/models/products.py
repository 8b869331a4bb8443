"""Products of a layer's input with its weights: which are no more than that, and several of them side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from rnn_longctx.models.kernels import choose


def bare(linear: nn.Module, u: Tensor) -> bool:
    """Return whether a map of u is its weight alone, which a kernel may read in its place: no bias, no adapter, no
    quantised or offloaded weight, no hook, no other forward, and no autocast that would multiply in another type."""
    if type(linear) is not nn.Linear or linear.bias is not None or type(linear.weight) is not nn.Parameter:
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return False
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return False
    same = linear.weight.dtype == u.dtype and linear.weight.device == u.device
    return same and not torch.is_autocast_enabled(u.device.type)


def side_by_side(u: Tensor, maps: Sequence[nn.Linear]) -> Tensor:
    """Return (B, T, channels): the maps of u (B, T, d_model), one behind the other. Without gradients each product is
    written to its own columns, which saves the pass that would bring them together."""
    plain = u.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not (plain or choose.fuses_layers(u)) or not all(bare(linear, u) for linear in maps):
        return torch.cat([linear(u) for linear in maps], -1)
    widths = [linear.out_features for linear in maps]
    y = u.new_empty(*u.shape[:-1], sum(widths))
    flat = u.reshape(-1, u.shape[-1])
    for linear, columns in zip(maps, y.view(-1, sum(widths)).split(widths, 1)):
        torch.mm(flat, linear.weight.t(), out=columns)
    return y
