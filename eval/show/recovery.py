"""Planted correlations recovered over gap, noise and strength: a table, and one page with a panel an entry.

Rows are those of the task `planted` at several settings of noise and strength (`rnn_longctx.tasks.planted`), at the
longest length within training; gaps are its depths. What is shown is the share of the links found, 0 of one who guesses
and 1 of one who always says the linked value: (right answers - a guess) / (strength of the link - a guess).
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import format_length
from rnn_longctx.eval.show.answers import guess
from rnn_longctx.eval.show.style import write
from rnn_longctx.eval.tables.compare import of_all_seeds

LABEL = re.compile(r"planted(?:-noise(?P<noise>[\d.]+))?(?:-strength(?P<strength>[\d.]+))?")
USUAL = {"noise": 0.5, "strength": 1.0}  # what a label does not say
SHORTEST = 2  # tokens, the shortest gap
LEAST = 2  # settings that make a grid


def recovered(frame: pd.DataFrame, metric: str = "recovery") -> pd.DataFrame:
    """Return the rows of the grid with columns `noise`, `strength` and `share`, of links found; none where fewer than
    LEAST settings were asked."""
    rows = of_all_seeds(frame, metric, mitigation="none")
    rows = rows[rows["length"] <= frame["train_length"].min()]
    rows = rows[rows["task"].str.fullmatch(LABEL.pattern).astype(bool)]
    if rows["task"].nunique() < LEAST:
        return rows.iloc[:0].assign(noise=0.0, strength=0.0, share=0.0)
    rows = rows[rows["length"] == rows["length"].max()]
    settings = [{k: float(v or USUAL[k]) for k, v in _match(task).groupdict().items()} for task in rows["task"]]
    rows = rows.assign(noise=[s["noise"] for s in settings], strength=[s["strength"] for s in settings])
    guessed = [guess(frame, task) or 0.0 for task in rows["task"]]
    rows = rows.assign(share=(rows["value"] - guessed) / (rows["strength"] - guessed))
    return rows[rows["strength"] > guessed]  # (else there is nothing to find)


def _match(task: str) -> re.Match[str]:
    match = LABEL.fullmatch(task)
    assert match is not None
    return match


def recovery_table(frame: pd.DataFrame) -> list[RenderableType]:
    """Return a table of the shares over all gaps, entries as rows, noises and strengths as columns; none where there is
    no grid."""
    rows = recovered(frame, "accuracy")
    if rows.empty:
        return []
    settings = sorted(set(zip(rows["noise"], -rows["strength"])))
    grid = Table(box=None, pad_edge=False)
    grid.add_column("entry")
    for noise, strength in settings:
        grid.add_column(f"noise {noise:g}\nstrength {-strength:g}", justify="right")
    for entry, of_entry in rows.groupby("entry", sort=False):
        shares = dict(zip(zip(of_entry["noise"], -of_entry["strength"]), of_entry["share"]))
        grid.add_row(str(entry), *(f"{shares[s]:.2f}" if s in shares else "" for s in settings))
    length = format_length(int(rows["length"].iloc[0]))
    title = f"Share of planted links found in {length} tokens, over all gaps (0: a guess)"
    return [Text(title, style="bold"), grid, Text("")]


def draw_recovery_grid(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the shares over gap, noise and strength as recovery_grid.png and recovery_grid.pdf; nothing where there is
    no grid. Returns the paths."""
    rows = recovered(frame)
    if rows.empty:
        return []
    entries = list(dict.fromkeys(rows["entry"]))
    settings = sorted(set(zip(rows["noise"], -rows["strength"])))
    depths = sorted((float(d) for d in rows["depth"].unique()), reverse=True)  # from the shortest gap on
    columns = min(4, len(entries))
    lines = math.ceil(len(entries) / columns)
    figure = Figure(figsize=(1.6 + 2.6 * columns, 1.3 + (0.6 + 0.2 * len(settings)) * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(entries) :]:
        panel.set_axis_off()
    for entry, panel in zip(entries, panels.flat):
        of_entry = rows[rows["entry"] == entry]
        shares = dict(
            zip(zip(of_entry["noise"], -of_entry["strength"], of_entry["depth"].astype(float)), of_entry["share"])
        )
        image = [[shares.get((*setting, depth), math.nan) for depth in depths] for setting in settings]
        drawn = panel.imshow(image, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_title(entry, fontsize=9, loc="left")
    length = int(rows["length"].iloc[0])
    _axes(panels.flat[0], settings, [_gap(depth, length) for depth in depths])
    for i, panel in enumerate(panels.flat[: len(entries)]):  # (the last ones have none below)
        panel.tick_params(labelsize=7, labelbottom=i >= len(entries) - columns)
    figure.colorbar(drawn, ax=panels, shrink=0.8, label="share of links found (0: a guess)")
    figure.supxlabel("gap, tokens", fontsize=10)
    figure.suptitle(f"Planted links found in {format_length(length)} tokens", fontsize=10, x=0.01, ha="left")
    path = folder / "recovery_grid.pdf"
    figure.savefig(path)
    return [write(figure, path.with_suffix(".png")), path]


def _axes(axes: Axes, settings: list[tuple[float, float]], gaps: list[float]) -> None:
    axes.set_yticks(range(len(settings)), [f"noise {n:g}, strength {-s:g}" for n, s in settings], fontsize=7)
    shown = range(0, len(gaps), max(1, len(gaps) // 4))
    axes.set_xticks(list(shown), [f"{gaps[i]:.0f}" for i in shown], fontsize=7)


def _gap(depth: float, length: int) -> float:
    """Return the gap in tokens at a depth, in the middle of those that share it."""
    return SHORTEST * math.exp(math.log((length - 1) / SHORTEST) * (1 - depth))
