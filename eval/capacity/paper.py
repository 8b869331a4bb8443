"""Stuffed Mamba (arXiv 2410.07145): its points and fits, to be drawn and judged beside ours. Millions of numbers of
state, K tokens."""

from __future__ import annotations

import math

from rnn_longctx.eval.capacity.fits import Curve

# Five Mamba-2s of 36M to 370M parameters, read off the paper's figure (to 0.2K tokens of T_forget and 1.2K of T_recall,
# and taken for the powers of 2 that they lie at). Its fits take a sixth point that is no model: no state, no tokens.
# With it the points give its parameters again to 1.5%, and the line an R² of 0.985, where it says more than 0.999.
POINTS = {
    "T_forget": ((1.1, 1.0), (1.6, 2.0), (2.4, 8.0), (4.8, 16.0), (12.9, 64.0)),
    "T_recall": ((1.1, 1.0), (1.6, 2.0), (2.4, 4.0), (4.8, 16.0), (12.9, 256.0)),
}
_FITS = {
    "T_forget": Curve("line", 5.172, -4.469, 0.0),
    "T_recall": Curve("exponential", 4.756, -4.756 - 0.742, math.log(1.365)),  # 4.756 (1.365^s - 1) - 0.742
}


def of(quantity: str) -> tuple[Curve, tuple[float, ...], tuple[float, ...]] | None:
    """The paper's fit, states and lengths of T_forget or T_recall, whatever the needle; None of anything else."""
    name = quantity.split(" ")[0]
    return (_FITS[name], *zip(*POINTS[name])) if name in POINTS else None  # type: ignore[return-value]
