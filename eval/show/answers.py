"""What a comparison has of answers: a table a task, entries as rows and lengths as columns, and one page of plots."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import format_length
from rnn_longctx.eval.show.style import COLOURS, GREYS, GRID, MARKERS, RED, write


def answers_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the shares of answers that are right, of all seeds together, without a remedy."""
    alike = (frame["metric"] == "accuracy") & frame["seed"].isna() & (frame["mitigation"] == "none")
    return frame[alike & (frame["train_length"] == frame["train_length"].min())]


def guess(frame: pd.DataFrame, task: str) -> float | None:
    """Return what a guess scores, where the task says so."""
    values = frame.loc[(frame["metric"] == "chance") & (frame["task"] == task), "value"]
    return None if values.empty else float(values.iloc[0])


def answer_tables(frame: pd.DataFrame) -> list[RenderableType]:
    """Return a table a task, none where nothing was asked."""
    answers = answers_of(frame)
    pieces: list[RenderableType] = []
    for task, rows in answers.groupby("task", sort=False):
        lengths = sorted(int(n) for n in rows["length"].unique())
        grid = Table(box=None, pad_edge=False)
        for i, head in enumerate(("entry", "parameters", "rate", *map(format_length, lengths))):
            grid.add_column(head, justify="right" if i else "left")
        for entry, own in rows.groupby("entry", sort=False):
            values = dict(zip(own["length"], own["value"]))
            first = own.iloc[0]
            about = (str(entry), f"{int(first['parameters']):,}", f"{first['learning_rate']:g}")
            grid.add_row(*about, *(f"{values[n]:.2f}" if n in values else "" for n in lengths))
        if (chance := guess(frame, str(task))) is not None:
            grid.add_row("a guess", "", "", *(f"{chance:.2g}" for _ in lengths), style="dim")
        pieces += [Text(f"{task}: share of answers that are right, by length", style="bold"), grid, Text("")]
    return pieces


def draw_answers(frame: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Draw the shares over length, a panel a task and a line an entry, as NAME.png and NAME.pdf; nothing where nothing
    was asked. Returns the paths."""
    answers = answers_of(frame)
    tasks, entries = (list(dict.fromkeys(answers[column])) for column in ("task", "entry"))
    if not tasks:
        return []
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(0.8 + 3.6 * columns, 1.2 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(tasks) :]:
        panel.set_axis_off()
    for task, panel in zip(tasks, panels.flat):
        of_task = answers[answers["task"] == task]
        for i, entry in enumerate(entries):
            own = of_task[of_task["entry"] == entry].sort_values("length").astype({"length": float})
            color, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
            panel.plot(own["length"], own["value"], color=color, marker=marker, markersize=3, label=entry)
            panel.fill_between(own["length"], own["low"], own["high"], color=color, alpha=0.15, linewidth=0)
        if (chance := guess(frame, task)) is not None:
            panel.axhline(chance, color=GREYS[0], linestyle="--", linewidth=1.2, label="a guess")
        panel.axvline(float(frame["train_length"].min()), color=RED, linewidth=1)
        lengths = sorted(int(n) for n in of_task["length"].unique())
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [format_length(n) for n in lengths], fontsize=8)
        panel.set_ylim(-0.03, 1.03)
        panel.grid(axis="y", color=GRID, linewidth=0.8)
        panel.set_title(task, fontsize=9, loc="left")
    panels.flat[0].legend(fontsize=7)
    figure.supxlabel("length, tokens (red: training length)", fontsize=10)
    figure.supylabel("share of answers that are right", fontsize=10)
    paths = [write(figure, folder / f"{name}.png"), folder / f"{name}.pdf"]
    figure.savefig(paths[1])
    return paths
