"""Gated DeltaNet (arXiv 2412.06464): a state decays, and what a key held is erased before its new value is written.

    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T          a_t = exp(-A softplus(W_a u_t + dt_bias))
    y_t = S_t q_t / sqrt(d_k)                 out_t = W_o (RMSNorm_head(y_t) * silu(W_g u_t))

Section 3.4 of the paper; one decay a head. Several heads of values may share queries and keys, as in Qwen3-Next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.delta import Rated, Rates, Sizes, kernels
from rnn_longctx.spec import quiet


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """The shape of a layer, and where its decays begin (`rnn_longctx.models.mixers.delta.Rates`).

    Attributes:
        heads, head_dim: of queries and keys; fla's models have heads * head_dim = 0.75 d_model.
        expand_v: the width of a value, as a multiple of head_dim.
        v_heads: heads of values, a multiple of heads; 0: as many.
        neg_eigval: whether beta reaches 2, not 1 (arXiv 2411.12537).
    """

    heads: int = 4
    head_dim: int = 64
    expand_v: float = 2.0
    v_heads: int = quiet(0)
    d_conv: int = quiet(4)
    neg_eigval: bool = quiet(False)
    A_min: float = quiet(0.0)
    A_max: float = quiet(16.0)
    A_log_uniform: bool = quiet(False)
    dt_min: float = quiet(1e-3)
    dt_max: float = quiet(1e-1)


@MIXERS.register
class GatedDeltaNet(Rated):
    """A layer of Gated DeltaNet."""

    name, Config = "gated-deltanet", GatedDeltaNetConfig
    examples = ("gated-deltanet:heads=2,head_dim=8", "gated-deltanet:heads=2,head_dim=8,expand_v=0.5,v_heads=4")

    def __init__(self, config: GatedDeltaNetConfig, model: Shape):
        rates = Rates.of(config, self.name)
        heads = config.v_heads or config.heads
        super().__init__(
            model,
            Sizes(config.heads, config.head_dim, heads, config.expand_v * config.head_dim),
            config.d_conv,
            config.neg_eigval,
        )
        self.config = config
        self.a_proj = nn.Linear(model.d_model, heads, bias=False)
        self.g_proj = nn.Linear(model.d_model, heads * self.headdim, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.begin()
        rates.begin(self.A_log, self.dt_bias)

    @classmethod
    def of(cls, config: GatedDeltaNetConfig, model: Shape) -> GatedDeltaNet:
        return cls(config, model)

    def log_decay(self, u: Tensor) -> Tensor:
        return self.rates * self.steps(self.a_proj(u))

    def gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fuses_gates(u, self.a_proj, self.b_proj):
            return super().gates(u)
        weights = self.b_proj.weight, self.most, self.a_proj.weight
        beta, log_decay = kernels().head_gates(u, *weights, *self.decay_weights)
        return log_decay, beta

    def gate(self, u: Tensor) -> Tensor:
        return self.g_proj(u)
