"""What layers of the delta rule share: queries and keys of length 1 from short convolutions, gates, the norm behind.

    q, k, v = silu(conv(W u))                 each its own convolution; q / ||q|| / sqrt(N), k / ||k||
    beta_t = sigmoid(W_b u_t), or twice that  of each head: how much of a key is erased and written
    out_t = W_o (RMSNorm_head(y_t) * gate_t)

In the scan's words v are x, k are B, q are C. Weights begin as those of flash-linear-attention (fla) 0.6: normal with a
deviation of 0.02, steps log-uniform, and where a layer decays at a rate A, that one uniform in a range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.conv import unadapted
from rnn_longctx.models.ids import refuse_offloaded
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.models.norm import RMSNorm, unit
from rnn_longctx.models.products import bare, side_by_side
from rnn_longctx.recurrence.delta import DELTA
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.span import Span

LENGTH_EPS = 1e-6  # under the root of a query's and a key's squared length, as in fla
STD = 0.02  # of weights, at first
LARGEST = 1e6  # of a rate or a step, at first


@dataclass(frozen=True)
class Rates:
    """The ranges that the decays of a layer begin in: A uniform, or log-uniform, in [A_min, A_max], and steps
    log-uniform in [dt_min, dt_max]."""

    A_min: float
    A_max: float
    A_log_uniform: bool
    dt_min: float
    dt_max: float

    @classmethod
    def of(cls, config: Any, name: str) -> Rates:
        """Return the ranges in the config of a mixer called `name`. Raises InputError for one that is none."""
        rates = cls(**{f.name: getattr(config, f.name) for f in fields(cls)})
        for what, low, high in (("A", rates.A_min, rates.A_max), ("dt", rates.dt_min, rates.dt_max)):
            lowest = low >= 0 if what == "A" and not rates.A_log_uniform else low > 0
            if not (lowest and low <= high and 0 < high <= LARGEST):
                raise InputError(
                    f"{name}: expected a range above 0, {what}_min at most {what}_max, got {low:g} to {high:g}"
                )
        return rates

    @torch.no_grad()
    def begin(self, A_log: Tensor, dt_bias: Tensor) -> None:
        """Draw both, of any shapes."""
        if self.A_log_uniform:
            A_log.uniform_(math.log(self.A_min), math.log(self.A_max))
        else:
            A_log.uniform_(self.A_min, self.A_max).clamp_(min=torch.finfo(A_log.dtype).tiny).log_()
        dt = torch.empty_like(dt_bias).uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp()
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


@dataclass(frozen=True)
class Sizes:
    """How many queries and keys a token has, how wide they are; how many values, each with a state of its own, and how
    wide. `heads / key_heads` values share a key."""

    key_heads: int
    d_state: int
    heads: int
    headdim: float  # a whole number, or `check` says so

    def check(self, name: str) -> Sizes:
        """Return these sizes. name: of the mixer, for errors. Raises InputError for what is no shape of a layer."""
        for what, count in (("heads", self.key_heads), ("head_dim", self.d_state)):
            if count < 1:
                raise InputError(f"{name}: {what} must be at least 1, got {count}")
        if self.heads < self.key_heads or self.heads % self.key_heads:
            raise InputError(f"{name}: v_heads must be a multiple of heads = {self.key_heads}, got {self.heads}")
        if self.headdim != int(self.headdim) or self.headdim < 1:
            raise InputError(f"{name}: expand_v * head_dim must be a whole number, got {self.headdim:g}")
        return self


class DeltaMixer(Recurrent):
    """A layer of the delta rule: a subclass makes its gates and what gates its output.

    Args:
        d_conv: taps of the convolutions.
        twice: whether beta reaches 2, where the part of a state along a key changes its sign (arXiv 2411.12537).
    """

    recurrence = DELTA
    stepped = False
    squash: ClassVar[Literal["silu", "sigmoid"]] = "silu"  # of what gates the output

    def __init__(self, model: Shape, sizes: Sizes, d_conv: int, twice: bool):
        super().__init__()
        if d_conv < 1:
            raise InputError(f"{self.name}: d_conv must be at least 1, got {d_conv}")
        self.sizes, self.twice = sizes.check(self.name), twice
        keys, values = sizes.key_heads * sizes.d_state, sizes.heads * self.headdim
        self.q_proj = nn.Linear(model.d_model, keys, bias=False)
        self.k_proj = nn.Linear(model.d_model, keys, bias=False)
        self.v_proj = nn.Linear(model.d_model, values, bias=False)
        self.conv1d = nn.Conv1d(2 * keys + values, 2 * keys + values, d_conv, groups=2 * keys + values, bias=False)
        self.b_proj = nn.Linear(model.d_model, sizes.heads, bias=False)
        self.norm = RMSNorm(self.headdim, model.norm_eps)
        self.out_proj = nn.Linear(values, model.d_model, bias=False)

    @torch.no_grad()
    def begin(self) -> None:
        """Draw the weights of all matrices and convolutions; biases begin at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.normal_(module.weight, std=STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def heads(self) -> int:
        return self.sizes.heads

    @property
    def headdim(self) -> int:
        return int(self.sizes.headdim)

    @property
    def d_state(self) -> int:
        return self.sizes.d_state

    @property
    def channels(self) -> tuple[int, int]:
        return self.conv1d.in_channels, self.conv1d.kernel_size[0] - 1

    def log_decay(self, u: Tensor) -> Tensor:
        """Return (B, T, H), or (B, T, H, N), of u (B, T, d_model), at least float32."""
        raise NotImplementedError

    def gate(self, u: Tensor) -> Tensor | None:
        """Return what gates the output, (B, T, H * P), before `squash`; None: nothing does."""
        raise NotImplementedError

    def beta(self, u: Tensor) -> Tensor:
        """Return (B, T, H), at least float32: how much of its key a token erases and writes."""
        if self.fuses_gates(u, self.b_proj):
            return kernels().head_gates(u, self.b_proj.weight, self.most)[0]
        b = self.b_proj(u)
        return b.to(wide(b)).sigmoid() * self.most

    @property
    def most(self) -> float:
        """What beta stays below."""
        return 2.0 if self.twice else 1.0

    def gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-decays and beta of u."""
        return self.log_decay(u), self.beta(u)

    def fuses_gates(self, u: Tensor, *maps: nn.Linear) -> bool:
        """Return whether a kernel makes the gates of all heads from u and the weights of these maps."""
        return choose.fuses_layers(u) and self.heads <= kernels().MOST_HEADS and all(bare(linear, u) for linear in maps)

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, DeltaGates, Rest]:
        qkv = side_by_side(u, (self.q_proj, self.k_proj, self.v_proj))
        inputs, conv, convolved = self.convolved_heads(qkv, carry, span)
        return inputs, DeltaGates(*self.gates(u)), Rest(self.gate(u), conv, convolved)

    def convolved_heads(self, qkv: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, Tensor, Tensor]:
        """Return what the scan reads of qkv (B, T, channels), the inputs to go on from, and what the convolution read:
        see `convolve`."""
        conv, sizes = self.conv1d, self.sizes
        whole = span.mask is None and span.reset is None and span.shard is None
        if whole and conv.bias is None and conv.kernel_size[0] <= 4 and choose.fuses_layers(qkv):
            unadapted(conv)
            before = None if carry is None else carry.conv
            q, k, v, after = kernels().conv_heads(
                qkv, conv.weight, before, sizes.key_heads, sizes.d_state, self.headdim, LENGTH_EPS
            )
            return ScanInputs(v, k, q), after, qkv
        keys = sizes.key_heads * sizes.d_state
        convolved, after, qkv = self.convolve(conv, qkv, carry, span)
        q, k, v = convolved.split([keys, keys, qkv.shape[-1] - 2 * keys], -1)
        q, k = (unit(t.unflatten(-1, (-1, self.d_state)), LENGTH_EPS) for t in (q, k))  # (B, T, G, N)
        return ScanInputs(v.unflatten(-1, (self.heads, -1)), k, q * self.d_state**-0.5), after, qkv

    def output_gate(self, rest: Rest) -> None:
        """No scan applies a norm that is over a head and comes before the gate."""

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        return self.out_proj(self.norm(y).flatten(-2) if rest.z is None else self.norm.gated(y, rest.z, self.squash))


class Rated(DeltaMixer):
    """A layer of the delta rule whose log-decays are A times a step, softplus(f_t + dt_bias), A one number a head."""

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    @property
    def rates(self) -> Tensor:
        """(H), at least float32, below 0."""
        A_log, _ = self.decay_weights
        return -A_log.to(wide(A_log)).exp()

    @property
    def decay_weights(self) -> tuple[Tensor, Tensor]:
        """A_log and dt_bias, held on this device or refused."""
        return refuse_offloaded(self.A_log, "a mixer"), refuse_offloaded(self.dt_bias, "a mixer")

    @property
    def A(self) -> Tensor | None:
        return self.rates

    def steps(self, f: Tensor) -> Tensor:
        """Return the steps, at least float32, of what the layer's map gives for them, (..., as `dt_bias`)."""
        return F.softplus(f.to(wide(f)) + self.dt_bias)

    @torch.no_grad()
    def scale_rates(self, factor: Tensor) -> None:
        # at least float32, as a checkpoint keeps it; a new tensor, for the old one may be a mapped file's
        self.A_log.data = (self.A_log.data.double() + factor.log()).to(wide(self.A_log))


class ChannelRated(Rated):
    """Such a layer with steps of every channel of a key, f_t a low-rank map, and an output gated by the sigmoid of
    another: those of Kimi Delta Attention, with fla's rank, the width of a value."""

    per_channel = True
    squash = "sigmoid"
    lower_bound = 0.0  # of the log-decays; 0: there is none

    def __init__(self, model: Shape, sizes: Sizes, d_conv: int, twice: bool):
        super().__init__(model, sizes, d_conv, twice)
        width, rank, channels = model.d_model, self.headdim, self.heads * self.d_state
        self.f_proj = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, channels, bias=False))
        self.g_proj = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, self.heads * rank))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(channels))

    def log_decay(self, u: Tensor) -> Tensor:
        f = self.f_proj(u)
        if choose.fuses_layers(f):
            return kernels().channel_decays(f, *self.decay_weights, self.lower_bound)
        return self.channel_decays(f)

    def channel_decays(self, f: Tensor) -> Tensor:
        """Return the log-decays (B, T, H, N) of what the layer's map gives for them, (B, T, H * N)."""
        return self.rates[:, None] * self.steps(f).unflatten(-1, (self.heads, -1))

    def gate(self, u: Tensor) -> Tensor:
        return self.g_proj(u)


def kernels() -> Any:
    """Return the module of the kernels before the scan, which imports Triton."""
    from rnn_longctx.models.kernels import delta_inputs

    return delta_inputs


def wide(x: Tensor) -> torch.dtype:
    """Return the type of x, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
