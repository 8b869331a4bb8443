"""RWKV-7 "Goose" (arXiv 2503.14456), the time mixing of section 4: a delta rule whose decays, rates of erasing and keys
the text sets, a channel each.

    u_t^c = u_t + (u_{t-1} - u_t) mu_c                c one of r, w, k, v, a, g
    r, k, v = W_c u_t^c                               w, a, v', g: low-rank maps of their own u_t^c
    decay_t = exp(-e^(-1/2) sigmoid(w_t))             kappa_t = k_t xi / ||k_t xi||, a head
    a_t = sigmoid(a_t)                                k~_t = k_t (1 + (a_t - 1) alpha)
    S_t = S_{t-1} (diag(decay_t) - kappa_t (a_t kappa_t)^T) + v_t k~_t^T
    y_t = S_t r_t                                     out_t = W_o (g_t (GroupNorm(y_t) + (r_t rho . k~_t) v_t))

In the scan's words x are the values, B the keys k~, C the receptances r. What is read of the state, along kappa, has
not decayed yet. After the first such layer values are drawn towards that layer's, v_t + (v^1_t - v_t) sigmoid(v'_t). It
leaves them on the `Span` of the call: they are of the call's own tokens, so that they are no state and in no carry.

Names and first weights are those of flash-linear-attention (0.6), which follow the authors' code, but for W_o: it
begins small and not at 0, as in all layers here. The paper's blocks have a channel mixing of their own after it, which
is the mixer "rwkv7-ffn", and LayerNorms: `mixer: [rwkv7, rwkv7-ffn], norm: layer`. With `mlp` the gated MLP of this
library stands there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.conv import shifted
from rnn_longctx.models.interface import LayerShape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.recurrence.delta import DELTA
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.span import Span
from rnn_longctx.spec import quiet

FASTEST = -math.exp(-0.5)  # nats a token: no channel forgets more
FIRST_VALUES = "rwkv7 values"  # in `Span.shared`
MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # of the token before; how their mu begin


@dataclass(frozen=True)
class RWKV7Config:
    """The shape of a layer.

    Attributes:
        headdim: channels of a head, of its keys and of its values.
        rank_w, rank_a, rank_v, rank_g: of the maps that make decays, rates of erasing, the share of the first layer's
            values, and the gate of the output. None: as the authors choose for the width.
    """

    headdim: int = 64
    rank_w: int | None = quiet(None)
    rank_a: int | None = quiet(None)
    rank_v: int | None = quiet(None)
    rank_g: int | None = quiet(None)

    def __post_init__(self) -> None:
        if self.headdim < 2:
            raise InputError(f"rwkv7: headdim must be at least 2, got {self.headdim}")
        for name in ("rank_w", "rank_a", "rank_v", "rank_g"):
            if (rank := getattr(self, name)) is not None and rank < 1:
                raise InputError(f"rwkv7: {name} must be at least 1, got {rank}")

    def ranks(self, width: int) -> dict[str, int]:
        """Return the rank of every map in a layer of `width` channels, by the letter of what it makes."""
        wider = self.headdim / 64
        usual = {"w": 2.5 * wider, "a": 2.5 * wider, "v": 1.7 * wider, "g": 5.0}  # times the root of the width
        return {c: getattr(self, f"rank_{c}") or _multiple_of_32(times * width**0.5) for c, times in usual.items()}


@MIXERS.register
class RWKV7(Recurrent):
    """A layer of RWKV-7's time mixing."""

    name, Config = "rwkv7", RWKV7Config
    examples = ("rwkv7:headdim=16,rank_w=4,rank_a=4,rank_v=4,rank_g=4",)
    recurrence = DELTA
    per_channel, stepped, simple = True, False, False

    def __init__(self, config: RWKV7Config, model: LayerShape):
        super().__init__()
        self.config, self.first, width = config, model.first, model.d_model
        if width % config.headdim:
            raise InputError(f"rwkv7: d_model = {width} is no multiple of headdim = {config.headdim}")
        self.nheads = width // config.headdim
        ranks = config.ranks(width)
        self.mix = nn.Parameter(torch.empty(len(MIXES), width))  # mu, in the order of MIXES
        self.k_k = nn.Parameter(torch.empty(width))  # xi
        self.k_a = nn.Parameter(torch.empty(width))  # alpha
        self.r_k = nn.Parameter(torch.empty(self.nheads, config.headdim))  # rho
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.w_lora = _low_rank(width, ranks["w"], nn.Tanh())
        self.a_lora = _low_rank(width, ranks["a"], nn.Identity())
        self.v_lora = None if self.first else _low_rank(width, ranks["v"], nn.Identity())
        self.g_lora = _low_rank(width, ranks["g"], nn.Sigmoid(), bias=False)
        self.group_norm = nn.GroupNorm(self.nheads, width, eps=config.headdim * model.norm_eps)
        self.out_proj = nn.Linear(width, width, bias=False)
        self._begin(model.layer, model.n_layer)

    @torch.no_grad()
    def _begin(self, layer: int, layers: int) -> None:
        """Set the first weights, which hang on the depth and, a channel each, on the place in the layer and head."""
        width, size = self.k_k.shape[0], self.headdim
        depth, above = layer / max(layers - 1, 1), 1 - layer / layers
        place = torch.arange(width, device=self.k_k.device, dtype=torch.float32)
        line = place / (width - 1)
        bend = 2 * (place % size) / (size - 1) - 1  # -1 to 1 within a head
        bend = bend * bend.abs()
        for mu, power in zip(self.mix, MIXES.values()):
            mu.copy_(1 - (place / width) ** (power * above))
        self.k_k.copy_(0.71 - 0.1 * (line - 0.5))
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        _bias(self.w_lora).copy_(-5.5 + 6 * line ** (1 + depth**0.3) + 2.5 * bend)
        _bias(self.a_lora).copy_(-0.19 + 0.3 * bend + 0.4 * (line - 0.5))
        if self.v_lora is not None:
            _bias(self.v_lora).copy_(0.73 - 0.4 * (line - 0.5))
        self.group_norm.weight.fill_(((layer + 1) / layers) ** 0.7)
        for proj, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            nn.init.orthogonal_(proj.weight, gain)
        self.out_proj.weight /= math.sqrt(layers)

    @classmethod
    def of(cls, config: RWKV7Config, model: LayerShape) -> RWKV7:
        return cls(config, model)

    @property
    def heads(self) -> int:
        return self.nheads

    @property
    def headdim(self) -> int:
        return self.config.headdim

    @property
    def d_state(self) -> int:
        return self.config.headdim

    @property
    def channels(self) -> tuple[int, int]:
        """The shift by a token is a convolution that keeps one input."""
        return self.mix.shape[1], 1

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, DeltaGates, Rest]:
        if span.mask is not None:
            u = u * span.mask[..., None]
        before, edge = shifted(u, None if carry is None else carry.conv, span.reset)
        step = before - u
        read = {c: u + step * mu for c, mu in zip(MIXES, self.mix)}  # each (B, T, d_model)
        r, k, v = self.r_proj(read["r"]), self.k_proj(read["k"]), self.v_proj(read["v"])
        v = self._drawn_to_first(v, read["v"], span)
        wide = torch.promote_types(k.dtype, torch.float32)
        log_decay = FASTEST * torch.sigmoid(self.w_lora(read["w"]).to(wide))
        a = torch.sigmoid(self.a_lora(read["a"]))
        kappa = (k * self.k_k).unflatten(-1, (self.heads, -1)).to(wide)
        kappa = F.normalize(kappa, dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v, a, log_decay = (t.unflatten(-1, (self.heads, -1)) for t in (r, k, v, a, log_decay))  # (B, T, H, ·)
        ones = log_decay.new_ones(log_decay.shape[:3])
        gates = DeltaGates(log_decay, ones, ones, kappa, kappa * a, decay_first=False)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return ScanInputs(v, k, r), gates, Rest(self.g_lora(read["g"]), edge, bonus=bonus.flatten(-2))

    def _drawn_to_first(self, v: Tensor, read: Tensor, span: Span) -> Tensor:
        """Return the values v (B, T, d_model) drawn towards those of the first such layer, which leaves its own for the
        layers above."""
        if self.v_lora is None:
            if span.shared is not None:
                span.shared[FIRST_VALUES] = v
            return v
        if span.shared is None or FIRST_VALUES not in span.shared:
            raise InputError("an rwkv7 layer above the first reads that one's values: call the model, not the layer")
        return v + (span.shared[FIRST_VALUES] - v) * torch.sigmoid(self.v_lora(read))

    def output_gate(self, rest: Rest) -> None:
        """No scan applies a norm that is over a head, with a gate after it."""

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        assert rest.z is not None and rest.bonus is not None
        normed = self.group_norm(y.flatten(-2).flatten(0, 1).to(self.group_norm.weight.dtype))
        return self.out_proj((normed.view_as(rest.bonus) + rest.bonus) * rest.z)


def _low_rank(width: int, rank: int, between: nn.Module, bias: bool = True) -> nn.Sequential:
    """Return a map through `rank` channels whose outcome begins as its bias."""
    down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=bias)
    nn.init.zeros_(down.weight)
    nn.init.orthogonal_(up.weight, 0.1 * max(1.0, rank / width) ** 0.5)
    return nn.Sequential(down, between, up)


def _bias(low_rank: nn.Sequential) -> Tensor:
    return low_rank[2].bias  # type: ignore[return-value]


def _multiple_of_32(rank: float) -> int:
    return max(32, 32 * round(rank / 32))
