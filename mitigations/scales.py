"""The factors that `calibrate` tries of remedies that scale what a layer forgets or writes."""

from __future__ import annotations

ALPHAS = (1.0, 0.9999, 0.999, 0.998, 0.996, 0.99)  # of a decay, at most 1
FACTORS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # of a step or a rate
