"""Figures of a study from its tables alone: T_forget and T_recall over the size of the state, with fits and the
paper's; recall by length and depth; associative recall by number of pairs.

Drawn with matplotlib's Figure objects and no pyplot, in the colours of the other plots (Okabe and Ito's).
"""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from rnn_longctx.config import format_length, home_path
from rnn_longctx.eval.capacity import bound, paper, tables
from rnn_longctx.eval.capacity import fits as fitting
from rnn_longctx.eval.capacity.fits import MILLION, Fit, K
from rnn_longctx.eval.show.style import BLUE, GREEN, GREYS, GRID, MARKERS, PINK, RED, SKY, VERMILION, YELLOW, write
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text

_FITS = {"line": BLUE, "exponential": VERMILION, "power": GREEN, "constant": GREYS[1]}
_SHAPES = ("black", PINK, SKY, YELLOW)  # no colour of a fit
_BOUNDS = {
    "T_recall": {"above": "at least (the longest measured passes)", "below": "below (the shortest measured fails)"},
    "T_forget": {"above": "above (the longest trained fails)", "below": "at most (the shortest trained passes)"},
}


def draw(directory: str | Path, target: float) -> list[Path]:
    """Read the results and models.csv in `directory`; write findings.csv, points.csv, fits.csv, same_size.csv and
    mqar.csv and every figure there is data for. Returns the paths. Raises InputError: no tables."""
    directory = home_path(directory)
    results, about = tables.read(directory)
    lines = tables.findings(results, about, target)
    points = tables.points(lines)
    paths = []
    judged = {"fits": fitting.table(points), "same_size": tables.same_size(points)} if len(points) else {}
    if len(pairs := tables.associations(results, about)):
        judged["mqar"] = pairs
    for name, frame in {"findings": lines, "points": points, **judged}.items():
        paths.append(directory / f"{name}.csv")
        write_atomic(paths[-1], csv_text(frame).encode())
    for key, group in points.groupby(["mitigation", "quantity"], sort=False) if len(points) else []:
        mitigation, quantity = map(str, key)
        end = "" if mitigation == "none" else f" {mitigation}"
        paths.append(write(growth(group, quantity, mitigation), directory / f"{_slug(quantity + end)}.png"))
    if len(points) and len(depths := tables.by_depth(results, points)):
        paths.append(write(recall(depths), directory / "recall_by_depth.png"))
    if len(pairs):
        paths.append(write(mqar(pairs), directory / "mqar.png"))
    return paths


def growth(group: pd.DataFrame, quantity: str, mitigation: str) -> Figure:
    """Left: the points of one quantity, the fits, the interval of the best and the point it leans on. Right: the same
    beside the paper's, both axes logarithmic."""
    figure = Figure(figsize=(12.0, 6.6), layout="constrained")
    near, far = figure.subplots(1, 2)
    exact = group[group["bound"] == ""]
    s, y = (exact["state_elements"] / MILLION).to_list(), (exact["value"] / K).to_list()
    fits = fitting.fit_all(s, y)
    best = fitting.best(fits)
    x = np.linspace(0, 1.05 * float(group["state_elements"].max()) / MILLION, 200)[1:]
    for form, f in fits.items():
        _curve(near, x, f, form, form == best)
    for axes in (near, far):
        _points(axes, group)
    near.set_ylim(0, 1.1 * float(group[["value", "high"]].to_numpy(float, na_value=0).max()) / K)
    bent = fitting.best({form: f for form, f in fits.items() if form != "constant"})  # a constant leans on nothing
    if bent is not None and (i := fits[bent].carrier) is not None:
        near.plot(
            s[i],
            y[i],
            "o",
            markersize=15,
            markerfacecolor="none",
            markeredgecolor=RED,
            zorder=4,
            label=f"the {bent} leans on it: R² {fits[bent].r2_without:.3f} without",
        )
    if best is not None:
        far.plot(x, _positive(fits[best].curve(x)), color=_FITS[best], linewidth=1.6, label=f"ours, {best}")
    least = min(float(group["value"].min()) / K, _papers(far, quantity))
    if quantity.startswith("T_recall"):
        _most_pairs(far, group)
    far.set_xscale("log")
    far.set_yscale("log")
    far.set_ylim(bottom=least / 2)  # a seed that recalls nothing ends below
    far.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    far.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    for axes in (near, far):
        axes.set_xlabel("state, millions of numbers (scan and convolution)")
        axes.set_ylabel("K tokens")
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
    bounds = ", ".join(
        f"{n} {words}"
        for bound, words in _BOUNDS[quantity.split()[0]].items()
        if (n := (group["bound"] == bound).sum())
    )
    note = f"; not fitted (arrows): {bounds}" if bounds else ""
    if best is not None and (broken := fitting.contradicted(fits[best].curve, group[group["bound"] != ""])):
        note += f", {broken} against the {best}"
    on = "" if mitigation == "none" else f", {mitigation}"
    figure.suptitle(f"{quantity}{on}: {len(exact)} points{note}", fontsize=12, x=0.01, ha="left")
    return figure


def _curve(axes: Axes, x: np.ndarray, f: Fit, form: str, is_best: bool) -> None:
    colour = _FITS[form]
    judged = "" if math.isnan(f.r2) else f", R² {f.r2:.3f}, one left out {f.r2_loo:.3f}, AIC {f.aic:.1f}"
    label = textwrap.fill(f"{form}: {f.curve}{judged}", 60)
    axes.plot(
        x, f.curve(x), color=colour, linewidth=2 if is_best else 1, linestyle="-" if is_best else "--", label=label
    )
    if is_best and f.resampled:
        low, high = f.interval(x)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _papers(axes: Axes, quantity: str) -> float:
    """Stuffed Mamba's points and fit, and how well its points bear its form and the best. Returns the least length."""
    if (found := paper.of(quantity)) is None:
        return math.inf
    curve, sizes, lengths = found
    x = np.geomspace(min(sizes), max(sizes), 100)
    axes.plot(sizes, lengths, "*", color=GREYS[0], markersize=10, label="Stuffed Mamba's points, read off its figure")
    axes.plot(x, _positive(curve(x)), color=GREYS[0], linewidth=1.2, label=f"its fit, {curve}")
    fits = fitting.fit_all(sizes, lengths, 0)
    for form in dict.fromkeys((curve.form, fitting.best(fits))):
        if form is not None:
            judged = f"R² {fits[form].r2:.4f}, one left out {fits[form].r2_loo:.3f}"
            best = "best of the forms, " if form != curve.form else ""
            axes.plot([], [], " ", label=f"{form} refitted to its points: {best}{judged}")
    return min(lengths)


def _most_pairs(axes: Axes, group: pd.DataFrame) -> None:
    """The most pairs that the bits of each state hold, K of them where lengths are K tokens: another quantity."""
    known = group.dropna(subset=[bound.COLUMN]).sort_values("state_elements")
    if len(known):
        states, most = known["state_elements"] / MILLION, known[bound.COLUMN].astype(float) / K
        axes.plot(states, most, ":", marker=".", color=GREYS[0], label=f"{bound.LABEL}; in K pairs, not tokens")


def _points(axes: Axes, group: pd.DataFrame) -> None:
    """A marker and colour a width and depth; bars as far as T_forget's search or the seeds go; arrows for bounds."""
    for i, (_, some) in enumerate(group.groupby(["d_model", "n_layer"], dropna=False)):
        width, layers = some["d_model"].iloc[0], some["n_layer"].iloc[0]
        label = "" if pd.isna(layers) else f"ours, {layers!s} layers of width {width!s}"
        colour = _SHAPES[i % len(_SHAPES)]
        for row in some.to_dict("records"):
            at, value = row["state_elements"] / MILLION, row["value"] / K
            known = row["bound"] == ""
            fill = colour if known else "white"
            axes.plot(
                at,
                value,
                MARKERS[i % len(MARKERS)],
                color=colour,
                markersize=6,
                markerfacecolor=fill,
                label=label or None,
                zorder=3,
            )
            label = ""
            if not known:
                up = row["bound"] == "above"
                axes.annotate(
                    "",
                    (at, value * (1.18 if up else 0.82)),
                    (at, value),
                    arrowprops={"arrowstyle": "->", "color": colour},
                )
            elif not pd.isna(row["low"]) and not pd.isna(row["high"]):
                axes.vlines(at, max(float(row["low"]) / K, 1e-6), float(row["high"]) / K, color=colour, linewidth=1)


def recall(frame: pd.DataFrame) -> Figure:
    """A panel a shape: accuracy by length (across) and depth (down); the search decides which lengths there are."""
    shapes = list(dict.fromkeys(frame.sort_values("state_elements")["shape"]))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(11.0, 1.2 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(shapes) :]:
        panel.set_axis_off()
    image: Any = None
    for shape, panel in zip(shapes, panels.flat):
        some = frame[frame["shape"] == shape]
        grid = some.pivot_table(index="depth", columns="length", values="value")
        image = panel.imshow(grid.to_numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
        train = some["train_length"].iloc[0]
        inside = 0 if pd.isna(train) else int((grid.columns <= train).sum())
        if inside:
            panel.axvline(inside - 0.5, color=RED, linewidth=2, clip_on=False)
        of = "" if pd.isna(train) else f", trained at {format_length(int(train))}"
        size = _millions(some["state_elements"].iloc[0])
        panel.set_title(f"{shape}: state of {size}{of}", fontsize=8.5, loc="left")
        panel.spines[:].set_visible(False)
        step = -(-len(grid.columns) // 6)
        panel.set_xticks(
            range(0, len(grid.columns), step), [format_length(k) for k in grid.columns[::step]], fontsize=8
        )
        step = max(1, len(grid.index) // 3)
        panel.set_yticks(range(0, len(grid.index), step), [f"{d:.0%}" for d in grid.index[::step]], fontsize=8)
    for panel in panels[:, 0]:
        panel.set_ylabel("depth")
    figure.supxlabel("length, tokens, as the search asked (red: training length)", fontsize=10)
    figure.suptitle("Passkey accuracy of the models that T_recall is of", fontsize=12, x=0.01, ha="left")
    figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02, label="accuracy")
    return figure


def mqar(frame: pd.DataFrame) -> Figure:
    """A row a task, a panel a shape, smallest state first: accuracy over the number of pairs, a line a seed (shaded:
    its interval), the median of the seeds bold. Seeds are not averaged: one either learns to answer or does not."""
    tasks = list(dict.fromkeys(frame["task"]))
    shapes = list(dict.fromkeys(frame.sort_values("state_elements")["shape"]))
    figure = Figure(figsize=(1.0 + 1.9 * max(2, len(shapes)), 0.8 + 2.4 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(shapes), squeeze=False, sharex=True, sharey=True)
    ticks = sorted(frame["pairs"].unique())
    for row, task in zip(panels, tasks):
        for axes, shape in zip(row, shapes):
            some = frame[(frame["task"] == task) & (frame["shape"] == shape)]
            for _, one in some.groupby("train_seed", dropna=False):
                axes.plot(one["pairs"], one["value"], color=_FITS["line"], linewidth=1, alpha=0.8)
                axes.fill_between(one["pairs"], one["low"], one["high"], color=_FITS["line"], alpha=0.2, linewidth=0)
            middle = some.groupby("pairs")["value"].median()
            axes.plot(middle.index, middle, "o-", color="black", linewidth=2, markersize=3)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(ticks, [str(n) for n in ticks], fontsize=8)
            axes.set_ylim(0, 1.02)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(task, fontsize=10)
    for axes, shape in zip(panels[0], shapes):
        size = _millions(frame.loc[frame["shape"] == shape, "state_elements"].iloc[0])
        most = frame.loc[frame["shape"] == shape, bound.COLUMN].max()
        room = "" if pd.isna(most) else f"\nat most {_millions(most)} pairs*"
        axes.set_title(f"{shape}\nstate of {size}{room}", fontsize=8.5, loc="left")
    note = f"    (* {bound.LABEL})" if frame[bound.COLUMN].notna().any() else ""
    figure.supxlabel(f"pairs of key and value{note}", fontsize=10)
    figure.suptitle("Share of answers that are right: a line a seed, and their median", fontsize=12, x=0.01, ha="left")
    return figure


def _positive(y: np.ndarray) -> np.ndarray:
    """For a logarithmic axis: the paper's line is below zero for small states."""
    return np.where(y > 0, y, np.nan)


def _millions(n: float) -> str:
    return f"{n / MILLION:.3g}M" if n >= MILLION else f"{n / 1000:.3g}K"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")
