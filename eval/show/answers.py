"""What a comparison has of answers: a table a task, entries as rows and lengths as columns, and one page of plots."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import format_length
from rnn_longctx.eval.show.style import COLOURS, GREYS, GRID, MARKERS, RED, write
from rnn_longctx.eval.tables.compare import of_all_seeds


def guess(frame: pd.DataFrame, task: str) -> float | None:
    """Return what a guess scores, where the task says so."""
    values = frame.loc[(frame["metric"] == "chance") & (frame["task"] == task), "value"]
    return None if values.empty else float(values.iloc[0])


def answer_tables(frame: pd.DataFrame) -> list[RenderableType]:
    """Return a table a task, none where nothing was asked."""
    answers = of_all_seeds(frame, "accuracy", mitigation="none")
    pieces: list[RenderableType] = []
    for task, rows in answers.groupby("task", sort=False):
        lengths = sorted(int(n) for n in rows["length"].unique())
        grid = Table(box=None, pad_edge=False)
        for i, head in enumerate(("entry", "parameters", "rate", *map(format_length, lengths))):
            grid.add_column(head, justify="right" if i else "left")
        for entry, of_entry in rows.groupby("entry", sort=False):
            values = dict(zip(of_entry["length"], of_entry["value"]))
            first = of_entry.iloc[0]
            about = (str(entry), f"{int(first['parameters']):,}", f"{first['learning_rate']:g}")
            grid.add_row(*about, *(f"{values[n]:.2f}" if n in values else "" for n in lengths))
        if (chance := guess(frame, str(task))) is not None:
            grid.add_row("a guess", "", "", *(f"{chance:.2g}" for _ in lengths), style="dim")
        pieces += [Text(f"{task}: share of answers that are right, by length", style="bold"), grid, Text("")]
    return pieces


def draw_answers(frame: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Draw the shares over length as NAME.png and NAME.pdf, and at the longest length within training over the depth of
    the answers as recovery.png and recovery.pdf; nothing where nothing was asked. Returns the paths."""
    answers, train = of_all_seeds(frame, "accuracy", mitigation="none"), float(frame["train_length"].min())
    if answers.empty:
        return []
    figure, panels = _panels(frame, answers, "length")
    for task, panel in panels.items():
        lengths = sorted(int(n) for n in answers.loc[answers["task"] == task, "length"].unique())
        panel.axvline(train, color=RED, linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [format_length(n) for n in lengths], fontsize=8)
    figure.supxlabel("length, tokens (red: training length)", fontsize=10)
    paths = _written(figure, folder / name)
    recovery = of_all_seeds(frame, "recovery", mitigation="none")
    if len(recovery := recovery[recovery["length"] <= train]):
        recovery = recovery[recovery["length"] == recovery["length"].max()]
        figure, _ = _panels(frame, recovery, "depth")
        length = format_length(int(recovery["length"].iloc[0]))
        figure.supxlabel(f"depth at which the answer stands in {length} tokens (0: the first)", fontsize=10)
        paths += _written(figure, folder / "recovery")
    return paths


def _panels(frame: pd.DataFrame, answers: pd.DataFrame, over: str) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure, and its panels by their tasks, in which each entry is a line over a column."""
    tasks, entries = (list(dict.fromkeys(answers[column])) for column in ("task", "entry"))
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(0.8 + 3.6 * columns, 1.2 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(tasks) :]:
        panel.set_axis_off()
    for task, panel in zip(tasks, panels.flat):
        of_task = answers[answers["task"] == task]
        for i, entry in enumerate(entries):
            of_entry = of_task[of_task["entry"] == entry].astype({over: float}).sort_values(over)
            color, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
            panel.plot(of_entry[over], of_entry["value"], color=color, marker=marker, markersize=3, label=entry)
            panel.fill_between(of_entry[over], of_entry["low"], of_entry["high"], color=color, alpha=0.15, linewidth=0)
        if (chance := guess(frame, task)) is not None:
            panel.axhline(chance, color=GREYS[0], linestyle="--", linewidth=1.2, label="a guess")
        panel.set_ylim(-0.03, 1.03)
        panel.grid(axis="y", color=GRID, linewidth=0.8)
        panel.set_title(task, fontsize=9, loc="left")
    panels.flat[0].legend(fontsize=7)
    figure.supylabel("share of answers that are right", fontsize=10)
    return figure, dict(zip(tasks, panels.flat))


def _written(figure: Figure, path: Path) -> list[Path]:
    paths = [write(figure, path.with_suffix(".png")), path.with_suffix(".pdf")]
    figure.savefig(paths[1])
    return paths
