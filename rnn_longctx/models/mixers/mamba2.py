"""Mamba-2 (arXiv 2405.21060), with the parameter names of the official checkpoints. Remedies change its `policy`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Carry
from rnn_longctx.models.conv import causal_conv
from rnn_longctx.models.deferred import DeferredNorm
from rnn_longctx.models.ids import refuse_offloaded
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.recurrence.gates import ScanInputs, SteppedGates
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.shard import Shard
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd.scan import scan
from rnn_longctx.recurrence.statistics import Observer

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
    """Shape of a model and how to initialise one. Names follow mamba-ssm.

    A_init and A_log_uniform: range that -A is drawn from; dt_init: range of the initial step, log-uniform.
    """

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

    @property
    def scan_state_elements(self) -> int:
        return self.n_layer * self.nheads * self.headdim * self.d_state

    @property
    def conv_state_elements(self) -> int:
        return self.n_layer * self.conv_dim * (self.d_conv - 1)


class Mamba2(nn.Module):
    """One mixer. `policy` is data: set it, and the next token follows it. `observer`, `state_dtype`: see `scan`."""

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
        self.policy: ScanPolicy = PLAIN
        self.backend: str | None = None
        self.observer: Observer | None = None
        self.state_dtype: torch.dtype | None = None
        self.reset_parameters()

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

    def steps(self, projected: Tensor) -> Tensor:
        """dt (B, T, H), after softplus and clamp, from what `in_proj` gives (B, T, ...)."""
        return F.softplus(projected[..., -self.heads :] + self.dt_bias).clamp(*self.config.dt_limit)

    def forward(self, u: Tensor, carry: Carry | None, mask: Tensor | None, reset: Tensor | None,
                unscaled: bool = False,
                shard: Shard | None = None) -> tuple[Tensor | DeferredNorm, Carry]:  # fmt: skip
        """(B, T, d_model) in and out, with the carry after it. unscaled: where the scan can apply the norm, its factor
        a token may be left to the sum that comes next, which saves a pass over memory. shard: of the stream, where it
        is spread over several ranks; the carries are then those before and after all of it."""
        c = self.config
        z, xBC, dt = self.in_proj(u).split([c.d_inner, c.conv_dim, c.nheads], -1)
        if mask is not None:
            xBC = xBC * mask[..., None]
        edge = carry.conv if carry else None
        if shard is not None:
            edge, last = shard.edges(xBC, c.d_conv - 1, edge, reset)
        xBC, conv = causal_conv(xBC, self.conv1d, edge, reset)
        x, B, C = xBC.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], -1)
        groups = (c.ngroups, c.d_state)
        # a factor a token may be applied after the last product, unless a hook sees or edits what is before or behind
        last_product = self.out_proj
        linear = last_product.bias is None and not (last_product._forward_hooks or last_product._forward_pre_hooks)
        gate = self.norm.gate(z.unflatten(-1, (c.nheads, c.headdim))) if unscaled and linear else None
        conv = conv if shard is None else last
        inputs = ScanInputs(
            x.unflatten(-1, (c.nheads, c.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups), self.D
        )
        y, scanned = scan(
            inputs, SteppedGates(dt, self.A, self.dt_bias, c.dt_limit), Span(mask, reset, shard), policy=self.policy,
            carry=carry.scan if carry else None, backend=self.backend, observer=self.observer, output_gate=gate,
            state_dtype=self.state_dtype,
        )  # fmt: skip
        if gate is not None and gate.squares is not None:
            out = DeferredNorm(self.out_proj(y.flatten(-2)), gate.squares, c.d_inner, self.norm.eps)
            return out, Carry(conv, scanned)
        return self.out_proj(self.norm(y.flatten(-2), z)), Carry(conv, scanned)
