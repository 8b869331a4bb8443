"""Pictures of what a sparse model reads: kept blocks over position, shares of queries that hold the source, reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rnn_longctx.config import format_length, home_path
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.probes.explain import Explained
from rnn_longctx.probes.pictures import COLOURS, RED, write
from rnn_longctx.probes.reach import reached

FILL = {"window": "#bbbbbb", "sink": COLOURS[4], "chosen": COLOURS[0]}
BINS = 800  # of positions, in the picture of a reach
TALLEST = 14.0  # inches


def draw_explained(model: LanguageModel, explained: Explained, directory: str | Path) -> list[Path]:
    """Write links-QUERY.png and reach-QUERY.png, of each query of a text, of a task's first one, and held.png: those
    that there is something for. Return their paths."""
    out, paths = home_path(directory), []
    for query in explained.drawn:
        if explained.links is not None:
            figure = Figure(layout="constrained")
            table = explained.links
            _links(figure, table[(table["example"] == 0) & (table["query"] == query)], query, explained.sources)
            paths.append(write(figure, out / f"links-{query}.png"))
        if explained.reach is not None:
            figure = Figure(layout="constrained")
            _reach(figure, dict(reached(model, query)), query, explained.sources)
            paths.append(write(figure, out / f"reach-{query}.png"))
    if explained.shares is not None:
        figure = Figure(layout="constrained")
        _held(figure, explained.shares)
        paths.append(write(figure, out / "held.png"))
    return paths


def _links(figure: Figure, one: pd.DataFrame, query: int, sources: Sequence[int]) -> None:
    """Draw what each head reads for a query, a line a head."""
    heads = list(one.groupby(["layer", "head"]))
    figure.set_size_inches(9.0, min(TALLEST, 1.6 + 0.22 * len(heads)))
    axes = figure.subplots()
    for line, (_, read) in enumerate(heads):
        for kind, some in read.groupby("kind"):
            bars = list(zip(some["start"], some["stop"] - some["start"]))
            # (an edge: of a long context a block is narrower than a dot)
            axes.broken_barh(bars, (line - 0.4, 0.8), facecolors=FILL[str(kind)], edgecolors=FILL[str(kind)], lw=0.6)
    firsts = {layer: line for line, ((layer, _), _) in reversed(list(enumerate(heads)))}
    axes.set_yticks(list(firsts.values()), [f"layer {layer}" for layer in firsts])
    for line in list(firsts.values())[:-1]:
        axes.axhline(line - 0.5, color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_ylim(len(heads) - 0.5, -0.5)
    _positions(axes, query, sources, f"What each head reads at token {query}, a line a head")
    marks = [Patch(color=FILL[kind], label=kind) for kind in ("chosen", "sink", "window") if kind in set(one["kind"])]
    figure.legend(handles=marks, loc="outside lower right", ncols=3, frameon=False, fontsize=8)


def _held(figure: Figure, shares: pd.DataFrame) -> None:
    """Draw the share of the queries that hold the source, layer by head."""
    grid = shares.pivot(index="layer", columns="head", values="held")
    figure.set_size_inches(2.5 + 0.55 * grid.shape[1], 1.8 + 0.35 * grid.shape[0])
    axes = figure.subplots()
    image = axes.imshow(grid.to_numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(grid.shape[1]), [str(head) for head in grid.columns])
    axes.set_yticks(range(len(grid)), [str(layer) for layer in grid.index])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="share")
    low, high = shares["chance"].min(), shares["chance"].max()
    chance = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    axes.set_title(f"Queries that hold the source\n(chance: {chance})", fontsize=10, loc="left")


def _reach(figure: Figure, layers: dict, query: int, sources: Sequence[int]) -> None:
    """Draw which share of the tokens about a position each layer of LongNet has reached at a query."""
    figure.set_size_inches(9.0, min(TALLEST, 1.8 + 0.3 * len(layers)))
    axes = figure.subplots()
    edges = np.linspace(0, query + 1, min(BINS, query + 1) + 1).astype(int)
    sums = [np.add.reduceat(tokens.numpy().astype(float), edges[:-1]) / np.diff(edges) for tokens in layers.values()]
    mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, np.stack(sums), cmap="Blues", vmin=0, vmax=1)
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    figure.colorbar(mesh, ax=axes, label="share reached")
    _positions(axes, query, sources, f"From where information may be in token {query}, after each layer")


def _positions(axes: Axes, query: int, sources: Sequence[int], title: str) -> None:
    """Label the axis of positions, and mark the sources."""
    for token in sources:
        axes.axvline(token + 0.5, color=RED, linewidth=1.2)
    axes.set_xlim(0, query + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_length(round(x))))
    axes.set_xlabel("tokens" + (" (red: what says the answer)" if sources else ""))
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
