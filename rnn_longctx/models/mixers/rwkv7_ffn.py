"""The channel mixing of RWKV-7 (arXiv 2503.14456, section 4): an MLP that sees the token before, too.

    out_t = W_v relu(W_k (u_t + (u_{t-1} - u_t) mu))^2

It mixes tokens, one back, and so stands here as a layer of its own, after one of time mixing: `[rwkv7, rwkv7-ffn]`. Its
first weights are those of flash-linear-attention (0.6), but for W_v, which begins small and not at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import carry as registered
from rnn_longctx.models.conv import shifted
from rnn_longctx.models.interface import LayerShape
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.span import Span


@dataclass(frozen=True)
class RWKV7FFNConfig:
    """The shape of a layer. expand: its width, as a multiple of d_model."""

    expand: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.expand < math.inf:
            raise InputError(f"rwkv7-ffn: expand must be above 0, got {self.expand:g}")

    def width(self, d_model: int) -> int:
        """Return the channels between the two maps of a layer."""
        return max(1, round(self.expand * d_model))


@registered
@dataclass
class LastToken:
    """The carry of a layer that sees the token before: last (B, d_model, 1)."""

    last: Tensor


@MIXERS.register
class RWKV7FFN(nn.Module):
    """A layer of RWKV-7's channel mixing."""

    name: ClassVar[str] = "rwkv7-ffn"
    Config: ClassVar[Any] = RWKV7FFNConfig
    attends: ClassVar[bool] = False

    def __init__(self, config: RWKV7FFNConfig, model: LayerShape):
        super().__init__()
        width = model.d_model
        self.mix = nn.Parameter(torch.empty(width))  # mu
        self.key = nn.Linear(width, config.width(width), bias=False)
        self.value = nn.Linear(config.width(width), width, bias=False)
        with torch.no_grad():
            place = torch.arange(width, device=self.mix.device) / width
            self.mix.copy_(1 - place ** (1 - model.layer / model.n_layer) ** 4)
            nn.init.orthogonal_(self.key.weight)
            self.value.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: RWKV7FFNConfig, model: LayerShape) -> RWKV7FFN:
        return cls(config, model)

    def forward(self, u: Tensor, carry: LastToken | None, span: Span) -> tuple[Tensor, LastToken]:
        """Read u (B, T, d_model): see `Mixer`. Raises InputError where a stream is spread over several ranks."""
        if span.shard is not None:
            raise InputError("rwkv7-ffn does not read one stream over several ranks")
        if span.mask is not None:
            u = u * span.mask[..., None]
        before, last = shifted(u, None if carry is None else carry.last, span.reset)
        return self.value(F.relu(self.key(u + (before - u) * self.mix)).square()), LastToken(last)

    def new_carry(self, rows: int) -> LastToken:
        """Return zeros, which None stands for: float32, or float64 in a float64 model."""
        dtype = torch.promote_types(self.mix.dtype, torch.float32)
        return LastToken(torch.zeros(rows, len(self.mix), 1, dtype=dtype, device=self.mix.device))

    def state_size(self) -> StateSize:
        return StateSize({"conv": len(self.mix)})
