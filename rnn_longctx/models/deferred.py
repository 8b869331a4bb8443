"""What a layer hands on before its last factor a token is applied."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DeferredNorm(NamedTuple):
    """The output of a layer before a norm's factor a token, 1 / rms, is applied to it.

    Attributes:
        values: (B, T, dim).
        squares: (B, T, ·), float32; they add up to the `width` squares of which rms^2 is the mean, plus eps.
    """

    values: Tensor
    squares: Tensor
    width: int
    eps: float

    def scaled(self) -> Tensor:
        """Return the values with the factor applied."""
        factor = (self.squares.sum(-1, keepdim=True) / self.width + self.eps).rsqrt()
        return (self.values * factor).to(self.values.dtype)
