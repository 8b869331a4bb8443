"""Recurrences that take heads of a transformers layer over, by the usual mapping of weights (The Mamba in the Llama,
arXiv 2408.15237; SUPRA, 2405.06640; LoLCATs, 2410.10254): values are x, keys B, queries C.

    mamba2            S_t = exp(-A dt_t) S_{t-1} + dt_t v_t k_t^T         dt_t = softplus(W_dt u_t + dt_bias)
    gated-deltanet    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T     k, q of length 1
    both              y_t = S_t q_t / sqrt(D),   a head's output is norm(y_t) before the layer's own output projection

A short convolution over q, k and v begins as the token itself alone, so that what was taken over is what is read at
first. Queries and keys are not turned by their positions: decays and the convolution say where a token stands. Heads
that shared keys and values share them still. The norm takes the place of the softmax's denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.conv import linear_conv, unadapted
from rnn_longctx.models.ids import refuse_offloaded
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.models.norm import RMSNorm, unit
from rnn_longctx.models.retrofit.heads import Heads, OfHeads
from rnn_longctx.recurrence.delta import DELTA
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.span import Span

LENGTH_EPS = 1e-6  # under the root of a query's and a key's squared length
A_MIN, A_MAX, DT_MIN, DT_MAX = 1.0, 16.0, 1e-3, 1e-1  # where decays begin, as Mamba-2's do
STD = 0.02  # of new maps, at first


@dataclass(frozen=True)
class RecurrentConfig:
    """d_conv: taps of the convolution."""

    d_conv: int = 4

    def __post_init__(self) -> None:
        if self.d_conv < 1:
            raise InputError(f"expected a convolution of at least 1 tap, got d_conv = {self.d_conv}")


class RecurrentPart(OfHeads, Recurrent):
    """A recurrence over heads of a layer. Its output is not projected."""

    def __init__(self, config: RecurrentConfig, heads: Heads):
        super().__init__()
        self.config = config
        self.take(heads)
        number, size = len(heads.queries), heads.head_dim
        channels = (number + 2 * self.kv_heads) * size
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=False)
        self.dt_proj = nn.Linear(heads.d_model, number, bias=False)
        self.A_log = nn.Parameter(torch.empty(number).uniform_(A_MIN, A_MAX).log())
        dt = torch.empty(number).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.norm = RMSNorm(size, heads.norm_eps)
        self.out_proj: Any = nn.Identity()
        with torch.no_grad():
            self.conv1d.weight.zero_()
            self.conv1d.weight[:, :, -1] = 1
            nn.init.normal_(self.dt_proj.weight, std=STD)

    @torch.no_grad()
    def keep_wide(self) -> None:
        """Keep A_log, D and dt_bias at least float32, as a 16-bit model of this library's own does."""
        for name in ("A_log", "D", "dt_bias"):
            if (p := getattr(self, name, None)) is not None:
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    @property
    def heads(self) -> int:
        return len(self.of_heads.queries)

    @property
    def headdim(self) -> int:
        return self.of_heads.head_dim

    @property
    def d_state(self) -> int:
        return self.of_heads.head_dim

    @property
    def channels(self) -> tuple[int, int]:
        return self.conv1d.in_channels, self.config.d_conv - 1

    @property
    def A(self) -> Tensor:
        return -refuse_offloaded(self.A_log, "a mixer").to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    @torch.no_grad()
    def scale_rates(self, factor: Tensor) -> None:
        # at least float32, as a checkpoint keeps it; a new tensor, for the old one may be a mapped file's
        A_log = self.A_log.data.double() + factor.log()
        self.A_log.data = A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))

    def convolved(self, carry: Carry | None, span: Span) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k and v (B, T, H, D) of all heads, the inputs to go on from, and what was read."""
        q, k, v = self.shared(span)
        qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
        if span.mask is not None:
            qkv = qkv * span.mask[..., None]
        unadapted(self.conv1d)
        before = None if carry is None else carry.conv
        y, after = linear_conv(qkv, self.conv1d.weight, None, before, span.reset)
        heads = y.unflatten(-1, (-1, self.headdim)).split([self.heads, self.kv_heads, self.kv_heads], 2)
        return heads[0], self.by_head(heads[1], 2), self.by_head(heads[2], 2), after, qkv

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        return self.norm(y).flatten(-2)

    def output_gate(self, rest: Rest) -> None:
        """No scan applies a norm that is over a head."""


class Mamba2Part(RecurrentPart):
    """Mamba-2's recurrence over heads of a layer."""

    name = "mamba2"
    one_step_a_head = False

    def __init__(self, config: RecurrentConfig, heads: Heads):
        super().__init__(config, heads)
        self.D = nn.Parameter(torch.zeros(self.heads))

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, SteppedGates, Rest]:
        q, k, v, conv, convolved = self.convolved(carry, span)
        scan_inputs = ScanInputs(v, k, q * self.d_state**-0.5, self.D)
        return scan_inputs, SteppedGates(self.dt_proj(u), self.A, self.dt_bias), Rest(None, conv, convolved)


class GatedDeltaPart(RecurrentPart):
    """Gated DeltaNet's recurrence over heads of a layer."""

    name = "gated-deltanet"
    recurrence = DELTA
    stepped = False

    def __init__(self, config: RecurrentConfig, heads: Heads):
        super().__init__(config, heads)
        self.b_proj = nn.Linear(heads.d_model, self.heads, bias=False)
        nn.init.normal_(self.b_proj.weight, std=STD)

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, DeltaGates, Rest]:
        q, k, v, conv, convolved = self.convolved(carry, span)
        q, k = unit(q, LENGTH_EPS), unit(k, LENGTH_EPS)
        wide = torch.promote_types(u.dtype, torch.float32)
        log_decay = self.A * F.softplus(self.dt_proj(u).to(wide) + self.dt_bias)
        beta = self.b_proj(u).to(wide).sigmoid()
        return ScanInputs(v, k, q * self.d_state**-0.5), DeltaGates(log_decay, beta), Rest(None, conv, convolved)
