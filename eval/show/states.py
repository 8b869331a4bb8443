"""States while reading: which heads leave their range and how norms grow, of an entry and of it under each remedy that
the probe was repeated with; and, where it was, a page with a panel an entry."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.table import Table

from rnn_longctx.config import format_length
from rnn_longctx.eval.show.style import COLOURS, GRID, write
from rnn_longctx.eval.tables.compare import of_all_seeds

METRICS = ("heads", "heads_left", "onset", "worst_ratio", "state_growth", "state_growth_max")
COLUMNS = 4  # panels side by side, at the most


def of_states(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of states; an entry that was read with a remedy on is named with it."""
    rows = frame[frame["metric"].isin(METRICS)]
    return rows.assign(
        entry=rows["entry"].where(rows["mitigation"] == "none", rows["entry"] + ", " + rows["mitigation"])
    )


def states_table(frame: pd.DataFrame) -> Table:
    grid = Table(box=None, pad_edge=False)
    heads = ("entry", "heads that leave their range", "first at", "norm, times that at training length", "state")
    for i, head in enumerate(heads):
        grid.add_column(head, justify="right" if 0 < i < len(heads) - 1 else "left", overflow="fold")
    rows = of_states(frame)
    for _, row in of_all_seeds(rows, "heads_left").iterrows():
        entry = rows[rows["entry"] == row["entry"]]
        heads_of, onset = of_all_seeds(entry, "heads")["value"].iloc[0], of_all_seeds(entry, "onset")["value"]
        at = of_all_seeds(entry, "state_growth").sort_values("length")
        grid.add_row(
            row["entry"],
            f"{row['value']:.3g} of {heads_of:.0f}",
            f"{onset.iloc[0]:,.0f}" if len(onset) else "",
            f"{at['value'].iloc[-1]:.2f} at {format_length(int(at['length'].iloc[-1]))}" if len(at) else "",
            f"{int(row['state']):,} numbers",
        )
    return grid


def draw_states(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw how norms grow under each remedy, a panel an entry, as states.png and states.pdf; nothing where the probe
    was not repeated with a remedy on. Returns the paths."""
    growth, furthest = of_all_seeds(frame, "state_growth"), of_all_seeds(frame, "state_growth_max")
    remedies = list(dict.fromkeys(growth["mitigation"]))
    if set(remedies) <= {"none"}:
        return []
    entries = list(dict.fromkeys(growth["entry"]))
    columns = min(COLUMNS, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(1.0 + 3.1 * columns, 1.6 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(entries) :]:
        panel.set_axis_off()
    for entry, panel in zip(entries, panels.flat):
        for i, remedy in enumerate(remedies):
            mean, most = (
                some[(some["entry"] == entry) & (some["mitigation"] == remedy)].sort_values("length")
                for some in (growth, furthest)
            )
            _lines(panel, mean, most, COLOURS[i % len(COLOURS)], remedy)
        panel.set_title(entry, fontsize=8.5, loc="left")
    first = panels.flat[0]
    lengths = sorted(int(n) for n in growth["length"].unique())
    shown = lengths[:: -(-len(lengths) // 5)]
    first.set_xscale("log", base=2)
    first.set_yscale("log")
    first.set_xticks(shown, [format_length(n) for n in shown])
    first.xaxis.set_minor_locator(NullLocator())
    first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for panel in panels[:, 0]:
        panel.set_ylabel("norm, times that at training length")
    train = format_length(int(frame["train_length"].min()))
    for panel in panels.flat[max(0, len(entries) - columns) : len(entries)]:
        panel.tick_params(labelbottom=True)  # there is none below
        panel.set_xlabel("tokens read")
    title = "Norms of states. Solid: the geometric mean over heads, shaded its 95% interval over seeds;"
    figure.suptitle(
        f"{title}\ndotted: the head that grows most, the mean of seeds; against {train} tokens, the same remedy on",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    lines, names = first.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(3, len(names)), fontsize=8, frameon=False)
    paths = [write(figure, folder / "states.png"), folder / "states.pdf"]
    figure.savefig(paths[1])
    return paths


def _lines(axes: Axes, growth: pd.DataFrame, furthest: pd.DataFrame, colour: str, remedy: str) -> None:
    label = "as trained" if remedy == "none" else remedy
    axes.plot(growth["length"], growth["value"], color=colour, linewidth=1.6, marker="o", markersize=2.5, label=label)
    known = growth[growth["low"] > 0]  # a logarithmic axis has no place for others
    axes.fill_between(known["length"], known["low"], known["high"], color=colour, alpha=0.15, linewidth=0)
    axes.plot(furthest["length"], furthest["value"], color=colour, linewidth=0.9, linestyle=":")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
