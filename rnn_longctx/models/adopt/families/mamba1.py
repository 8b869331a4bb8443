"""Mamba-1 mixers of transformers (Mamba, FalconMamba, Jamba) under our policies.

A channel is a head of headdim 1 whose decays are one a channel of the state, A (H, N): the scan's other form. The
library's own scan drops the state of a cached call of several tokens (transformers 5.24), so such calls are ours
always, in the model's own forward and `generate(prefill_chunk_size=...)` too: a remedy is not to look better for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.dispatch import DispatchedMixer, no_shortcut
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.adopt.mixer import Call
from rnn_longctx.models.adopt.stepped import UNLIMITED, SteppedAdopted
from rnn_longctx.models.adopt.wrapped import holds
from rnn_longctx.recurrence.gates import ScanInputs, SteppedGates
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd.scan import scan
from rnn_longctx.recurrence.ssd.window import window_state


class Mamba1Mixer(SteppedAdopted, DispatchedMixer):
    """A mixer whose channels are heads of headdim 1, each with its own step; see `AdoptedMixer`."""

    one_step_a_head = False
    per_channel = stays = True

    @staticmethod
    def functions() -> dict[str, Callable]:
        return {"mamba_selective_scan": _scan, "mamba_selective_state_update": _step, "mamba_inner_fn": no_shortcut}

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.module.A_log.shape[0], 1, self.module.A_log.shape[1]

    @property
    def dt_limit(self) -> tuple[float, float]:
        return UNLIMITED

    def stand(self) -> None:
        """Begin to stand before the module's methods. Warns of an adapter on dt_proj: the library reads that layer's
        weight past it."""
        super().stand()
        layer = self.module.dt_proj
        if hasattr(layer, "base_layer") and not getattr(layer, "merged", False):
            warnings.warn(
                f"the adapter on {self.name}.dt_proj does nothing, in the library's own forward either, until it is "
                "merged (merge_and_unload): the mixer reads that layer's weight past it",
                RuntimeWarning,
                stacklevel=2,
            )

    def steps(self, projected: Tensor) -> Tensor:
        raise InputError(f"{self.name} is a mixer of Mamba-1, whose steps come after its convolution, one a channel")

    def state_of(self, layer: Any) -> Tensor:
        return layer.recurrent_states[0].unsqueeze(2)

    def drops(self, arguments: dict[str, Any], cache: Any) -> bool:
        tokens = arguments["hidden_states"].shape[1]
        return cache is not None and tokens > 1 and cache.has_previous_state(self.module.layer_idx)

    def read_channels(
        self, call: Call, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scan x, dt, z (B, T, H), B and C (B, T, N); return y (B, T, H) and the state (B, H, N) after it."""
        m = self.module
        carry = None if call.fresh else self.carry(call.layer, self.state_of(call.layer))
        A = -m.A_log.to(torch.promote_types(m.A_log.dtype, torch.float32)).exp()
        y, new = scan(
            ScanInputs(x[..., None], B[:, :, None], C[:, :, None], m.D),
            SteppedGates(dt, A, bias, UNLIMITED),
            Span(call.mask),
            policy=self.policy,
            backend=self.backend,
            state_dtype=self.state_dtype,
            observer=self._counting,
            carry=carry,
        )
        if call.layer is not None and self.active:
            self.keep(call.layer, new)
        y = y[..., 0]
        return (y if z is None else y * F.silu(z)), window_state(new)[:, :, 0]


def _scan(
    call: Call,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    mixer: Any = call.mixer
    x, dt, B, C = (t.transpose(1, 2) for t in (hidden_states, dt, B, C))
    y, state = mixer.read_channels(call, x, dt, B, C, None if z is None else z.transpose(1, 2), delta_bias)
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


def _step(
    call: Call,
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Tensor:
    mixer: Any = call.mixer
    x, dt, B, C = (t[:, None] for t in (hidden_states, dt, B, C))
    y, new = mixer.read_channels(call, x, dt, B, C, None if z is None else z[:, None], dt_bias)
    state.copy_(new)
    return y[:, 0]


def is_mamba1(module: nn.Module) -> bool:
    parts = ("dt_proj", "x_proj", "in_proj", "conv1d")
    return holds(module, "A_log", 2) and all(hasattr(module, name) for name in parts)


FAMILIES.register(Family("mamba1", is_mamba1, Mamba1Mixer))
