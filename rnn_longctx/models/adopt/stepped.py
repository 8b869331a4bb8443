"""Mixers of other libraries whose gates follow from a step, as Mamba's do."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.mixer import AdoptedMixer
from rnn_longctx.models.hashing import held
from rnn_longctx.models.mixers.mamba2 import dt_limits
from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.interface import Recurrence
from rnn_longctx.recurrence.ssd.scan import SSD

UNLIMITED = (0.0, math.inf)


class SteppedAdopted(AdoptedMixer):
    """A mixer that is read by the scan, its gates worked out of a step dt; see `AdoptedMixer`.

    Attributes:
        limit_in_decode: whether single tokens respect the limits of dt, too; `sync` after a change.
    """

    recurrence: Recurrence = SSD
    one_step_a_head = True
    limit_in_decode = False

    def __init__(self, module: nn.Module, name: str):
        super().__init__(module, name)
        limits = dt_limits(self.dt_limit, f"{name}: the limits of dt")
        if limits != self.dt_limit:  # its own forward would fail at the first token
            raise InputError(f"{name}: the limits of dt, {self.dt_limit}, are beyond float32: {limits} says the same")

    @property
    def A(self) -> Tensor:
        """The decay rates, -exp(A_log): (H,) or (H, N) float32."""
        return -held(self.module, "A_log").detach().float().exp()

    @property
    def D(self) -> Tensor:
        """The part of x that goes straight to y: (H,) or (H, P)."""
        return held(self.module, "D")

    @property
    def dt_limit(self) -> tuple[float, float]:
        return tuple(self.module.time_step_limit or ())

    @property
    def in_proj(self) -> nn.Module:
        return self.module.in_proj

    def steps(self, projected: Tensor) -> Tensor:
        """Return dt (B, T, H), after softplus and clamp, from what `in_proj` gives (B, T, ...): its last H channels in
        every family, times FalconH1's multipliers."""
        dt = projected[..., -self.heads :]
        if (multipliers := getattr(self.module, "mup_vector", None)) is not None:
            dt = dt * multipliers[..., -self.heads :]
        return F.softplus(dt + held(self.module, "dt_bias").to(dt.device)).clamp(*self.dt_limit)

    def gates(self, dt: Tensor, dt_limit: tuple[float, float]) -> SteppedGates:
        """Return the gates of raw steps dt (B, T, H)."""
        m: Any = self.module
        A = -m.A_log.to(torch.promote_types(m.A_log.dtype, torch.float32)).exp()
        return SteppedGates(dt, A, m.dt_bias, dt_limit)

    @property
    def _needed(self) -> bool:
        return super()._needed or (self.limit_in_decode and self.dt_limit != UNLIMITED)
