"""Mamba-3 (arXiv 2603.15569): a step that weighs a token against the one before it, and a state that the text turns.

    dt_t = softplus(. + dt_bias)      a_t = exp(-dt_t max(softplus(.), SLOWEST))      l_t = sigmoid(.)
    angle_t = angle_{t-1} + pi dt_t tanh(.)                               one a head and pair of channels
    k_t, q_t = turn(RMSNorm(B_t) + B_bias, angle_t), turn(RMSNorm(C_t) + C_bias, angle_t)
    h_t = a_t h_{t-1} + a_t (1 - l_t) dt_t x_{t-1} k_{t-1}^T + l_t dt_t x_t k_t^T        the trapezoidal rule
    y_t = h_t q_t + D x_t             out_t = W_o (y_t * silu(z_t))

where each dot is a part of in_proj(u_t). Turning keys and queries is what a state of complex numbers does. This is the
form with one input and one output a head (SISO), without the optional norm before W_o. Names, shapes and first weights
are those of mamba-ssm (2.3.2), but for W_o, which begins smaller in deeper models, as in all layers here.

A token writes twice, at its own time and at the next one's. The scan reads both at once, at the later: its state is

    S_t = h_t - l_t dt_t x_t k_t^T = a_t S_{t-1} + a_t (l_{t-1} dt_{t-1} + (1 - l_t) dt_t) x_{t-1} k_{t-1}^T

what h_t holds of the tokens before t. That is so at every token, however a stream is cut; a policy acts on it, and a
window of r tokens is of the r before the current one. What a token adds to its own output, l_t dt_t (k_t . q_t) x_t,
stands beside the scan, as D x_t does. In the scan's words x are the x_{t-1}, B the k_{t-1}, C the q_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry, carry
from rnn_longctx.models.conv import shifted
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.span import Span

SLOWEST = 1e-4  # the lowest rate of a decay
DT_INIT = (1e-3, 1e-1)  # range of the first steps, log-uniform
TURN = 2 * math.pi


@carry
@dataclass
class TurningCarry(Carry):
    """The carry of a Mamba-3 layer. `conv` (B, H * (P + N + 1), 1) is of the last token: x, its key, l dt.

    Attributes:
        angle: (B, H, A) float64, by what the last token's key was turned, from 0 to 2 pi.
    """

    angle: Tensor


@dataclass(frozen=True)
class Mamba3Config:
    """The shape of a layer; names and defaults are those of mamba-ssm.

    Attributes:
        rope_fraction: of the channels of a key, how many are turned: 0.5 or 1.
    """

    d_state: int = 128
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    rope_fraction: float = 0.5

    def __post_init__(self) -> None:
        for name in ("d_state", "expand", "headdim", "ngroups"):
            if getattr(self, name) < 1:
                raise InputError(f"mamba3: {name} must be at least 1, got {getattr(self, name)}")
        if self.rope_fraction not in (0.5, 1.0):
            raise InputError(f"mamba3: rope_fraction is 0.5 or 1, got {self.rope_fraction:g}")
        if self.d_state % 2 or not self.angles:
            part = f"{self.rope_fraction:g} of its d_state = {self.d_state}"
            raise InputError(f"mamba3: the channels of a key are turned in pairs, and {part} are none")

    @property
    def angles(self) -> int:
        """The pairs of channels that are turned."""
        return int(self.d_state * self.rope_fraction) // 2


@MIXERS.register
class Mamba3(Recurrent):
    """A layer of Mamba-3."""

    name, Config = "mamba3", Mamba3Config
    examples = ("mamba3:d_state=8,headdim=8,ngroups=2", "mamba3:d_state=6,headdim=16,rope_fraction=1")
    stepped = False

    def __init__(self, config: Mamba3Config, model: Shape):
        super().__init__()
        c, width = config, config.expand * model.d_model
        self.config, self.width = config, width
        if width % c.headdim:
            raise InputError(f"mamba3: expand * d_model = {width} is no multiple of headdim = {c.headdim}")
        if self.heads % c.ngroups:
            raise InputError(f"mamba3: {self.heads} heads do not divide into ngroups = {c.ngroups}")
        keys = c.ngroups * c.d_state
        self.parts = [width, width, keys, keys, self.heads, self.heads, self.heads, c.angles]
        self.in_proj = nn.Linear(model.d_model, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.B_bias = nn.Parameter(torch.ones(self.heads, 1, c.d_state))
        self.C_bias = nn.Parameter(torch.ones(self.heads, 1, c.d_state))
        self.B_norm = RMSNorm(c.d_state, model.norm_eps)
        self.C_norm = RMSNorm(c.d_state, model.norm_eps)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.out_proj = nn.Linear(width, model.d_model, bias=False)
        with torch.no_grad():
            dt = torch.empty(self.heads).uniform_(*map(math.log, DT_INIT)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.out_proj.weight /= math.sqrt(model.n_layer)

    @classmethod
    def of(cls, config: Mamba3Config, model: Shape) -> Mamba3:
        return cls(config, model)

    @property
    def heads(self) -> int:
        return self.width // self.config.headdim

    @property
    def headdim(self) -> int:
        return self.config.headdim

    @property
    def d_state(self) -> int:
        return self.config.d_state

    @property
    def channels(self) -> tuple[int, int]:
        """What a token leaves to the next is the shift of a convolution that keeps one input."""
        return self.heads * (self.headdim + self.d_state + 1), 1

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, Gates, Rest]:
        """See `Recurrent.inputs`. Raises InputError where a stream is spread over several ranks."""
        if span.shard is not None:
            raise InputError("mamba3 does not read one stream over several ranks")
        assert carry is None or isinstance(carry, TurningCarry)
        if span.mask is not None:
            u = u * span.mask[..., None]
        z, x, B, C, dt, rate, share, turn = self.in_proj(u).split(self.parts, -1)  # each (B, T, ·)
        x = x.unflatten(-1, (self.heads, -1))  # (B, T, H, P)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)  # (B, T, H)
        log_decay = -dt * F.softplus(rate.to(wide)).clamp(min=SLOWEST)
        now = dt * torch.sigmoid(share.to(wide))  # what is written at once; the rest of dt is for the token before
        turn = math.pi * dt[..., None] * torch.tanh(turn.to(wide))[:, :, None]  # (B, T, H, A), in radians
        angle = _angles(turn, None if carry is None else carry.angle, span.reset)
        q, k = self._keys(self.C_norm, C, self.C_bias, angle), self._keys(self.B_norm, B, self.B_bias, angle)

        written = torch.cat([x.to(wide), k, now[..., None]], -1)  # (B, T, H, P + N + 1)
        before, edge = shifted(written.flatten(2), None if carry is None else carry.conv, span.reset)
        x_before, k_before, now_before = before.view_as(written).split([self.headdim, self.d_state, 1], -1)
        gates = Gates(log_decay, log_decay.exp() * (now_before[..., 0] + dt - now))
        direct = (now * (k * q).sum(-1) + self.D)[..., None] * x  # (B, T, H, P)
        inputs = ScanInputs(x_before.to(x.dtype), k_before.to(x.dtype), q.to(x.dtype))
        return inputs, gates, Rest(z, edge, bonus=direct.to(x.dtype).flatten(2), angle=angle[:, -1].clone())

    def _keys(self, norm: RMSNorm, x: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
        """Return the keys or queries (B, T, H, N), at least float32, from x (B, T, G * N), bias (H, 1, N) and angle (B,
        T, H, A)."""
        groups = self.config.ngroups
        x = norm(x.unflatten(-1, (groups, 1, -1))) + bias.view(groups, -1, self.d_state)  # (B, T, G, H / G, N)
        return _turned(x.flatten(2, 3).to(torch.promote_types(x.dtype, torch.float32)), angle)

    def carry_after(self, rest: Rest, scanned: ScanCarry) -> TurningCarry:
        assert rest.angle is not None
        return TurningCarry(rest.conv, scanned, rest.angle)

    def output_gate(self, rest: Rest) -> None:
        """No scan applies a gate behind what a token adds to its own output."""

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        assert rest.z is not None and rest.bonus is not None
        return self.out_proj((y.flatten(2) + rest.bonus) * F.silu(rest.z))

    def state_size(self) -> StateSize:
        return super().state_size() + StateSize({"conv": self.heads * self.config.angles})

    def new_carry(self, rows: int) -> TurningCarry:
        new = super().new_carry(rows)
        angle = torch.zeros(rows, self.heads, self.config.angles, dtype=torch.float64, device=new.scan.state.device)
        return TurningCarry(new.conv, new.scan, angle)


def _angles(turn: Tensor, before: Tensor | None, reset: Tensor | None) -> Tensor:
    """Return the sums of turn (B, T, H, A) over each document so far, modulo 2 pi, float64: float32 sums of a long call
    would lose the turns of a head whose steps are short.

    Args: before (B, H, A), the sum when the call begins; reset (B, T), True where a document begins.
    """
    turn = turn.double()
    angle = turn.cumsum(1)
    if before is not None:
        angle = angle + before[:, None]
    if reset is not None:
        places = torch.arange(reset.shape[1], device=reset.device)
        first = (
            torch.where(reset, places, -1).cummax(1).values
        )  # (B, T), where its document began; -1: before this call
        until = (angle - turn).take_along_dim(first.clamp(min=0)[..., None, None], 1)
        angle = angle - until * (first >= 0)[..., None, None]
    return angle.remainder(TURN)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Return x (B, T, H, N) with its first A pairs of channels, 2 i and 2 i + 1, turned by angle (B, T, H, A)."""
    angle = angle.to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : 2 * angle.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([pairs, x[..., pairs.shape[-1] :]], -1)
