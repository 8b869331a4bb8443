"""The table of a comparison as a person sees it: printed, and as one page of plots a text."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import format_length
from rnn_longctx.eval.show.answers import answer_tables, draw_answers, guess
from rnn_longctx.eval.show.costs import cost_tables
from rnn_longctx.eval.show.recovery import draw_recovery_grid, recovery_table
from rnn_longctx.eval.show.states import draw_states, states_table
from rnn_longctx.eval.show.style import BLUE, GREYS, GRID, RED, write
from rnn_longctx.eval.tables.compare import DEFINITION, control, of_all_seeds

BESIDE = 2  # tasks whose answers stand in the table of losses; more have tables and a page of their own

_STYLES = {"collapses": "red", "drifts": "yellow", "holds": "green"}


def tables(frame: pd.DataFrame) -> list[RenderableType]:
    """Return a table a text, entries as rows, with what the verdicts mean; then answers, heads and remedies of every
    entry."""
    pieces: list[RenderableType] = []
    texts = [] if frame.empty else _texts(frame)
    for text in texts:
        train = int(frame["train_length"].dropna().min())
        title = f"Loss on {text} by length, in nats per token; gain: that of reading the last {train} tokens minus it"
        pieces += [Text(title, style="bold"), _main(frame, text), Text("")]
    if texts:
        pieces += [Text(DEFINITION, style="dim"), Text("")]
    if not texts or len(_tasks(frame)) > BESIDE:
        pieces += answer_tables(frame)
    pieces += [] if frame.empty else recovery_table(frame)
    for title, grid in (("States while reading", states_table(frame)), *_remedies(frame)):
        if grid.row_count:
            pieces += [Text(title, style="bold"), grid, Text("")]
    pieces += [] if frame.empty else cost_tables(frame)
    if len(refused := _not_applicable(frame)):
        pieces += [Text("Not applicable", style="bold"), *(Text(line, style="dim") for line in refused), Text("")]
    return pieces or [Text("no entry is measured yet")]


def _texts(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame.loc[frame["metric"] == "verdict", "text"]))


def _tasks(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(of_all_seeds(frame, "accuracy", mitigation="none")["task"]))


def _grid(*heads: str) -> Table:
    grid = Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        grid.add_column(head, justify="right" if 0 < i < len(heads) - 1 else "left", overflow="fold")
    return grid


def _main(frame: pd.DataFrame, text: str) -> Table:
    losses = of_all_seeds(frame, "loss", text=text, mitigation="none")
    lengths = sorted(int(n) for n in losses["length"].unique())
    tasks = tasks if len(tasks := _tasks(frame)) <= BESIDE else []
    heads = [task if (c := guess(frame, task)) is None else f"{task} (a guess: {c:.2g})" for task in tasks]
    grid = _grid("entry", "parameters", "rate", *map(format_length, lengths), "gain", *heads, "T_forget", "verdict")
    for entry in dict.fromkeys(losses["entry"]):
        of_entry = frame[frame["entry"] == entry]
        at_lengths = losses[losses["entry"] == entry]
        values = dict(zip(at_lengths["length"], at_lengths["value"]))
        verdict = of_all_seeds(of_entry, "verdict", text=text).iloc[0]
        forget = of_entry.loc[of_entry["metric"] == "T_forget", "note"]
        grid.add_row(
            entry,
            f"{int(at_lengths['parameters'].iloc[0]):,}",
            f"{at_lengths['learning_rate'].iloc[0]:g}",
            *(f"{values[n]:.3f}" if n in values else "" for n in lengths),
            _gain(of_all_seeds(of_entry, "gain", text=text, mitigation="none")),
            *(_recall(of_all_seeds(of_entry, "accuracy", task=task, mitigation="none")) for task in tasks),
            forget.iloc[0] if len(forget) else "",
            Text(verdict["note"], _STYLES.get(verdict["task"], "")),
        )
    return grid


def _gain(rows: pd.DataFrame) -> str:
    """Return the gain at the longest length, with its interval."""
    if rows.empty:
        return ""
    row = rows.sort_values("length").iloc[-1]
    span = "" if math.isnan(row["low"]) else f" ({row['low']:+.3f} to {row['high']:+.3f})"
    return f"{row['value']:+.3f}{span} at {format_length(int(row['length']))}"


def _recall(rows: pd.DataFrame) -> str:
    """Return the accuracies, from the shortest length to the longest."""
    rows = rows.sort_values("length")
    return " ".join(f"{format_length(int(n))} {v:.2f}" for n, v in zip(rows["length"], rows["value"]))


def _remedies(frame: pd.DataFrame) -> list[tuple[str, Table]]:
    """Return a table of losses under each remedy, and one of answers a task, entries as columns: at the longest length
    that remedies were measured at, of entries' seeds that all have it. Losses are over the slices that all rows have,
    the first ones of the same; prompts of another number stand at other depths."""
    of_seeds = frame[(frame["train_length"] == frame["train_length"].min()) & frame["seed"].notna()]
    tables = []
    for metric, what in (("loss", "nats per token"), ("accuracy", "share of answers that are right")):
        rows = of_seeds[of_seeds["metric"] == metric]
        bare = rows["mitigation"].isin(["none", *map(control, rows["train_length"].unique())])
        for (task, text), remedied in rows[~bare].groupby(["task", "text"], sort=False):
            length = remedied["length"].max()
            here = rows[(rows["task"] == task) & (rows["text"] == text) & (rows["length"] == length)]
            n = here["samples"].map(len).min() if metric == "loss" else 0
            title = f"Remedies: {what}" + (f", the first {n} slices of each seed" if n else "")
            values = [sum(list(s)[:n]) / n if n else v for s, v in zip(here["samples"], here["value"])]
            groups = here.assign(value=values).groupby(["mitigation", "entry"], sort=False)["value"]
            means, seeds = groups.mean(), here.groupby("entry")["seed"].nunique()
            complete = {key: means[key] for key, count in groups.count().items() if count == seeds[key[1]]}
            grid = _grid(f"{text or task} at {format_length(int(length))}", *dict.fromkeys(here["entry"]), "")
            for mitigation in dict.fromkeys(here["mitigation"]):
                cells = (complete.get((mitigation, entry)) for entry in dict.fromkeys(here["entry"]))
                grid.add_row(mitigation, *("" if cell is None else f"{cell:.3f}" for cell in cells), "")
            tables.append((title, grid))
    return tables


def _not_applicable(frame: pd.DataFrame) -> list[str]:
    """Return a line a reason: which remedy (or the probe), of which entries."""
    rows = frame[frame["metric"] == "not_applicable"]
    lines: dict[tuple[str, str], list[str]] = {}
    for _, row in rows.iterrows():
        what = row["task"] or row["mitigation"]
        note = re.sub(r"\b" + re.escape(row["entry"]) + r"-lr[\w.+-]*-T\d+-s\d+", "the model", row["note"])
        lines.setdefault((what, note), []).append(row["entry"])
    return [f"{what} ({', '.join(dict.fromkeys(entries))}): {note}" for (what, note), entries in lines.items()]


def draw(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw loss over length, a panel an entry with recomputing beside it: compare.png and compare.pdf, and a page more
    for each further text. Answers of more than a few tasks: answers, or without any loss compare, and over their depth
    recovery. Norms of states under remedies: states. Returns the paths."""
    paths = []
    for i, text in enumerate(_texts(frame)):
        figure = _page(frame, text)
        name = "compare" if i == 0 else "compare-" + re.sub(r"[^A-Za-z0-9.]+", "-", text)
        paths.append(write(figure, folder / f"{name}.png"))
        figure.savefig(folder / f"{name}.pdf")
        paths.append(folder / f"{name}.pdf")
    if not paths:
        paths = draw_answers(frame, folder, "compare")
    elif len(_tasks(frame)) > BESIDE:
        paths += draw_answers(frame, folder, "answers")
    return paths + draw_recovery_grid(frame, folder) + draw_states(frame, folder)


def _page(frame: pd.DataFrame, text: str) -> Figure:
    frame = frame[frame["train_length"] == frame["train_length"].min()]
    losses = frame[(frame["metric"] == "loss") & (frame["text"] == text)]
    entries = list(dict.fromkeys(losses["entry"]))
    columns = min(4, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(0.8 + 2.9 * columns, 1.1 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(entries) :]:
        panel.set_axis_off()
    for entry, panel in zip(entries, panels.flat):
        _panel(panel, losses[losses["entry"] == entry])
        note = of_all_seeds(frame[frame["entry"] == entry], "verdict", text=text)["note"].iloc[0]
        panel.set_title(f"{entry}\n{note}", fontsize=8.5, loc="left")
    _scales(panels.flat[0], losses)
    for panel in panels.flat[max(0, len(entries) - columns) : len(entries)]:
        panel.tick_params(labelbottom=True)  # there is none below
    for panel in panels[:, 0]:
        panel.set_ylabel("nats per token")
    train = int(frame["train_length"].min())
    figure.supxlabel("length, tokens (red: training length)", fontsize=10)
    what = f"Loss over positions (L/2, L] of {text}. Thin: a seed; thick: the mean of seeds;"
    title = f"{what}\ndashed: the last {train} tokens read afresh, the mean of seeds"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    bare = rows[rows["mitigation"] == "none"]
    for _, one in bare[bare["seed"].notna()].groupby("seed"):
        one = one.sort_values("length")
        axes.plot(one["length"], one["value"], color=BLUE, linewidth=0.7, alpha=0.6)
    mean = bare[bare["seed"].isna()].sort_values("length")
    axes.plot(mean["length"], mean["value"], color=BLUE, linewidth=1.8, marker="o", markersize=3)
    train_length = int(rows["train_length"].iloc[0])
    again = rows[(rows["mitigation"] == control(train_length)) & rows["seed"].isna()].sort_values("length")
    axes.plot(again["length"], again["value"], color=GREYS[0], linestyle="--", linewidth=1.4)
    axes.axvline(train_length, color=RED, linewidth=1)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _scales(axes: Axes, losses: pd.DataFrame) -> None:
    """Set the axes that all panels share: lengths in powers of two, losses logarithmic where one has collapsed."""
    lengths = sorted(int(n) for n in losses["length"].unique())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    shown = lengths[:: -(-len(lengths) // 5)]
    axes.set_xticks(shown, [format_length(n) for n in shown])
    values = [v for v in losses.loc[losses["mitigation"] == "none", "value"] if math.isfinite(v) and v > 0]
    if not values:
        return
    axes.set_ylim(0.93 * min(values), 1.07 * max(values))
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-2, 3) for m in (1, 1.5, 2, 3, 4, 6, 8)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
