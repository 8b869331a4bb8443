"""Mamba (arXiv 2312.00752), the selective state space model, with the parameter names of mamba-ssm.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T   dt_t = softplus(W_dt (W_x x_t) + bias), one a channel
    y_t = S_t C_t + D x_t                        out_t = W_o (y_t * silu(z_t))

x comes out of a causal convolution and SiLU, and B_t and C_t are maps of it that all channels share. In the scan's
words each of the expand * d_model channels is a head of headdim 1, whose d_state numbers decay at rates A of their own.

Initialisation is mamba-ssm's: A = -(1, 2, ..., d_state) in every channel (S4D-real), steps log-uniform in [1e-3, 1e-1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.ids import refuse_offloaded
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.recurrence.gates import ScanInputs, SteppedGates
from rnn_longctx.recurrence.span import Span

STEPS = 1e-3, 1e-1  # of a channel, at first


@dataclass(frozen=True)
class Mamba1Config:
    """The shape of a layer.

    Attributes:
        d_conv: taps of the convolution.
        expand: channels, as a multiple of d_model.
        dt_rank: of the map that makes the steps; 0: d_model / 16, rounded up.
    """

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv", "expand"):
            if getattr(self, name) < 1:
                raise InputError(f"mamba1: {name} must be at least 1, got {getattr(self, name)}")
        if self.dt_rank < 0:
            raise InputError(f"mamba1: dt_rank must be at least 1, or 0 for d_model / 16, got {self.dt_rank}")


@MIXERS.register
class Mamba1(Recurrent):
    """A Mamba layer."""

    name, Config = "mamba1", Mamba1Config
    examples = ("mamba1:d_state=4",)
    per_channel = True

    def __init__(self, config: Mamba1Config, model: Shape):
        super().__init__()
        self.config, inner = config, config.expand * model.d_model
        self.dt_rank = config.dt_rank or math.ceil(model.d_model / 16)
        self.in_proj = nn.Linear(model.d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, config.d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, model.d_model, bias=False)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1.0, config.d_state + 1).log())
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = torch.empty(inner).uniform_(*map(math.log, STEPS)).exp()
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.out_proj.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: Mamba1Config, model: Shape) -> Mamba1:
        return cls(config, model)

    @property
    def A(self) -> Tensor:
        """(H, N), at least float32: the rate at which each number of a state decays in a step, below 0."""
        refuse_offloaded(self.A_log, "a mixer")
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    @property
    def heads(self) -> int:
        return len(self.D)

    @property
    def headdim(self) -> int:
        return 1

    @property
    def d_state(self) -> int:
        return self.config.d_state

    @property
    def channels(self) -> tuple[int, int]:
        return self.heads, self.config.d_conv - 1

    @torch.no_grad()
    def scale_rates(self, factor: Tensor) -> None:
        # a new tensor, for the old one may be a mapped file's; factor may be one for all
        A_log = self.A_log.data.double() + factor.log().view(-1, 1)
        self.A_log.data = A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, SteppedGates, Rest]:
        x, z = self.in_proj(u).chunk(2, -1)  # each (B, T, H)
        x, conv, convolved = self.convolve(self.conv1d, x, carry, span)
        low, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.linear(low, self.dt_proj.weight)  # (the bias is added in the scan, in float32)
        inputs = ScanInputs(x[..., None], B[:, :, None], C[:, :, None], self.D)
        return inputs, SteppedGates(dt, self.A, self.dt_proj.bias), Rest(z, conv, convolved)

    def output_gate(self, rest: Rest) -> None:
        """There is no norm for a scan to apply."""

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        assert rest.z is not None
        return self.out_proj(y.flatten(-2) * F.silu(rest.z))
