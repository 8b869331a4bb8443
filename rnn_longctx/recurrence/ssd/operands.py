"""The numbers of a fused scan, flat, as torch operators and kernels take them."""

# no `from __future__ import annotations`: tools read the types
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Maybe = Tensor | None


class Operands(NamedTuple):
    """The arguments of the operator `rnn_longctx::scan`, in its order. No policy is known here.

    Attributes:
        x, B, C, D: as in `ScanInputs`, with the last axis of x, B and C dense and all of one type.
        dt, A, dt_bias: as in `SteppedGates`, A (H); low, high, softplus: its dt_limit and softplus.
        initial: (B, H, P, N) the state before.
        table: (4, H) float32: the policy's mul, add, gain, min_dt.
        pad: (B) int32: leading tokens of a row to leave out.
        drop: (B, T) int8: 1 where the state is dropped before the token.
        caps: (n, H) float32: norm caps. With `every` > 0 there is one, after each `every`-th token, whole chunks;
            otherwise one is due after token t where due[i] divides position + t + 1.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Maybe
    dt_bias: Maybe
    initial: Tensor
    table: Tensor
    pad: Maybe
    drop: Maybe
    caps: Maybe
    low: float
    high: float
    softplus: bool
    every: int
    due: list[int]
    position: int

    def tokens(self, start: int, stop: int) -> "Operands":
        """Return the operands of the tokens from `start` up to and without `stop` (of rows without marks)."""
        return self.of_tokens(lambda t: t[:, start:stop])

    def of_tokens(self, change: Callable[[Tensor], Tensor]) -> "Operands":
        """Return the operands with x, dt, B and C as `change` returns them."""
        return self._replace(x=change(self.x), dt=change(self.dt), B=change(self.B), C=change(self.C))

    @property
    def kind(self) -> tuple:
        """What kernels are compiled for: types, sizes, and which operands there are."""
        maybe = (self.D, self.dt_bias, self.pad, self.drop, self.caps)
        return self.x.device, self.x.dtype, self.x.shape[3], self.B.shape[2:], self.every, *(t is None for t in maybe)


class GradOperands(NamedTuple):
    """The arguments of the operator `rnn_longctx::scan_backward`, in its order: the gradients of y and of the final
    state, what `Operands` has, and the factors that the scan found."""

    dy: Tensor
    dfinal: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Maybe
    dt_bias: Maybe
    initial: Tensor
    table: Tensor
    pad: Maybe
    drop: Maybe
    factors: Tensor
    low: float
    high: float
    softplus: bool
    every: int

    @property
    def kind(self) -> tuple:
        """What kernels are compiled for: see `Operands.kind`."""
        maybe = (self.D, self.dt_bias, self.pad, self.drop)
        sizes = self.x.device, self.x.dtype, self.x.shape[3], self.B.shape[2:], self.every
        return *sizes, *(t is None for t in maybe), not self.factors.shape[2]


class ChannelOperands(NamedTuple):
    """The arguments of the operator `rnn_longctx::scan_channels`, in its order: of heads of headdim 1 with a decay a
    number. As in `Operands` but for A (H, N), D (H), and drop (B, T) int8: 2 where a document begins too."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Maybe
    dt_bias: Maybe
    initial: Tensor
    table: Tensor
    pad: Maybe
    drop: Maybe
    low: float
    high: float
    softplus: bool

    @property
    def kind(self) -> tuple:
        """What kernels are compiled for: see `Operands.kind`."""
        maybe = (self.D, self.dt_bias, self.pad, self.drop)
        return self.x.device, self.x.dtype, self.B.shape[2:], self.softplus, *(t is None for t in maybe)
