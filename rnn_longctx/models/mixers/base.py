"""What every recurrent mixer does around its projections: the convolution's edge, the scan, the output.

A mixer of a linear recurrence is a class with a `name`, a `Config`, parameters, and one method that knows them:

    @MIXERS.register
    class Mine(Recurrent):
        name, Config = "mine", MineConfig

        def inputs(self, u, carry, span):
            ...
            return ScanInputs(v, k, q), Gates(log_decay, input_scale), Rest(z=z)
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.conv import causal_conv
from rnn_longctx.models.deferred import DeferredNorm
from rnn_longctx.models.interface import LayerShape
from rnn_longctx.models.mixer_reading import MixerReading, Rest, Tap
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.backends import Call, OutputGate
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import AnyGates, ScanInputs
from rnn_longctx.recurrence.interface import Recurrence
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.rows import row_counts
from rnn_longctx.recurrence.rule import compute_dtype
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd.scan import SSD
from rnn_longctx.recurrence.statistics import Observer


class Recurrent(nn.Module):
    """A mixer of a linear recurrence. `policy` is data: set it, and the next token follows it.

        mixer.policy = ScanPolicy(mul=0.5)  # from now on the layer forgets half as fast

    A subclass makes its parameters (`norm` and `out_proj` among them, unless it has its own `output`) and `inputs`.

    Attributes:
        name, Config: the mixer's name, and the dataclass of its parameters (`rnn_longctx.models.config`).
        examples: small settings that its contract tries, see `Mixer`.
        recurrence: the rule by which a state follows from the one before.
        per_channel: whether every channel of the state decays by itself.
        stepped: whether `inputs` gives `SteppedGates`.
        simple: whether a delta rule reads and erases the key, by as much as it writes (`DeltaGates.simple`).
        bounded: see `RecurrentMixer`.
        one_step_a_head: whether a token has one step a head, from what `in_proj` gives, which `steps` works out.
        heads, headdim, d_state: the shape (H, P, N) of a row's state.
        policy, observer, backend, state_dtype: see `rnn_longctx.recurrence.ssd.scan.scan`.
        tap: is called with the `MixerReading` of every call, before its scan, and may return other gates for it; None:
            nobody looks.
        tappable: every mixer of this class is.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    examples: ClassVar[tuple[str, ...]] = ()
    recurrence: ClassVar[Recurrence] = SSD
    attends: ClassVar[bool] = False
    per_channel: ClassVar[bool] = False
    stepped: ClassVar[bool] = True
    simple: ClassVar[bool] = True
    tappable: ClassVar[bool] = True
    bounded: bool = False
    one_step_a_head: ClassVar[bool] = False

    norm: RMSNorm
    out_proj: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.policy: ScanPolicy = PLAIN
        self.backend: str | None = None
        self.observer: Observer | None = None
        self.state_dtype: torch.dtype | None = None
        self.tap: Tap | None = None

    @classmethod
    def of(cls, config: Any, model: LayerShape) -> Recurrent:
        """Make the mixer of one layer of a model."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        raise NotImplementedError

    @property
    def headdim(self) -> int:
        raise NotImplementedError

    @property
    def d_state(self) -> int:
        raise NotImplementedError

    # --- the layer

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, AnyGates, Rest]:
        """Return what the scan reads of u (B, T, d_model), and what is needed after it. Nothing else knows the
        projections."""
        raise NotImplementedError

    def forward(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[Tensor | DeferredNorm, Carry]:
        """Read u (B, T, d_model) after a carry (None begins), and return as much and the carry after it. Where the scan
        can apply the norm of the output, the norm's factor a token is left to the sum that comes next, which saves a
        pass over memory."""
        inputs, gates, rest = self.inputs(u, carry, span)
        if self.tap is not None:
            gates = self.tap(MixerReading(inputs, gates, span, carry, rest)) or gates
        output_gate = self.output_gate(rest)
        y, scanned = self.recurrence.scan(
            inputs,
            gates,
            span,
            policy=self.policy,
            carry=None if carry is None else carry.scan,
            backend=self.backend,
            observer=self.observer,
            output_gate=output_gate,
            state_dtype=self.state_dtype,
        )
        after = self.carry_after(rest, scanned)
        if output_gate is not None and output_gate.squares is not None:
            width = self.heads * self.headdim
            return DeferredNorm(self.out_proj(y.flatten(-2)), output_gate.squares, width, self.norm.eps), after
        return self.output(y, rest), after

    def carry_after(self, rest: Rest, scanned: ScanCarry) -> Carry:
        """Return the layer's carry after a call, from that of the scan."""
        return Carry(rest.conv, scanned)

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        """Return (B, T, d_model) from the scan's y (B, T, H, P): normed, gated by z, projected."""
        return self.out_proj(self.norm(y.flatten(-2), rest.z))

    def output_gate(self, rest: Rest) -> OutputGate | None:
        """Return the norm of `output` for the scan to apply, or None where it is not that of this class, or where
        somebody sees or edits what is before or behind the last product, after which its factor a token is applied."""
        last = self.out_proj
        if rest.z is None or last.bias is not None or last._forward_hooks or last._forward_pre_hooks:
            return None
        return self.norm.gate(rest.z.unflatten(-1, (self.heads, self.headdim)))

    def convolve(self, conv: nn.Conv1d, x: Tensor, carry: Carry | None, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Return the causal convolution and SiLU of x (B, T, channels), the inputs (B, channels, taps - 1) to go on
        from, and what was read: x, zero at padding."""
        if span.mask is not None:
            x = x * span.mask[..., None]
        edge = None if carry is None else carry.conv
        if span.shard is None:
            return *causal_conv(x, conv, edge, span.reset), x
        edge, after = span.shard.edges(x, conv.kernel_size[0] - 1, edge, span.reset)
        return causal_conv(x, conv, edge, span.reset)[0], after, x

    # --- what it keeps, and what may be asked of it

    @property
    def A(self) -> Tensor | None:
        """The rate (H) or (H, N), at least float32, at which each head decays in a step, below 0; see `RecurrentMixer`
        for None."""
        return None

    @property
    def no_rates(self) -> str:
        """What the layer does that no weight scales its log-decays alone, where `A` is None."""
        return "makes its decays from the text"

    @property
    def channels(self) -> tuple[int, int] | None:
        """The channels of the convolution and how many inputs of each it keeps; None: there is none."""
        return None

    def scale_rates(self, factor: Tensor) -> None:
        """Multiply every head's log-decay by factor (H), float64, in the weights.

        Raises:
            InputError: no weight scales them alone (`no_rates`).
        """
        self.refuse_rates()

    def refuse_rates(self) -> NoReturn:
        """Raise InputError: no weight scales log-decays alone."""
        raise InputError(f"a {self.name} layer {self.no_rates}: no weight of it scales log-decays alone")

    def chosen_backend(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the name of the backend that reads inputs of a dtype on a device under the present policy."""
        dtype = compute_dtype(dtype, self.state_dtype)
        call = Call(device, dtype, self.per_channel, self.headdim, self.d_state, self.stepped, self.simple)
        return self.recurrence.backends.choose(self.policy, self.backend, call).name

    def scan_state(self, carry: Carry) -> Tensor:
        """Return the state (B, H, P, N) of a carry: what training shows the norm of, and begins as noise."""
        return carry.scan.state

    def state_size(self) -> StateSize:
        fixed = {"scan": self.heads * self.headdim * self.d_state}
        if self.channels is not None:
            fixed["conv"] = self.channels[0] * self.channels[1]
        return StateSize(fixed)

    def new_carry(self, rows: int) -> Carry:
        """Return the carry of rows that have read nothing, which None stands for, as tensors: float32, or float64 in a
        float64 model."""
        weight = next(self.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        conv = None if self.channels is None else torch.zeros(rows, *self.channels, dtype=dtype, device=weight.device)
        sizes = (rows, self.heads, self.headdim, self.d_state)
        return Carry(conv, ScanCarry.start(*sizes, per_channel=self.per_channel, dtype=dtype, device=weight.device))


class HeadNormed(Recurrent):
    """A recurrent mixer whose output is normed head by head, before its gate: out_proj(norm(y) * silu(z)).

    Attributes:
        config: has the number of `heads`.
        sizes: the channels of a key and of a value, of one head.
    """

    config: Any
    sizes: tuple[int, ...]

    @property
    def heads(self) -> int:
        return self.config.heads

    @property
    def headdim(self) -> int:
        return self.sizes[1]

    @property
    def d_state(self) -> int:
        return self.sizes[0]

    def output_gate(self, rest: Rest) -> None:
        """No scan applies a norm that is over a head and comes before the gate."""

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        assert rest.z is not None
        return self.out_proj(self.norm.gated(y, rest.z))


def split_heads(width: float, heads: int, name: str) -> int:
    """Return the channels of one of `heads` heads that share `width` channels. Raises InputError where they do not
    divide them."""
    if width != int(width) or int(width) < heads or int(width) % heads:
        raise InputError(f"{name}: {width:g} channels do not divide into {heads} heads")
    return int(width) // heads


def places_of(u: Tensor, carry: Carry | None, span: Span) -> Tensor:
    """Return the place (B, T) of every token of u (B, T, d_model) in its document, from 0 on, on the CPU."""
    first = torch.zeros(len(u), dtype=torch.int64, device="cpu") if carry is None else carry.scan.position
    if span.shard is not None:
        first = span.shard.positions(first)[span.shard.rank]
    return row_counts(first, u.shape[1], mask=span.mask, reset=span.reset)[0] - 1
