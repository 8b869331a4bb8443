"""Gated DeltaNet-2: Kimi Delta Attention that erases and writes by gates of their own, one a channel.

    S_t = S_{t-1} diag(a_t) (I - (b_t k_t) k_t^T) + (w_t v_t) k_t^T
    b_t, w_t = sigmoid(W_b u_t), sigmoid(W_w u_t), one a channel of the key and one a channel of the value
    a_t, y_t, out_t as in `rnn_longctx.models.mixers.kda`

What is read of the state, along b_t k_t, is erased along k_t. Where both gates are one number a head, it is KDA. The
layer is that of flash-linear-attention 0.6 with as many heads of values as of keys: there, more share all but the norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rnn_longctx.models.carries import Carry
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.delta import ChannelRated, Rates, Sizes, wide
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.span import Span
from rnn_longctx.spec import quiet


@dataclass(frozen=True)
class GDN2Config:
    """The shape of a layer, and where its decays begin (`rnn_longctx.models.mixers.delta.Rates`).

    Attributes:
        heads, head_dim: of queries and keys.
        expand_v: the width of a value, as a multiple of head_dim.
        neg_eigval: whether what is erased reaches 2, not 1 (arXiv 2411.12537).
    """

    heads: int = 4
    head_dim: int = 64
    expand_v: float = 1.0
    d_conv: int = quiet(4)
    neg_eigval: bool = quiet(False)
    A_min: float = quiet(1.0)
    A_max: float = quiet(16.0)
    A_log_uniform: bool = quiet(False)
    dt_min: float = quiet(1e-3)
    dt_max: float = quiet(1e-1)


@MIXERS.register
class GDN2(ChannelRated):
    """A layer of Gated DeltaNet-2."""

    name, Config = "gdn2", GDN2Config
    examples = ("gdn2:heads=2,head_dim=8,expand_v=0.5",)
    simple = False

    def __init__(self, config: GDN2Config, model: Shape):
        rates = Rates.of(config, self.name)
        sizes = Sizes(config.heads, config.head_dim, config.heads, config.expand_v * config.head_dim)
        super().__init__(model, sizes, config.d_conv, config.neg_eigval)
        self.config = config
        self.b_proj = nn.Linear(model.d_model, self.heads * self.d_state, bias=False)
        self.w_proj = nn.Linear(model.d_model, self.heads * self.headdim, bias=False)
        self.begin()
        rates.begin(self.A_log, self.dt_bias)

    @classmethod
    def of(cls, config: GDN2Config, model: Shape) -> GDN2:
        return cls(config, model)

    def beta(self, u: Tensor) -> Tensor:
        """Return ones (B, T, H): how much is erased and written is in what is read and in the values."""
        return torch.ones(*u.shape[:2], self.heads, dtype=wide(u), device=u.device)

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, DeltaGates, Rest]:
        inputs, gates, rest = super().inputs(u, carry, span)
        b, w = (proj(u).sigmoid().unflatten(-1, (self.heads, -1)) for proj in (self.b_proj, self.w_proj))
        read = inputs.B * b * (2.0 if self.twice else 1.0)
        return replace(inputs, x=inputs.x * w), replace(gates, read=read), rest
