"""What the outputs of the scans are sums of, read off a model's layers by hooks while it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.conv import causal_conv
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.modes import evaluating
from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy


@dataclass(frozen=True)
class Terms:
    """What the terms of one layer are made of, over a segment of t tokens from `start` on.

    Shapes: log_decay, scale, size (t, H), B and C (t, G, N); size is ||x||. float32, or float64 for a float64 model.
    """

    start: int
    log_decay: Tensor
    scale: Tensor
    size: Tensor
    B: Tensor
    C: Tensor


def read_terms(model: Mamba2LM, ids: Tensor, segment: int) -> Iterator[list[Terms]]:
    """Read ids (1, T) from a fresh cache; after each segment, the Terms of every layer."""
    cache, projected, found, start = model.new_cache(), {}, [], 0

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        projected["now"] = output  # the layer that is being read; its mixer's hook below comes next

    def note(mixer: Any, inputs: Any, output: Any) -> None:
        c, carry = mixer.config, inputs[1]
        _, xBC, dt = projected.pop("now").split([c.d_inner, c.conv_dim, c.nheads], -1)
        xBC, _ = causal_conv(xBC, mixer.conv1d, carry.conv if carry else None, None)  # as the mixer has just done
        wide = torch.promote_types(xBC.dtype, torch.float32)  # as the scan reads it
        x, B, C = xBC[0].to(wide).split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], -1)
        gates = SteppedGates(dt, mixer.A, mixer.dt_bias, c.dt_limit).worked_out(wide, mixer.policy)
        size = x.unflatten(-1, (c.nheads, c.headdim)).norm(dim=-1)
        B, C = (v.unflatten(-1, (c.ngroups, c.d_state)) for v in (B, C))
        found.append(Terms(start, gates.log_decay[0], gates.input_scale[0], size, B, C))

    for start in range(0, ids.shape[1], segment):
        # hooks stand only while the model reads: a caller may drop this iterator half way
        hooks = [
            h for m in model.mixers for h in (m.in_proj.register_forward_hook(keep), m.register_forward_hook(note))
        ]
        try:
            found = []
            with evaluating(model):
                model(ids[:, start : start + segment].to(model.device), cache)
        finally:
            for hook in hooks:
                hook.remove()
        yield found


def refuse(model: Mamba2LM, ids: Tensor, segment: int) -> None:
    """Raises InputError where a model's outputs are no plain sum of terms, or the arguments are wrong."""
    if not isinstance(model, Mamba2LM):
        raise InputError(
            f"contributions are read off this library's own models, {type(model).__name__} is none of them"
        )
    if not isinstance(ids, Tensor):
        raise InputError(f"ids must be a tensor (1, T) of whole numbers, got {type(ids).__name__} {ids!r:.60}")
    if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] < 1:
        raise InputError(f"ids must be (1, T) with at least one token, got shape {tuple(ids.shape)}")
    if segment < 1:
        raise InputError(f"segment: expected at least 1 token, got {segment}")
    if model.restart is not None or model.reader is not None:
        raise InputError("contributions are those of tokens read one after the other: take the control or reader off")
    for p in (mixer.policy for mixer in model.mixers):
        if p != ScanPolicy(mul=p.mul, add=p.add, gain=p.gain, min_dt=p.min_dt):
            raise InputError(
                "contributions add up under policies of the gates alone: a cap, window, reset or start is on"
            )
