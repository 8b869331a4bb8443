"""Performer (arXiv 2009.14794): softmax attention by random features, FAVOR+, as a recurrence that never forgets.

    f(k)_i = exp(w_i . k - |k|^2 / 2)          E[f(q) . f(k)] = exp(q . k), over Gaussian w_i
    S_t = S_{t-1} + [v_t, 1] f(k_t)^T          y_t = S_t f(q_t): its last channel divides the others

where q and k are turned by their places, as in `full-attention`, and divided by d^(1/4), which makes the kernel
exp(q . k / sqrt(d)). The w_i of a head are orthogonal d at a time, which takes variance away (section 2.4), and drawn
once, from a seed. So a layer of n features a head has the outputs of a `full-attention` layer of the same weights, but
for an error that falls as n^(-1/2); its state keeps a fixed size and forgets nothing.

An exponential needs a stabiliser, and the largest exponent of a whole text would tell a token of later ones. Here every
feature has a running one, m_t = max of w_i . k_s - |k_s|^2 / 2 over s <= t, which the carry holds. What the state
keeps is exp(-m_t) times the sums above: where m grows, the scan makes it smaller by its decay,

    log_decay_t = m_{t-1} - m_t       B_t = exp(w . k_t - |k_t|^2 / 2 - m_t)       C_t = exp(w . q_t + m_t - max_i)

Factors cancel in the quotient, so that this is exact, and the divisor is never below 1. In the scan's words x are the
values with a one behind them, B and C the features. A policy's `mul` and `start` mean nothing to such a state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry, carry
from rnn_longctx.models.interface import LayerShape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent, places_of, split_heads
from rnn_longctx.models.rotary import turned
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd.scan import RELATIVE
from rnn_longctx.spec import tuned

NONE = float("-inf")  # the largest exponent of no key


@carry
@dataclass
class PerformerCarry(Carry):
    """The carry of a Performer layer.

    Attributes:
        largest: (B, H, N), the largest exponent of a key so far in each feature; 0 in a row that has read nothing.
    """

    largest: Tensor


@dataclass(frozen=True)
class PerformerConfig:
    """The shape of a layer.

    Attributes:
        features: random features of a head.
        seed: what they are drawn from, in every layer others.
    """

    heads: int = 4
    features: int = tuned(64, over=(16, 32, 64, 128, 256))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.heads < 1 or self.features < 1:
            raise InputError(f"performer: heads and features are at least 1, got {self.heads} and {self.features}")
        if self.seed < 0:
            raise InputError(f"performer: seed is a whole number from 0 on, got {self.seed}")


@MIXERS.register
class Performer(Recurrent):
    """A layer of Performer.

    Attributes:
        projection: (H, features, d_model / H), the w_i: a buffer, saved with the weights and never trained.
    """

    name, Config = "performer", PerformerConfig
    examples = ("performer:heads=2,features=12",)
    recurrence = RELATIVE
    per_channel, stepped = True, False

    projection: Tensor

    def __init__(self, config: PerformerConfig, model: LayerShape):
        super().__init__()
        self.config, width = config, model.d_model
        self.size = split_heads(width, config.heads, "performer")
        if self.size % 2:
            raise InputError(f"performer: positions turn pairs of a key's channels, and a head has {self.size}")
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        drawn = random_features(config.heads, config.features, self.size, (config.seed, model.layer))
        self.register_buffer("projection", drawn.to(self.in_proj.weight))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: PerformerConfig, model: LayerShape) -> Performer:
        return cls(config, model)

    @property
    def heads(self) -> int:
        return self.config.heads

    @property
    def headdim(self) -> int:
        return self.size + 1

    @property
    def d_state(self) -> int:
        return self.config.features

    @property
    def no_rates(self) -> str:
        return "never forgets"

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, Gates, Rest]:
        """See `Recurrent.inputs`. Raises InputError where a stream is spread over several ranks."""
        if span.shard is not None:
            raise InputError("performer does not read one stream over several ranks")
        assert carry is None or isinstance(carry, PerformerCarry)
        q, k, v = self.in_proj(u).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, D)
        wide, places = torch.promote_types(v.dtype, torch.float32), places_of(u, carry, span)
        with torch.autocast(u.device.type, enabled=False):  # exponents
            q, k = (turned(x.to(wide), places) * self.size**-0.25 for x in (q, k))
            of_query, of_key = (torch.einsum("bthd,hnd->bthn", x, self.projection.to(wide)) for x in (q, k))
            of_key = of_key - k.square().sum(-1, keepdim=True) / 2
            if span.mask is not None:
                of_key = of_key.masked_fill(~span.mask[..., None, None], NONE)
            before, now = _largest(of_key.detach(), carry, span.reset)
            of_query = of_query + now
            C = (of_query - of_query.detach().amax(-1, keepdim=True)).exp()
            B = (of_key - now).exp()
        narrow = torch.float32 if v.dtype == torch.float16 else v.dtype  # float16 has no room for sums over a text
        values = F.pad(v, (0, 1), value=1.0)
        inputs = ScanInputs(values.to(narrow), B.to(narrow), C.to(narrow))
        log_decay = before - now
        return inputs, Gates(log_decay, log_decay.new_ones(log_decay.shape[:3])), Rest(largest=now[:, -1].clone())

    def carry_after(self, rest: Rest, scanned: ScanCarry) -> PerformerCarry:
        assert rest.largest is not None
        return PerformerCarry(rest.conv, scanned, rest.largest)

    def output_gate(self, rest: Rest) -> None:
        """No scan applies a division."""

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        values, weight = y.split([self.size, 1], -1)
        # below 1 only at padding, which has read nothing, and where a policy lets a state forget
        mean = values / weight.clamp(min=torch.finfo(y.dtype).tiny)
        return self.out_proj(mean.flatten(2).to(self.out_proj.weight.dtype))

    def state_size(self) -> StateSize:
        return super().state_size() + StateSize({"scan": self.heads * self.d_state})

    def new_carry(self, rows: int) -> PerformerCarry:
        new = super().new_carry(rows)
        return PerformerCarry(new.conv, new.scan, new.scan.state.new_zeros(rows, self.heads, self.d_state))


def random_features(heads: int, count: int, size: int, seed: tuple[int, ...]) -> Tensor:
    """Return (heads, count, size) float64, on the CPU: vectors that are each Gaussian, of variance 1 a number, and of a
    head orthogonal to each other, `size` at a time."""
    mixed = np.random.SeedSequence(seed).generate_state(1)[0]  # (PyTorch looks at 32 bits of a seed alone)
    draw = torch.Generator("cpu").manual_seed(int(mixed))
    shape = (2, heads, -(-count // size), size, size)
    directions, lengths = torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(directions)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # without these signs it is not uniform
    return (q.mT * lengths.norm(dim=-1, keepdim=True)).flatten(1, 2)[:, :count]


def _largest(x: Tensor, carry: PerformerCarry | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the largest of x (B, T, H, N) in each document before every token, and up to and with it. Where nothing
    came before a token, both are the same; where nothing has been read at all, both are 0."""
    first = torch.full_like(x[:, :1], NONE)  # before the call
    if carry is not None:
        begun = (carry.scan.position > 0).to(x.device)[:, None, None, None]
        first = torch.where(begun, carry.largest[:, None].to(x.dtype), first)
    running = torch.cat([first, x], 1)
    if reset is None:
        running = running.cummax(1).values
    else:  # of the last 2, 4, 8, ... tokens, as far as they are of one document
        document, reach = F.pad(reset.long().cumsum(1), (1, 0)), 1
        while reach < running.shape[1]:
            same = (document[:, reach:] == document[:, :-reach])[..., None, None]
            earlier = running[:, :-reach].masked_fill(~same, NONE)
            running = torch.cat([running[:, :reach], torch.maximum(running[:, reach:], earlier)], 1)
            reach *= 2
    before, now = running[:, :-1], running[:, 1:]
    if reset is not None:
        before = before.masked_fill(reset[..., None, None], NONE)
    now = now.masked_fill(now == NONE, 0.0)
    return torch.where(before == NONE, now, before), now
