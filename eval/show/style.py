"""The colours and marks of all plots: those of Okabe and Ito, which most colour-blind readers can tell apart; and how
sizes are written."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, YELLOW)
GREYS = ("#555555", "#8c8c8c", "#b0b0b0")
MARKERS = "osD^vPX"
RED = "#cc3311"  # marks the training length and the collapse threshold
GRID = "#e6e6e6"
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
UNMEASURED = "#dddddd"  # where a panel has no value


def write(figure: Figure, path: Path) -> Path:
    """Write a figure as a picture, sharp at 150 dots an inch; return its path."""
    FigureCanvasAgg(figure).print_figure(path, dpi=150)
    return path


def size(count: float) -> str:
    """Return a number of bytes in the largest unit that is not above it; nothing for NaN."""
    if math.isnan(count):
        return ""
    unit, each = next(((unit, each) for unit, each in _UNITS if count >= each), ("B", 1))
    return f"{count / each:.3g} {unit}"
