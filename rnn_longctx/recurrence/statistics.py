"""What an observer sees of a state every k tokens of a stream, without a copy of it: sums, and the log-decay so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Of the states (P, N) after some tokens. n boundaries.

    Attributes:
        position: (n,) int64 on the CPU: tokens a row has read since it began.
        elements: numbers in a state, P * N.
        total, square, peak: (B, H, n): the sum of a state's numbers, of their squares, and the largest size of one.
        log_decay: (B, H, n) or (B, H, N, n) float64, in nats, since the row began: exp of it is what is left of its
            first token.
        state: (B, H, n, P, N), where the observer asks for it.
    """

    position: Tensor
    elements: int
    total: Tensor
    square: Tensor
    peak: Tensor
    log_decay: Tensor
    state: Tensor | None = None

    @property
    def norm(self) -> Tensor:
        """(B, H, n): the Frobenius norm."""
        return self.square.sqrt()

    @property
    def mean(self) -> Tensor:
        return self.total / self.elements

    @property
    def rms(self) -> Tensor:
        return (self.square / self.elements).sqrt()

    def cpu(self) -> Statistics:
        """All but the state, on the CPU."""
        moved = {name: getattr(self, name).cpu() for name in ("total", "square", "peak", "log_decay")}
        return replace(self, **moved)

    @classmethod
    def of(cls, state: Tensor, position: Tensor, log_decay: Tensor, whole: bool = False) -> Statistics:
        """Of one state (B, H, P, N), after `position` tokens (one number); with the state itself where `whole`."""
        flat = state.detach().flatten(-2)
        return cls(
            position.reshape(1),
            flat.shape[-1],
            flat.sum(-1)[..., None],
            flat.square().sum(-1)[..., None],
            flat.abs().amax(-1)[..., None],
            log_decay[..., None],
            state.detach()[:, :, None].clone() if whole else None,
        )

    @classmethod
    def join(cls, parts: list[Statistics]) -> Statistics:
        def along(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts], -1)

        state = None if parts[0].state is None else torch.cat([p.state for p in parts if p.state is not None], 2)
        total, square, peak, log_decay = map(along, ("total", "square", "peak", "log_decay"))
        return cls(along("position"), parts[0].elements, total, square, peak, log_decay, state)


class Observer(Protocol):
    """Called by a scan with the statistics of the tokens it has read whose position is a multiple of `every`; with the
    states themselves where `whole`."""

    every: int
    whole: bool

    def __call__(self, statistics: Statistics) -> None: ...
