"""HGRN2 (arXiv 2404.07904): a forget gate a channel, whose complement is the key.

    S_t = S_{t-1} diag(f_t) + i_t (1 - f_t)^T  f_t = b + (1 - b) sigmoid(W_f u_t), one a key channel
    y_t = S_t silu(W_q u_t) / sqrt(d_k)        out_t = W_o RMSNorm(y_t)

i_t = W_i u_t are the values (x of the scan), 1 - f_t the keys (B), a head's keys as wide as its values: the expansion
of the paper is the width of a head. The lower bound b of the gates lets later layers remember for longer. The paper
makes it of all layers together, b_l = s_1 + ... + s_l of a softmax s over the layers. Here every layer but the first
has its own, sigmoid(bound), which begins where theirs does, at l / n_layer; in training bounds may leave that order.
The factor 1 / sqrt(d_k) and W_f, small at first, are flash-linear-attention's (0.6), whose layers this equals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.interface import LayerShape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent, split_heads
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.span import Span

NORM_EPS = 1e-5  # of the output's norm, whatever the model's is: as in flash-linear-attention
DECAY_STD = 0.02  # of W_f, at first


@dataclass(frozen=True)
class HGRN2Config:
    """The shape of a layer.

    Attributes:
        lower_bound: whether the gates of all layers but the first have one.
    """

    heads: int = 4
    lower_bound: bool = True

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise InputError(f"hgrn2: expected at least 1 head, got {self.heads}")


@MIXERS.register
class HGRN2(Recurrent):
    """A layer of HGRN2."""

    name, Config = "hgrn2", HGRN2Config
    examples = ("hgrn2:heads=2",)
    per_channel, stepped = True, False

    def __init__(self, config: HGRN2Config, model: LayerShape):
        super().__init__()
        self.config, width = config, model.d_model
        self.size = split_heads(width, config.heads, "hgrn2")
        self.q_proj = nn.Linear(width, width, bias=False)
        self.f_proj = nn.Linear(width, width, bias=False)
        self.i_proj = nn.Linear(width, width, bias=False)
        bounded = config.lower_bound and model.layer > 0
        self.bound = nn.Parameter(torch.empty(width)) if bounded else None  # (d_model), before its sigmoid
        self.norm = RMSNorm(width, NORM_EPS)
        self.out_proj = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            nn.init.normal_(self.f_proj.weight, std=DECAY_STD)
            if self.bound is not None:
                self.bound.fill_(math.log(model.layer / (model.n_layer - model.layer)))  # its sigmoid: layer / n_layer
            self.out_proj.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: HGRN2Config, model: LayerShape) -> HGRN2:
        return cls(config, model)

    @property
    def heads(self) -> int:
        return self.config.heads

    @property
    def headdim(self) -> int:
        return self.size

    @property
    def d_state(self) -> int:
        return self.size

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, Gates, Rest]:
        q, f, i = (proj(u) for proj in (self.q_proj, self.f_proj, self.i_proj))  # each (B, T, d_model)
        wide = torch.promote_types(f.dtype, torch.float32)
        log_decay, key = F.logsigmoid(f.to(wide)), torch.sigmoid(-f.to(wide))
        if self.bound is not None:  # 1 - f_t = (1 - b) (1 - sigmoid): no difference of numbers near 1
            bound = self.bound.to(wide)
            log_decay = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + log_decay)
            key = torch.sigmoid(-bound) * key
        q, key, i, log_decay = (t.unflatten(-1, (self.heads, -1)) for t in (F.silu(q), key, i, log_decay))
        gates = Gates(log_decay, log_decay.new_ones(log_decay.shape[:3]))
        return ScanInputs(i, key.to(i.dtype), q * self.d_state**-0.5), gates, Rest()

    def output_gate(self, rest: Rest) -> None:
        """There is no gate."""

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        return self.out_proj(self.norm(y.flatten(-2)))
