"""Multi-scale retention, the layer of RetNet (arXiv 2307.08621): every head forgets at a fixed pace of its own.

    S_t = a_h S_{t-1} + v_t k_t^T              a_h = 1 - 2^(-5 - h), h = 0, 1, ...
    y_t = S_t q_t / sqrt(d_k)                  out_t = W_o (RMSNorm_head(y_t) * silu(W_g u_t))

Queries and keys are turned by their positions (section 2.1, equation 3), which the carry counts. The norm is an RMSNorm
over a head, as in flash-linear-attention, where the paper has a GroupNorm. In the scan's words x are the values, B the
keys, C the queries. No weight makes the decays, so none is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import HeadNormed, places_of, split_heads
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.models.rotary import turned
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.span import Span


@dataclass(frozen=True)
class RetNetConfig:
    """The shape of a layer.

    Attributes:
        expand_k, expand_v: widths of all keys and of all values together, as multiples of d_model.
    """

    heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise InputError(f"retnet: expected at least 1 head, got {self.heads}")


@MIXERS.register
class RetNet(HeadNormed):
    """A layer of retention."""

    name, Config = "retnet", RetNetConfig
    examples = ("retnet:heads=2",)
    stepped = False

    def __init__(self, config: RetNetConfig, model: Shape):
        super().__init__()
        self.config, c, d_model = config, config, model.d_model
        self.sizes = tuple(split_heads(expand * d_model, c.heads, "retnet") for expand in (c.expand_k, c.expand_v))
        if self.d_state % 2:
            raise InputError(f"retnet: positions turn pairs of a key's channels, and a head has {self.d_state}")
        keys, values = (size * c.heads for size in self.sizes)
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.g_proj = nn.Linear(d_model, values, bias=False)
        self.norm = RMSNorm(self.headdim, model.norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: RetNetConfig, model: Shape) -> RetNet:
        return cls(config, model)

    @property
    def no_rates(self) -> str:
        return "has decays that are fixed"

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, Gates, Rest]:
        q, k, v = (proj(u).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        places = places_of(u, carry, span)
        q, k = turned(q, places), turned(k, places)  # (B, T, H, N)
        wide = torch.promote_types(u.dtype, torch.float32)
        log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(self.heads, dtype=wide, device=u.device))))  # (H)
        log_decay = log_decay.expand(*u.shape[:2], -1)
        gates = Gates(log_decay, torch.ones_like(log_decay))
        return ScanInputs(v, k, q * self.d_state**-0.5), gates, Rest(self.g_proj(u))
