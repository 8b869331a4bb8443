"""Simultaneous perturbation (Spall 1992; MambaExtend's) over one value for every layer of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from rnn_longctx.mitigations.base import Remedy

LEAST = 0.01  # the smallest factor (MambaExtend)
LARGEST = 1e9  # a loss that is no number, to SPSA
LEAST_FORGOTTEN = 1e-5  # where SPSA begins for a decay that stays as it is


def spsa(
    start: Remedy, start_loss: float, layers: int, loss: Callable[[str], float], *, steps: int, seed: int
) -> Iterator[str]:
    """Yield the settings worth a look: the best of the way, and where it ends.

    Args:
        start: a remedy whose parameter `one_a_layer` has a single value, from which every layer begins.
        start_loss: its loss.
        loss: of a setting, as text; what is not finite counts as LARGEST.
        steps: two losses each.
    """
    rng = np.random.default_rng(seed)
    best = theta = np.full(layers, _first_point(start))
    least = start_loss
    for k in range(steps):
        size, reach = 0.5 / (k + 1 + steps / 10) ** 0.602, 0.1 / (k + 1) ** 0.101  # Spall's exponents
        direction = rng.choice([-1.0, 1.0], layers)
        up, down = (loss(_setting(start, theta + side * reach * direction)) for side in (1, -1))
        up, down = (v if math.isfinite(v) else LARGEST for v in (up, down))  # away from what is no number
        for value, point in ((up, theta + reach * direction), (down, theta - reach * direction)):
            if value < least:
                best, least = point, value
        theta = theta - np.clip(size * (up - down) / (2 * reach), -0.2, 0.2) * direction
    yield from dict.fromkeys((_setting(start, best), _setting(start, theta)))


def _first_point(remedy: Remedy) -> float:
    """The logarithm that every layer begins with: of the factor, or of what a factor on the decay forgets."""
    value = float(getattr(remedy, remedy.one_a_layer))
    return math.log(max(1 - value, LEAST_FORGOTTEN)) if remedy.forgets else math.log(value)


def _setting(remedy: Remedy, point: np.ndarray) -> str:
    """The remedy with one value a layer, from one logarithm a layer."""
    if remedy.forgets:
        values = "/".join(f"{1 - v:.7g}" for v in np.exp(point).clip(0, 0.5))
    else:
        values = "/".join(f"{max(LEAST, v):.4g}" for v in np.exp(point))
    changes: dict[str, Any] = {remedy.one_a_layer: values}
    return str(replace(remedy, **changes))
