"""Pictures of a probe, from its tables: maps of the heads, norms against the envelope, retention, loss, remembrance.

Drawn with matplotlib's Figure objects and no pyplot; colours that most colour-blind readers can tell apart (Okabe and
Ito's; PuOr where there are two sides).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, NullLocator

from rnn_longctx.config import format_length, home_path
from rnn_longctx.probes.onset import MARGIN, not_finite_is_beyond
from rnn_longctx.probes.probe import Probe

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RED = "#cc3311"  # marks the training length and the margin, as in the plots of an evaluation
WORST = 6  # heads drawn one by one
MAPS = 3  # lengths of the heat maps


def draw(probe: Probe, directory: str | Path) -> list[Path]:
    """Write sheet.png (all of them), heads.png, norms.png, retention.png, loss.png and remembrance.png where it was
    measured; return the paths."""
    directory, paths = home_path(directory), []
    panels: dict[str, Callable[[Axes, Probe], None]] = {"norms": _norms, "retention": _retention, "loss": _loss}
    if probe.remembrance is not None:
        panels["remembrance"] = _remembrance
    for name, panel in panels.items():
        figure = Figure(figsize=(9.0, 5.0), layout="constrained")
        panel(figure.subplots(), probe)
        paths.append(write(figure, directory / f"{name}.png"))
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    _maps(figure, probe)
    paths.append(write(figure, directory / "heads.png"))

    sheet = Figure(figsize=(12.0, 11.0), layout="constrained")
    halves = sheet.subfigures(2, 1, height_ratios=(0.4, 0.6), squeeze=False)[:, 0]
    _maps(halves[0], probe)
    places = list(halves[1].subplots(2, 2).flat)
    for axes, panel in zip(places, panels.values()):
        panel(axes, probe)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    about = probe.about
    sheet.suptitle(
        f"{about['model']} reads {format_length(about['length'])} tokens of {about['text']} ({about['prompt']})\n"
        + _wrapped(probe.verdict),
        fontsize=11,
        x=0.01,
        ha="left",
    )
    return [write(sheet, directory / "sheet.png"), *paths]


def ratios(probe: Probe) -> pd.DataFrame:
    """Return a table of layer, head, position, ratio (the mean norm over the envelope's, infinite where it is not
    finite) of a probe's trace."""
    trace = probe.trace.assign(norm=not_finite_is_beyond(probe.trace["norm"]))
    mean = trace.groupby(["layer", "head", "position"], as_index=False)["norm"].mean()
    limits = np.array([probe.envelope[layer][head] for layer, head in zip(mean["layer"], mean["head"])])
    return mean.assign(ratio=mean["norm"] / limits)


def _maps(figure: FigureBase, probe: Probe) -> None:
    """Draw log2 of norm over envelope, layer by head, at the training length, at the end and between."""
    table, train = ratios(probe), probe.about["train_length"]
    looks = np.sort(table["position"].unique())
    lengths = np.geomspace(min(train, looks[-1]), looks[-1], MAPS)
    chosen = sorted({int(looks[np.abs(looks - w).argmin()]) for w in lengths})
    axes = figure.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    for panel, position in zip(axes, chosen):
        grid = table[table["position"] == position].pivot(index="layer", columns="head", values="ratio")
        values = np.log2(grid.to_numpy().clip(2.0**-6, 2.0**6))
        image = panel.imshow(values, cmap="PuOr_r", vmin=-6, vmax=6, aspect="auto", interpolation="nearest")
        left = np.argwhere(grid.to_numpy() > MARGIN)
        panel.plot(left[:, 1], left[:, 0], ".", color="black", markersize=3)
        panel.set_title(f"{format_length(position)} tokens", fontsize=10, loc="left")
        panel.set_xlabel("head")
        panel.set_yticks(range(len(grid)), [str(i) for i in grid.index])
        panel.spines[:].set_visible(False)
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.02, label="norm over the largest in training")
    bar.set_ticks([-6, -3, 0, 3, 6], labels=["1/64", "1/8", "1", "8", "64"])


def _norms(axes: Axes, probe: Probe) -> None:
    table = ratios(probe)
    everyone = table.pivot(index="position", columns=["layer", "head"], values="ratio")
    axes.plot(everyone.index, everyone.to_numpy(), color="#cccccc", linewidth=0.6, zorder=1)
    for i, (layer, head) in enumerate(zip(probe.heads["layer"][:WORST], probe.heads["head"][:WORST])):
        one = everyone[layer, head]
        axes.plot(one.index, one, color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=f"layer {layer} head {head}")
    axes.axhline(MARGIN, color=RED, linestyle=":", linewidth=1, label=f"leaves its range: above {MARGIN:g}")
    axes.set_yscale("log")
    _positions(axes, probe, "State norm over its largest in training")
    axes.legend(fontsize=8, frameon=False, ncols=2)


def _retention(axes: Axes, probe: Probe) -> None:
    mean = probe.trace.groupby(["layer", "head", "position"])["retention"].mean()
    everyone = mean.unstack(["layer", "head"])
    axes.plot(everyone.index, everyone.to_numpy(), color="#cccccc", linewidth=0.6, zorder=1)
    for i, (layer, head) in enumerate(zip(probe.heads["layer"][:WORST], probe.heads["head"][:WORST])):
        axes.plot(everyone.index, everyone[layer, head], color=COLOURS[i % len(COLOURS)], linewidth=1.6)
    axes.set_ylim(-0.02, 1.02)
    _positions(axes, probe, "Share left of the first token")


def _loss(axes: Axes, probe: Probe) -> None:
    axes.plot(probe.losses["position"], probe.losses["loss"], color="#bbbbbb", linewidth=0.8)
    smooth = probe.losses["loss"].rolling(8, min_periods=1).mean()
    axes.plot(probe.losses["position"], smooth, color="black", linewidth=1.6)
    onset = probe.heads["onset"].dropna()
    if len(onset):
        axes.plot(
            np.sort(onset),
            np.full(len(onset), smooth.min()),
            "|",
            color=COLOURS[1],
            markersize=10,
            label=f"a head leaves its range ({len(onset)})",
        )
        axes.legend(fontsize=8, frameon=False)
    _positions(axes, probe, "Loss, nats per token")


def _remembrance(axes: Axes, probe: Probe) -> None:
    assert probe.remembrance is not None
    mean = probe.remembrance[probe.remembrance["cut"] > 0].groupby("kept")["tv"].mean()
    axes.plot(mean.index, mean, color=COLOURS[0], marker="o", markersize=4)
    axes.set_ylim(0, 1)
    _positions(axes, probe, "Effective remembrance: what the rest still changes")
    axes.set_xlabel("tokens kept")


def _positions(axes: Axes, probe: Probe, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_length(round(x))))
    axes.axvline(probe.about["train_length"], color=RED, linewidth=1.5)
    axes.set_xlabel("tokens (red: training length)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 120))


def write(figure: Figure, path: Path) -> Path:
    """Write a figure as a picture; return its path."""
    FigureCanvasAgg(figure).print_figure(path, dpi=150)
    return path
