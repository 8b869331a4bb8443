"""Three figures from the gathered table alone: loss over length, context gain over length, passkey by depth.

Drawn with matplotlib's Figure objects and no pyplot, so that nothing global changes and no display is needed.
Colours are those of Okabe and Ito, which most colour-blind readers can tell apart.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rnn_longctx.config import format_length, home_path
from rnn_longctx.eval.tables.sheets import Sheet, sheets

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # remedies
_GREYS = ("#555555", "#8c8c8c", "#b0b0b0")  # controls; the bare model is black
_MARKERS = "osD^vPX"
_RED = "#cc3311"  # marks the training length and the collapse threshold
_SIZE = (9.0, 5.0)  # inches; at 150 dpi sharp, at 900 pixels still readable


def plot_all(frame: pd.DataFrame, directory: str | Path) -> list[Path]:
    """Draw what the table has rows for: loss_over_length.png, context_gain.png, passkey.png (and any other
    accuracy task by its name). Of several models or texts, each gets its own files. Returns the paths."""
    directory = home_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    everything = sheets(frame)
    paths = []
    for sheet in everything:
        figures: dict[str, Figure | None]
        if sheet.kind == "loss":
            figures = {"loss_over_length": _loss(sheet), "context_gain": _gain(sheet)}
        else:
            figures = {sheet.task: _recall(sheet)}
        several = sum(other.task == sheet.task for other in everything) > 1
        end = "-" + _slug(f"{sheet.where['model']} {sheet.note}") if several else ""
        for name, figure in figures.items():
            if figure is not None:
                paths.append(directory / f"{name}{end}.png")
                FigureCanvasAgg(figure).print_figure(paths[-1], dpi=150)
    return paths


def _loss(sheet: Sheet) -> Figure:
    figure, axes = _axes(sheet, sheet.lengths)
    values = [c.value for row in sheet.cells.values() for c in row.values() if np.isfinite(c.value)]
    if values and max(values) > 3 * min(values) > 0:
        axes.set_yscale("log")  # a collapse by 5x must not flatten differences of 1%
        ticks = [m * 10.0**e for e in range(-3, 4) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for name, colour, dashes, marker in _looks(sheet):
        lengths, losses = sheet.values(name)
        error = np.nan_to_num([sheet.cells[name][k].stderr for k in lengths])
        axes.plot(lengths, losses, color=colour, linestyle=dashes, marker=marker, markersize=5, label=name)
        axes.fill_between(lengths, losses - error, losses + error, color=colour, alpha=0.15, linewidth=0)
    peak = sheet.peak("none")
    if peak is not None:
        label = f"collapse: above {2 * peak:.2f}, twice the highest loss within the training length"
        axes.axhline(2 * peak, color=_RED, linewidth=1, linestyle=":", label=label)
    axes.set_ylabel("loss, nats per token")
    axes.set_title(_title(sheet, "Loss over positions (L/2, L]"), loc="left")
    _legend(figure, axes)
    return figure


def _gain(sheet: Sheet) -> Figure | None:
    """Against the first `recompute:` control; None where there is none, or no samples."""
    control = next(iter(sheet.recomputes()), None)
    if control is None:
        return None
    names = [name for name in sheet.cells if not sheet.is_control(name)]
    gains = {n: {k: g for k in sheet.lengths if (g := sheet.gain(control, n, k))} for n in names}
    gains = {n: row for n, row in gains.items() if row}
    if not gains:
        return None
    lengths = sorted({k for row in gains.values() for k in row})
    figure, axes = _axes(sheet, lengths)
    # A collapsed model would flatten all else: what is over 10% worse than the control leaves the plot.
    floor = -0.1 * min((abs(v) for k in lengths if np.isfinite(v := sheet.cells[control][k].value)), default=0.0)
    axes.axhline(0, color="black", linewidth=1)
    looks = {name: look for name, *look in _looks(sheet)}
    for i, (name, row) in enumerate(gains.items()):
        colour, _, marker = looks[name]
        x = np.array(list(row)) * 2.0 ** (0.07 * (i - (len(gains) - 1) / 2))  # side by side, not on top
        value, low, high = (np.array([g[j] for g in row.values()]) for j in range(3))
        worst = min((v for v in value if not np.isnan(v)), default=0.0)
        label = name if worst >= floor else f"{name} (off the plot, to {worst:.2f})"
        axes.plot(x, value, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label)
        axes.vlines(x, low, high, color=colour, linewidth=2.5, alpha=0.5)
    shown = [v for row in gains.values() for g in row.values() for v in g[:3] if floor <= v < np.inf] + [0.0]
    margin = 0.08 * (max(shown) - min(shown)) or 0.01
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_ylabel("loss of control minus loss, nats per token")
    axes.set_title(_title(sheet, f"Context gain over {control}, 95% intervals"), loc="left")
    _legend(figure, axes)
    return figure


def _recall(sheet: Sheet) -> Figure:
    """One panel per mitigation: accuracy by length (across) and depth (down)."""
    names, lengths = list(sheet.cells), sheet.lengths
    depths = sorted({depth for row in sheet.depths.values() for _, depth in row})
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9.0, 1.2 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for name, panel in zip(names, panels.flat):
        grid = np.full((len(depths) or 1, len(lengths)), np.nan)
        for j, length in enumerate(lengths):
            if not depths and length in sheet.cells[name]:
                grid[0, j] = sheet.cells[name][length].value
            for i, depth in enumerate(depths):
                if (length, depth) in sheet.depths[name]:
                    grid[i, j] = sheet.depths[name][length, depth].value
        panel.set_facecolor("#dddddd")  # shows where nothing was measured
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
        if sheet.train_length is not None:
            inside = sum(length <= sheet.train_length for length in lengths)
            panel.axvline(inside - 0.5, color=_RED, linewidth=2)
        look = {"color": "#666666", "style": "italic"} if sheet.is_control(name) else {}
        panel.set_title(textwrap.fill(name, 34), fontsize=10, loc="left", **look)
        panel.spines[:].set_visible(False)
        step = -(-len(lengths) // 6)  # more labels would touch
        panel.set_xticks(range(0, len(lengths), step), [format_length(k) for k in lengths[::step]], fontsize=9)
        step = max(1, len(depths) // 3)
        panel.set_yticks(range(0, len(depths), step), [f"{d:.0%}" for d in depths[::step]], fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel("depth" if depths else "all depths")
    figure.supxlabel("length, tokens (red: training length; italic: control)", fontsize=10)
    figure.suptitle(_title(sheet, f"{sheet.task} accuracy"), fontsize=12, x=0.01, ha="left")
    figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02, label="accuracy")
    return figure


def _axes(sheet: Sheet, lengths: list[int]) -> tuple[Figure, Axes]:
    """Axes over lengths in powers of two, with the training length marked."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, [format_length(k) for k in lengths])
    axes.set_xlabel("length, tokens")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if sheet.train_length is not None:
        axes.axvline(sheet.train_length, color=_RED, linewidth=1.5, label="training length")
    return figure, axes


def _looks(sheet: Sheet) -> Iterable[tuple[str, str, str, str]]:
    """Name, colour, line style and marker of each mitigation: none black, controls dashed grey."""
    remedies = controls = 0
    for name in sheet.cells:
        if name == "none":
            yield name, "black", "-", "."
        elif sheet.is_control(name):
            yield name, _GREYS[controls % len(_GREYS)], ("--", "-.")[controls % 2], ""
            controls += 1
        else:
            yield name, _COLOURS[remedies % len(_COLOURS)], "-", _MARKERS[remedies % len(_MARKERS)]
            remedies += 1


def _legend(figure: Figure, axes: Axes) -> None:
    """Under the axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) < 30 else 2
    figure.set_figheight(_SIZE[1] + 0.22 * max(0, -(-len(labels) // columns) - 6))  # or many leave the axes no room
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=10)


def _title(sheet: Sheet, what: str) -> str:
    text = f" on {sheet.where['text']}" if sheet.where["text"] else ""
    return f"{what}: {sheet.where['model']}{text}" + (f"\n{sheet.note}" if sheet.note else "")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
