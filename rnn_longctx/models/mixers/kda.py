"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): Gated DeltaNet with a decay for every channel of a key.

    S_t = S_{t-1} diag(a_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T    a_t = exp(-A softplus(f_t + dt_bias))
    y_t = S_t q_t / sqrt(d_k)                 out_t = W_o (RMSNorm_head(y_t) * sigmoid(g_t))

Section 3 of the paper; f and g are low-rank maps of u, and A is one number a head. With a lower bound, below 0, the
log-decays are bound * sigmoid(A (f_t + dt_bias)), as in flash-linear-attention, whose rank this is, too: the width of a
value.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.delta import ChannelRated, Rates, Sizes
from rnn_longctx.spec import quiet


@dataclass(frozen=True)
class KDAConfig:
    """The shape of a layer, and where its decays begin (`rnn_longctx.models.mixers.delta.Rates`).

    Attributes:
        heads, head_dim: of queries and keys; fla's models have heads * head_dim = d_model.
        expand_v: the width of a value, as a multiple of head_dim.
        v_heads: heads of values, a multiple of heads; 0: as many.
        neg_eigval: whether beta reaches 2, not 1 (arXiv 2411.12537).
        lower_bound: of the log-decays; 0: there is none. With one, A begins at 1.
    """

    heads: int = 4
    head_dim: int = 64
    expand_v: float = 1.0
    v_heads: int = quiet(0)
    d_conv: int = quiet(4)
    neg_eigval: bool = quiet(False)
    lower_bound: float = quiet(0.0)
    A_min: float = quiet(1.0)
    A_max: float = quiet(16.0)
    A_log_uniform: bool = quiet(False)
    dt_min: float = quiet(1e-3)
    dt_max: float = quiet(1e-1)


@MIXERS.register
class KDA(ChannelRated):
    """A layer of Kimi Delta Attention."""

    name, Config = "kda", KDAConfig
    examples = ("kda:heads=2,head_dim=8", "kda:heads=1,head_dim=8,v_heads=2,lower_bound=-5")

    def __init__(self, config: KDAConfig, model: Shape):
        if not -100 <= config.lower_bound <= 0:
            raise InputError(
                f"kda: lower_bound must be below 0 (-5 is usual), or 0 for none, got {config.lower_bound:g}"
            )
        rates = Rates.of(config, self.name)
        heads = config.v_heads or config.heads
        super().__init__(
            model,
            Sizes(config.heads, config.head_dim, heads, config.expand_v * config.head_dim),
            config.d_conv,
            config.neg_eigval,
        )
        self.config = config
        self.lower_bound, self.bounded = config.lower_bound, config.lower_bound < 0
        self.begin()
        rates.begin(self.A_log, self.dt_bias)
        if config.lower_bound:
            nn.init.zeros_(self.A_log)

    @classmethod
    def of(cls, config: KDAConfig, model: Shape) -> KDA:
        return cls(config, model)

    @property
    def A(self) -> Tensor | None:
        """(H); None with a lower bound, where a factor on A is none on the log-decays."""
        return None if self.config.lower_bound else self.rates

    @property
    def no_rates(self) -> str:
        return "bounds its log-decays by a sigmoid" if self.config.lower_bound else super().no_rates

    def scale_rates(self, factor: Tensor) -> None:
        if self.config.lower_bound:
            self.refuse_rates()
        super().scale_rates(factor)

    def channel_decays(self, f: Tensor) -> Tensor:
        if not self.lower_bound:
            return super().channel_decays(f)
        f = (f + self.dt_bias).unflatten(-1, (self.heads, -1))
        return self.lower_bound * (-self.rates[:, None] * f).sigmoid()
