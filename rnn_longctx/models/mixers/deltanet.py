"""DeltaNet (arXiv 2406.06484): what a key held is erased before its new value is written, and nothing else fades.

    S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    y_t = S_t q_t / sqrt(d_k)                 out_t = W_o RMSNorm_head(y_t), times silu(W_g u_t) where it is gated

Sections 2.2 and 3.4 of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import split_heads
from rnn_longctx.models.mixers.delta import DeltaMixer, Sizes, wide
from rnn_longctx.spec import quiet


@dataclass(frozen=True)
class DeltaNetConfig:
    """The shape of a layer.

    Attributes:
        expand_k, expand_v: widths of all keys and of all values together, as multiples of d_model.
        gated: whether the output is gated.
        neg_eigval: whether beta reaches 2, not 1 (arXiv 2411.12537).
    """

    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    gated: bool = quiet(False)
    d_conv: int = quiet(4)
    neg_eigval: bool = quiet(False)

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise InputError(f"deltanet: expected at least 1 head, got {self.heads}")


@MIXERS.register
class DeltaNet(DeltaMixer):
    """A layer of DeltaNet."""

    name, Config = "deltanet", DeltaNetConfig
    examples = ("deltanet:heads=2,gated=true", "deltanet:heads=2,expand_k=0.5,neg_eigval=true")

    def __init__(self, config: DeltaNetConfig, model: Shape):
        key, value = (
            split_heads(expand * model.d_model, config.heads, self.name)
            for expand in (config.expand_k, config.expand_v)
        )
        super().__init__(model, Sizes(config.heads, key, config.heads, value), config.d_conv, config.neg_eigval)
        self.config = config
        self.g_proj = nn.Linear(model.d_model, config.heads * value, bias=False) if config.gated else None
        self.begin()

    @classmethod
    def of(cls, config: DeltaNetConfig, model: Shape) -> DeltaNet:
        return cls(config, model)

    @property
    def no_rates(self) -> str:
        return "has no decay"

    def log_decay(self, u: Tensor) -> Tensor:
        return torch.zeros(*u.shape[:2], self.heads, dtype=wide(u), device=u.device)

    def gate(self, u: Tensor) -> Tensor | None:
        return None if self.g_proj is None else self.g_proj(u)
