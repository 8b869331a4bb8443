"""Rotary positions (arXiv 2104.09864): queries and keys are turned by angles that grow with their place, so that what a
query reads of a key hangs on the distance between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rnn_longctx.models.kernels import choose

BASE = 10_000.0  # the slowest pair of channels turns by about 1 / BASE a token


def turned(x: Tensor, places: Tensor) -> Tensor:
    """Return x (B, T, H, D), D even, turned by the angles of its places (T) or (B, T), whole numbers.

    Channel i is turned together with channel i + D / 2. Angles are float64: at place 1,000,000 float32 is off by 0.06.
    """
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    rates = BASE ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    if _fused(x):
        from rnn_longctx.models.kernels.rotary import Turned

        return Turned.apply(x, places.to(x.device), rates / (2 * math.pi), 1.0)
    angles = places.to(x.device)[..., None, None] * rates  # (T, 1, D / 2) or (B, T, 1, D / 2)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    a, b = x.to(wide).split(half, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def _fused(x: Tensor) -> bool:
    return choose.FUSED_LAYERS and choose.fits(x)
