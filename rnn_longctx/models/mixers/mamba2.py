"""Mamba-2 (arXiv 2405.21060), with the parameter names of the official checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.ids import refuse_offloaded
from rnn_longctx.models.interface import Mixer, Shape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.recurrence.gates import ScanInputs, SteppedGates
from rnn_longctx.recurrence.span import Span
from rnn_longctx.spec import quiet

LARGEST = torch.finfo(torch.float32).max
LARGEST_SIZE = 2**24  # of a model's shape: beyond, a config is damaged, and making the model would take for ever


def dt_limits(limits: Any, name: str) -> tuple[float, float]:
    """Return the limits of dt as a scan takes them: an upper one beyond float32 is infinite, no limit.

    Raises:
        InputError: not two numbers, one that is none, negative ones, the lower above the upper, no room above 0.
    """
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    if not 0 <= low <= high or high == 0 or low > LARGEST:
        raise InputError(f"{name}: expected two limits of a step, from 0 on, the lower first, got {limits!r:.60}")
    return low, high if high <= LARGEST else math.inf


@dataclass
class Mamba2Config:
    """The shape of a model whose layers are all Mamba-2, and how to initialise one. Names follow mamba-ssm.

    A_init and A_log_uniform: range that -A is drawn from; dt_init: range of the initial step, log-uniform.
    """

    mlp: ClassVar[float] = 0.0  # (there is none)
    norm: ClassVar[str] = "rms"

    d_model: int = 256
    n_layer: int = 6
    vocab_size: int = 256
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    bias: bool = False
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    A_init: tuple[float, float] = (1.0, 16.0)
    A_log_uniform: bool = False
    dt_init: tuple[float, float] = (1e-3, 1e-1)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "headdim", "ngroups"):
            if not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise InputError(f"{name} must be at least 1 and at most {LARGEST_SIZE}, got {getattr(self, name)}")
        self.dt_limit = dt_limits(self.dt_limit, "dt_limit")
        if not 0 <= self.norm_eps <= LARGEST:
            raise InputError(f"norm_eps: expected a small number, at least 0, got {self.norm_eps}")
        if self.d_inner % self.headdim:
            raise InputError(f"expand * d_model = {self.d_inner} must be a multiple of headdim = {self.headdim}")
        if self.nheads % self.ngroups:
            raise InputError(f"{self.nheads} heads do not divide into ngroups = {self.ngroups}")
        for name in ("A_init", "dt_init"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= LARGEST:
                raise InputError(f"{name}: expected a range above 0, its lower end first, got {[low, high]}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.ngroups * self.d_state

    def make_mixers(self) -> Iterator[Mixer]:
        """Make the mixer of every layer, with fresh weights."""
        for _ in range(self.n_layer):
            yield Mamba2(self)

    @property
    def scan_state_elements(self) -> int:
        return self.n_layer * self.nheads * self.headdim * self.d_state

    @property
    def conv_state_elements(self) -> int:
        return self.n_layer * self.conv_dim * (self.d_conv - 1)


@dataclass(frozen=True)
class Mamba2Layer:
    """The shape of one layer beside others, and the range that -A is drawn from at first; names and defaults are those
    of `Mamba2Config`, but that a text says a range by its two ends."""

    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    A_low: float = quiet(1.0)
    A_high: float = quiet(16.0)
    A_draw: Literal["uniform", "log-uniform"] = quiet("uniform")

    def whole(self, model: Shape) -> Mamba2Config:
        """Return the config of a model of such layers alone."""
        shared = {name: getattr(model, name) for name in ("d_model", "n_layer", "vocab_size", "norm_eps")}
        shape = {name: getattr(self, name) for name in ("d_state", "d_conv", "expand", "headdim", "ngroups")}
        A_init, log_uniform = (self.A_low, self.A_high), self.A_draw == "log-uniform"
        return Mamba2Config(**shared, **shape, A_init=A_init, A_log_uniform=log_uniform)


@MIXERS.register
class Mamba2(Recurrent):
    """A Mamba-2 layer. `policy` is data: set it, and the next token follows it."""

    name, Config = "mamba2", Mamba2Layer
    examples = ("mamba2:d_state=8,headdim=8,ngroups=2",)
    one_step_a_head = True

    def __init__(self, config: Mamba2Config):
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner + 2 * c.ngroups * c.d_state + c.nheads, bias=c.bias)
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.d_conv, groups=c.conv_dim, bias=c.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(c.nheads))
        self.A_log = nn.Parameter(torch.empty(c.nheads))
        self.D = nn.Parameter(torch.ones(c.nheads))
        self.norm = RMSNorm(c.d_inner, c.norm_eps, c.ngroups)
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.bias)
        self.reset_parameters()

    @classmethod
    def of(cls, config: Mamba2Layer, model: Shape) -> Mamba2:
        return cls(config.whole(model))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c = self.config
        low, high = (math.log(v) for v in c.dt_init)
        dt = torch.empty(c.nheads).uniform_(low, high).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        if c.A_log_uniform:
            self.A_log.uniform_(math.log(c.A_init[0]), math.log(c.A_init[1]))
        else:
            self.A_log.copy_(torch.empty(c.nheads).uniform_(*c.A_init).log())
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight /= math.sqrt(c.n_layer)

    @property
    def A(self) -> Tensor:
        """(H), at least float32: the rate at which each head decays, below 0."""
        refuse_offloaded(self.A_log, "a mixer")
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    @property
    def heads(self) -> int:
        return self.config.nheads

    @property
    def headdim(self) -> int:
        return self.config.headdim

    @property
    def d_state(self) -> int:
        return self.config.d_state

    @property
    def channels(self) -> tuple[int, int]:
        return self.config.conv_dim, self.config.d_conv - 1

    def steps(self, projected: Tensor) -> Tensor:
        """Return dt (B, T, H), after softplus and clamp, from what `in_proj` gives (B, T, ...)."""
        return F.softplus(projected[..., -self.heads :] + self.dt_bias).clamp(*self.config.dt_limit)

    @torch.no_grad()
    def scale_rates(self, factor: Tensor) -> None:
        # at least float32, as a checkpoint keeps it; a new tensor, for the old one may be a mapped file's
        A_log = self.A_log.data.double() + factor.log()
        self.A_log.data = A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, SteppedGates, Rest]:
        c = self.config
        z, xBC, dt = self.in_proj(u).split([c.d_inner, c.conv_dim, c.nheads], -1)  # each (B, T, ·)
        xBC, conv, convolved = self.convolve(self.conv1d, xBC, carry, span)
        x, B, C = xBC.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], -1)
        groups = (c.ngroups, c.d_state)
        inputs = ScanInputs(
            x.unflatten(-1, (c.nheads, c.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups), self.D
        )
        return inputs, SteppedGates(dt, self.A, self.dt_bias, c.dt_limit), Rest(z, conv, convolved)
