"""The page of an evaluation's folder: losses and answers over length with each remedy, what they gain and what they
cost."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from rnn_longctx.config import counted, format_length
from rnn_longctx.eval.results import RUNS, Results
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import INK, Line, control, is_log, lengths_axis, level, look, number, upright
from rnn_longctx.eval.show.page.parts import KINDS, Figure, Kind, Page, Section, Switch, Table
from rnn_longctx.eval.show.style import size
from rnn_longctx.eval.stats import wilson
from rnn_longctx.eval.tables.conclusion import conclusion
from rnn_longctx.eval.tables.leaderboard import leaderboard
from rnn_longctx.eval.tables.sheets import Sheet, kind_of, placed, sheets
from rnn_longctx.tasks.base import TASKS

MANY = 8  # remedies and controls that are all shown at first; of more, the best
MOST = 4  # values of a line of the header
TEXTS = ("stdlib", "site-packages", "builtin")  # texts that are named alike everywhere
# As remedies write themselves, values of several layers between slashes: no file's name, no other text.
REMEDY = re.compile(r"[a-z][\w.,=+:-]*(/[\d.e+-]+)*[\w.,=+:-]*", re.ASCII)
FEW = 8  # columns of a heat map whose cells have their numbers
_ABOUT = {
    "model": "model", "weights_hash": "weights", "tokenizer": "tokenizer", "train_length": "training length",
    "text": "text", "device": "device", "dtype": "computed in", "state_dtype": "states kept in", "backend": "backend",
    "seed": "seed", "plugins": "plugins", "version": "version of rnn-longctx",
}  # fmt: skip
_COSTS = {
    "seconds": "reading, s", "tokens_per_second": "tokens per second", "first_token_seconds": "first token, s",
    "next_token_seconds": "next token, s", "peak_bytes": "most memory, bytes",
}  # fmt: skip


def fits(path: Path) -> bool:
    return any((path / name).is_file() for name in ("results.parquet", "results.csv"))


def page(path: Path) -> Page:
    """Return the page of a folder with a table of results. Raises InputError: it cannot be read."""
    frame = Results.read(path)
    models = list(dict.fromkeys(frame["model"].dropna()))
    title = f"{', '.join(models[:3])}{' and more' if len(models) > 3 else ''} over length"
    ran = commands(path / RUNS)
    last = "measured by" if len(ran) == 1 else f"measured by (the last of {len(ran)})"
    again = {last: ran[-1]} if ran else {"a command that asks the same": _command(frame)}
    return Page(title, verdict(frame), about(frame) | {k: v for k, v in again.items() if v}, sections(frame))


def commands(runs: Path) -> list[str]:
    """Return the command lines that measured a folder, each once, as far as its file of runs says so. What is no one
    command of this package (a script of somebody's, a line that a shell would take for several) is left out."""
    found: dict[str, None] = {}
    try:
        lines = runs.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            command = json.loads(line)["command"]
            words = shlex.split(command)
            if words[:1] == ["rnn-longctx"] and shlex.join(words) == command:
                found.pop(command, None)
                found[command] = None
    return list(found)


def verdict(frame: pd.DataFrame) -> list[str]:
    """Return what a table of results says, a clause an item."""
    clauses = [clause for line in conclusion(frame).splitlines() for clause in line.rstrip(".").split("; ")]
    return [f"{clause[:1].upper()}{clause[1:]}." for clause in clauses] or ["Nothing is measured yet."]


def about(frame: pd.DataFrame) -> dict[str, str]:
    """Return the header of a table of results: what was measured, on what, and by which version."""
    lines, losses = {}, frame["metric"].map(kind_of) == "loss"
    for column, name in _ABOUT.items():
        rows = frame[losses] if column == "text" else frame
        values = list(dict.fromkeys(rows[column].dropna())) if column in frame else []
        if values:
            texts = [format_length(int(v)) if column == "train_length" else str(v) for v in values]
            lines[name] = ", ".join(texts[:MOST]) + (f" and {len(texts) - MOST} more" if len(texts) > MOST else "")
    lines["measured"] = counted(len(frame), "row")
    return lines


def _command(frame: pd.DataFrame) -> str:
    """Return a command that asks for the same model, lengths, tasks and remedies. Nothing of several models, nor where
    a task, remedy or text has a name in the table that `eval` does not take: those of files are shortened, and those of
    plugins are known with the plugin alone."""
    if frame["model"].nunique() != 1 or ("plugins" in frame and frame["plugins"].notna().any()):
        return ""
    lengths = ",".join(format_length(int(n)) for n in sorted(frame["length"].dropna().unique()))
    words = ["rnn-longctx", "eval", str(frame["model"].iloc[0]), "--lengths", lengths]
    for option, column in (("--task", "task"), ("--mitigation", "mitigation"), ("--text", "text")):
        rows = frame[frame["metric"].map(kind_of) == "loss"] if column == "text" else frame
        for value in dict.fromkeys(rows[column].dropna()):
            names = {"task": ("lm", *TASKS), "text": TEXTS}.get(column)
            known = value in names if names else REMEDY.fullmatch(str(value))
            if not known:
                return ""
            words += [option, str(value)]
    return shlex.join(words)


def sections(frame: pd.DataFrame) -> list[Section]:
    """Return the sections of a table of results."""
    everything = sheets(frame)
    losses = [part for sheet in everything if sheet.kind == "loss" for part in loss_figures(sheet)]
    answers = [part for sheet in everything if sheet.kind == "accuracy" for part in answer_figures(sheet)]
    parts: list[tuple[str, Sequence[Figure | Table]]] = [
        ("Loss over length", losses),
        ("Answers over length and depth", answers),
        ("Remedies ranked", ranking(frame)),
        ("Cost", costs(frame)),
        ("All that was measured", [Table("Every row", frame.drop(columns="samples").dropna(axis=1, how="all"))]),
    ]
    return [Section(title, some) for title, some in parts if some]


def title_of(sheet: Sheet, what: str) -> str:
    """Return what a figure is of: a task of a model, on a text, and what tells the sheet from others."""
    on = f" on {sheet.where['text']}" if sheet.where["text"] else ""
    return f"{what}: {sheet.where['model']}{on}" + (f" [{sheet.note}]" if sheet.note else "")


def looks(sheet: Sheet) -> dict[str, dict[str, Any]]:
    """Return colour, dash and symbol of each mitigation: the bare model in ink, controls grey and dashed."""
    looks, remedies, controls = {}, 0, 0
    for name in sheet.cells:
        if name == "none":
            looks[name] = {"colour": INK, "symbol": "circle", "dash": "solid"}
        elif sheet.is_control(name):
            looks[name], controls = control(controls), controls + 1
        else:
            looks[name], remedies = look(remedies), remedies + 1
    return looks


def shown_first(sheet: Sheet) -> set[str]:
    """Return the mitigations that are shown at first: all where there are few; else the bare model, the best control
    and the best remedies at the longest length."""
    if len(sheet.cells) <= MANY:
        return set(sheet.cells)
    sign = 1 if sheet.kind == "loss" else -1

    def rank(name: str) -> tuple[int, float]:
        longest = max(sheet.cells[name])
        value = sheet.cells[name][longest].value
        return (-longest, math.inf if math.isnan(value) else sign * value)

    controls = sorted((n for n in sheet.cells if sheet.is_control(n)), key=rank)
    return {"none", *controls[:1], *sorted(sheet.remedies(), key=rank)[: MANY - 2]} & set(sheet.cells)


def loss_figures(sheet: Sheet) -> list[Figure]:
    """Return the figures of one sheet of losses: over length, and what each remedy gains over re-reading."""
    first, of = shown_first(sheet), []
    for name, how in looks(sheet).items():
        lengths, values = sheet.values(name)
        errors = [0.0 if math.isnan(e := sheet.cells[name][n].stderr) else e for n in lengths]
        low, high = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
        of.append(Line(name, lengths, values, low, high, on=name in first, **how))
    y = figures.values_axis([v for line in of for v in line.y], "loss, nats per token")
    marks = training(sheet)
    if (peak := sheet.peak("none")) is not None:
        marks.append(level(2 * peak, f"collapse: above {2 * peak:.2f}", is_log(y)))
    title = title_of(sheet, "Loss over positions (L/2, L]")
    words = at_the_end(sheet, "loss in nats per token", ".3f") + " Shaded: one standard error over slices of the text."
    loss = figures.lines(title, words, cells_table(sheet), of, lengths_axis(sheet.lengths), y, marks)
    gain = gain_figure(sheet)
    return [loss] if gain is None else [loss, gain]


def training(sheet: Sheet) -> list[dict[str, Any]]:
    """Return the mark of the training length, where it is known."""
    return [] if sheet.train_length is None else [upright(sheet.train_length, "training length")]


def at_the_end(sheet: Sheet, what: str, form: str) -> str:
    """Return a sentence with each mitigation's value at the longest length, the best first."""
    length = max(sheet.lengths)
    here = {n: row[length].value for n, row in sheet.cells.items() if length in row}
    sign = 1 if sheet.kind == "loss" else -1
    order = sorted(here, key=lambda n: math.inf if math.isnan(here[n]) else sign * here[n])
    texts = [f"{number(here[n], form)} {'without a remedy' if n == 'none' else f'with {n}'}" for n in order[:MANY]]
    more = f", and {len(order) - MANY} more" if len(order) > MANY else ""
    return f"At {format_length(length)} tokens the {what} is {', '.join(texts)}{more}."


def cells_table(sheet: Sheet) -> pd.DataFrame:
    """Return a row a mitigation and length of a sheet."""
    rows = [
        {"mitigation": name, "length": length, "value": cell.value, "stderr": cell.stderr, "n": cell.n}
        for name, row in sheet.cells.items()
        for length, cell in sorted(row.items())
    ]
    return pd.DataFrame(rows)


def gain_figure(sheet: Sheet) -> Figure | None:
    """Return the context gain over the first `recompute:` control with its 95% intervals; None where there is none."""
    against = next(iter(sheet.recomputes()), None)
    if against is None:
        return None
    rows: dict[str, dict[int, Any]] = {}
    for name in (n for n in sheet.cells if not sheet.is_control(n)):
        if gains := {n: g for n in sheet.lengths if (g := sheet.gain(against, name, n)) and math.isfinite(g.gain)}:
            rows[name] = gains
    if not rows:
        return None
    # What is over 10% worse than the control would flatten all else, and is off at first.
    floor = -0.1 * min((abs(c.value) for c in sheet.cells[against].values() if math.isfinite(c.value)), default=0.0)
    first, styles, plot, switches = shown_first(sheet), looks(sheet), go.Figure(), []
    for i, (name, gains) in enumerate(rows.items()):
        aside = 2.0 ** (0.07 * (i % MANY - (min(MANY, len(rows)) - 1) / 2))  # side by side, not on top
        value, low, high = ([g[j] for g in gains.values()] for j in range(3))
        bars = {"array": [_over(h - v) for h, v in zip(high, value)],
                "arrayminus": [_over(v - l) for v, l in zip(value, low)], "thickness": 1.5, "width": 3}  # fmt: skip
        style = styles[name]
        plot.add_scatter(
            x=[n * aside for n in gains],
            y=value,
            name=name,
            mode="lines+markers",
            line={"color": style["colour"], "dash": style["dash"], "width": 1.5},
            marker={"symbol": style["symbol"], "size": 7, "color": style["colour"]},
            error_y=bars | {"color": style["colour"]},
            customdata=[format_length(n) for n in gains],
            hovertemplate="%{customdata}: %{y:+.4g}",
        )
        on = name in first and min(value) >= floor
        label = name if min(value) >= floor else f"{name} (down to {min(value):.2f})"
        switches.append(Switch(label, [i], on))
    if not any(s.on for s in switches):
        switches = [Switch(s.label, s.traces) for s in switches]
    y = {"title": {"text": "loss of control minus loss, nats per token"}, "zeroline": True, "zerolinecolor": INK}
    plot.update_layout(xaxis=lengths_axis(sheet.lengths), yaxis=y)
    figures.add_marks(plot, training(sheet))
    frame = pd.DataFrame(
        [{"mitigation": m, "length": n, **g._asdict()} for m, gains in rows.items() for n, g in gains.items()]
    )
    return Figure(
        title_of(sheet, f"Context gain over {against}, 95% intervals"), plot, _gain_words(rows), frame, switches
    )


def _over(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _gain_words(rows: dict[str, dict[int, Any]]) -> str:
    texts = []
    for name, gains in rows.items():
        n = max(gains)
        gain = gains[n]
        span = "one slice has no interval" if math.isnan(gain.low) else f"95% {gain.low:+.3f} to {gain.high:+.3f}"
        whose = "without a remedy" if name == "none" else f"with {name}"
        texts.append(f"{gain.gain:+.3f} {whose} at {format_length(n)} ({span})")
    more = f", and {len(texts) - MANY} more" if len(texts) > MANY else ""
    return (
        "Above 0 the state holds what re-reading the last tokens does not give, where the interval is above 0 surely. "
        f"The gain is {', '.join(texts[:MANY])}{more}."
    )


def answer_figures(sheet: Sheet) -> list[Figure]:
    """Return the share of right answers over length, and a map by length and depth for each mitigation."""
    first, of = shown_first(sheet), []
    for name, how in looks(sheet).items():
        lengths, values = sheet.values(name)
        cells = [sheet.cells[name][n] for n in lengths]
        spans = [wilson(c.value * c.n, c.n) if c.n and 0 <= c.value <= 1 else None for c in cells]
        low, high = ([v if s is None else s[j] for v, s in zip(values, spans)] for j in (1, 2))
        of.append(Line(name, lengths, values, low, high, on=name in first, **how))
    marks = training(sheet)
    if sheet.chance is not None and sheet.chance > 0.01:
        marks.append(level(sheet.chance, "a guess"))
    y = figures.share_axis("share of answers that are right")
    words = at_the_end(sheet, f"share of right answers of {sheet.task}", ".2f") + " Shaded: 95% intervals (Wilson's)."
    table = cells_table(sheet)
    over = figures.lines(
        title_of(sheet, f"{sheet.task}, right answers"), words, table, of, lengths_axis(sheet.lengths), y, marks
    )
    mapped = [name for name in sheet.cells if sheet.depths[name] and name in first]
    return [over, *(depth_map(sheet, name) for name in mapped)]


def depth_map(sheet: Sheet, name: str) -> Figure:
    """Return the accuracies of one mitigation by length (across) and depth (down)."""
    cells = sheet.depths[name]
    lengths, depths = sheet.lengths, sorted({depth for row in sheet.depths.values() for _, depth in row})
    grid = [[cells[n, d].value if (n, d) in cells else None for n in lengths] for d in depths]
    across, down = [format_length(n) for n in lengths], [f"{d:.0%}" for d in depths]
    template = {"texttemplate": "%{z:.2f}"} if len(lengths) <= FEW else {}
    hover = {"hovertemplate": "%{x}, depth %{y}: %{z:.2f}<extra></extra>"}
    plot = go.Figure(figures.heat_map(grid, across, down, "accuracy", **template, **hover))
    figures.grid_axes(plot, "length, tokens", "depth", columns=across)
    plot.update_layout(height=300)
    if sheet.train_length is not None and (inside := sum(n <= sheet.train_length for n in lengths)):
        line = {"type": "line", "x0": inside - 0.5, "x1": inside - 0.5, "y0": 0, "y1": 1, "yref": "paper"}
        plot.add_shape(**line, line={"color": figures.MARK, "width": 2})
    frame = pd.DataFrame(
        [{"length": n, "depth": d, "accuracy": c.value, "n": c.n} for (n, d), c in sorted(cells.items())]
    )
    return Figure(f"{sheet.task}, {name}", plot, _depth_words(sheet, name), frame, small=True)


def _depth_words(sheet: Sheet, name: str) -> str:
    cells = sheet.depths[name]
    n, d = min(cells, key=lambda at: (cells[at].value, at))
    all_right = [k for k, cell in sheet.cells[name].items() if cell.value >= 1]
    best = f"All are right up to {format_length(max(all_right))}. " if all_right else ""
    worst = f"Fewest are right at depth {d:.0%} of {format_length(n)}: {cells[n, d].value:.0%}."
    return best + worst + ("" if sheet.train_length is None else " The line marks the training length.")


def ranking(frame: pd.DataFrame) -> list[Table]:
    """Return the leaderboard, the longest length of each model and text, best first."""
    board = leaderboard(frame)
    if board.empty:
        return []
    longest = board.groupby(["model", "text"], dropna=False)["length"].transform("max")
    note = (
        "gain: nats per token below the best control at that length, with its 95% interval; change_short: loss over "
        "that without a remedy within the training length; speed, memory: over those without a remedy; wins: what "
        "surely beats every control. A remedy that wins nothing only forgets."
    )
    tables = [Table("At the longest length", board[board["length"] == longest].dropna(axis=1, how="all"), note)]
    if (board["length"] != longest).any():
        tables.append(Table("At every length", board.dropna(axis=1, how="all")))
    return tables


def costs(frame: pd.DataFrame) -> list[Table]:
    """Return what reading took: seconds, tokens a second, the first and next token of an answer, memory."""
    rows = placed(frame)
    rows = rows[rows["depth"].isna() & rows["metric"].isin(["nats_per_token", "accuracy"])]
    known = [c for c in _COSTS if rows[c].notna().any()]
    if not known:
        return []
    what = ["model"] * (rows["model"].nunique() > 1) + ["mitigation", "task", "length", "device"]
    table = rows[[*what, *known]].dropna(subset=known, how="all").sort_values(what, ignore_index=True)
    return [Table("Reading and answering", table.rename(columns=_COSTS), _cost_words(rows))]


def _cost_words(rows: pd.DataFrame) -> str:
    """Return the most memory, and the units."""
    peak = rows["peak_bytes"].dropna()
    most = f" Most memory: {size(float(peak.max()))}." if len(peak) else ""
    return f"First and next token: of an answer, after its prompt. On a CPU memory is the whole process's.{most}"


KINDS.register(Kind("eval", fits, page))
