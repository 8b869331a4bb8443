"""Rotary positions (arXiv 2104.09864): queries and keys are turned by angles that grow with their place, so that what a
query reads of a key hangs on the distance between them.

`Yarn` scales them for longer texts than a model was trained on (arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from rnn_longctx.models.kernels import choose

BASE = 10_000.0  # the slowest pair of channels turns by about 1 / BASE a token


@dataclass(frozen=True)
class Yarn:
    """How positions are scaled for `factor` times the `train_length` tokens of training.

    Pairs of channels that turn FAST times or more within the training length stay as they are; those that turn SLOW
    times or less are slowed down by the factor, so that no angle is larger than in training; between the two the
    share of both changes evenly from one pair to the next, as in the authors' code and in transformers (the paper has
    it change with the number of turns). Queries and keys are both multiplied by `gain`, scores by its square: the
    paper's temperature.
    """

    factor: float
    train_length: int

    FAST: ClassVar[float] = 32.0
    SLOW: ClassVar[float] = 1.0

    @property
    def gain(self) -> float:
        return 1.0 + 0.1 * math.log(max(self.factor, 1.0))

    def rates(self, plain: Tensor) -> Tensor:
        """Return the angles a token (D / 2) in the place of those of the model, (D / 2)."""
        half = len(plain)
        first, last = math.floor(self._pair(self.FAST, half)), math.ceil(self._pair(self.SLOW, half))
        first, last = max(first, 0), min(last, 2 * half - 1)
        slowed = (torch.arange(half, device=plain.device) - first) / max(last - first, 1e-3)
        slowed = slowed.clamp(0, 1).to(plain.dtype)
        return plain / self.factor * slowed + plain * (1 - slowed)

    def _pair(self, turns: float, half: int) -> float:
        """Return which pair of channels, no whole number, turns so many times within the training length."""
        return half * math.log(self.train_length / (turns * 2 * math.pi)) / math.log(BASE)


def turned(x: Tensor, places: Tensor, scaling: Yarn | None = None) -> Tensor:
    """Return x (B, T, H, D), D even, turned by the angles of its places (T) or (B, T), whole numbers.

    Channel i is turned together with channel i + D / 2. Angles are float64: at place 1,000,000 float32 is off by 0.06.
    """
    if scaling is not None:
        x = x * scaling.gain
    return _turned(x, places, _rates(x, scaling))


def turned_on(x: Tensor, places: Tensor, before: Yarn | None, after: Yarn | None) -> Tensor:
    """Return x, which `turned` has given of its places scaled as `before`, as if they had been scaled as `after`: the
    same, but for one more rounding each time."""
    gain = (after.gain if after else 1.0) / (before.gain if before else 1.0)
    return _turned(x * gain, places, _rates(x, after) - _rates(x, before))


def _turned(x: Tensor, places: Tensor, rates: Tensor) -> Tensor:
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    if _fused(x):
        from rnn_longctx.models.kernels.rotary import Turned

        return Turned.apply(x, places.to(x.device), rates, 1.0)
    angles = places.to(x.device)[..., None, None] * rates  # (T, 1, D / 2) or (B, T, 1, D / 2)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    a, b = x.to(wide).split(half, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def _rates(x: Tensor, scaling: Yarn | None) -> Tensor:
    """Return the angles a token (D / 2), float64, by which x (B, T, H, D) is turned: for the fused kernel in whole
    turns."""
    return _table(x.shape[-1] // 2, x.device, scaling, 2 * math.pi if _fused(x) else 1.0)


@cache  # (else some six launches on a GPU, twice for every layer at every token)
def _table(half: int, device: torch.device, scaling: Yarn | None, unit: float) -> Tensor:
    with torch.inference_mode(False):  # a later call may train with it
        rates = BASE ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        return (rates if scaling is None else scaling.rates(rates)) / unit


def _fused(x: Tensor) -> bool:
    return choose.FUSED_LAYERS and choose.fits(x)
