"""Gated linear attention (arXiv 2312.06635): every channel of a key forgets at a pace of its own, which the text sets.

    S_t = S_{t-1} diag(a_t) + v_t k_t^T        a_t = sigmoid(low-rank map of u_t)^(1 / TEMPERATURE), one a key channel
    y_t = S_t q_t / sqrt(d_k)                  out_t = W_o (RMSNorm_head(y_t) * silu(W_g u_t))

Section 4.4 of the paper; no short convolution. In the scan's words x are the values, B the keys, C the queries. Decays
begin at about 0.5^(1 / TEMPERATURE) = 0.958, as those of flash-linear-attention 0.6: small weights, a bias of 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import HeadNormed, split_heads
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.span import Span

TEMPERATURE = 16.0  # tau of the paper: decays begin near 1
DECAY_STD = 0.02  # of the weights that make the decays, at first


@dataclass(frozen=True)
class GLAConfig:
    """The shape of a layer.

    Attributes:
        expand_k, expand_v: widths of all keys and of all values together, as multiples of d_model.
        rank: of the map that makes the decays.
    """

    heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    rank: int = 16

    def __post_init__(self) -> None:
        if self.heads < 1 or self.rank < 1:
            raise InputError(f"gla: heads and rank are at least 1, got {self.heads} and {self.rank}")


@MIXERS.register
class GLA(HeadNormed):
    """A layer of gated linear attention."""

    name, Config = "gla", GLAConfig
    examples = ("gla:heads=2",)
    per_channel, stepped = True, False

    def __init__(self, config: GLAConfig, model: Shape):
        super().__init__()
        self.config, c, d_model = config, config, model.d_model
        self.sizes = tuple(split_heads(expand * d_model, c.heads, "gla") for expand in (c.expand_k, c.expand_v))
        keys, values = (size * c.heads for size in self.sizes)
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.g_proj = nn.Linear(d_model, values, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(d_model, c.rank, bias=False), nn.Linear(c.rank, keys))
        self.norm = RMSNorm(self.headdim, model.norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        with torch.no_grad():
            for name, p in self.decay_proj.named_parameters():
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=DECAY_STD)
            self.out_proj.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: GLAConfig, model: Shape) -> GLA:
        return cls(config, model)

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, Gates, Rest]:
        q, k, v, decay = (
            proj(u).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj, self.decay_proj)
        )  # each (B, T, H, ·)
        wide = torch.promote_types(decay.dtype, torch.float32)
        log_decay = F.logsigmoid(decay.to(wide)) / TEMPERATURE  # (B, T, H, N)
        gates = Gates(log_decay, log_decay.new_ones(log_decay.shape[:3]))
        return ScanInputs(v, k, q * self.d_state**-0.5), gates, Rest(self.g_proj(u))
