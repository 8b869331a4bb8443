"""The page of a comparison: the entries' losses and answers over length, their states, remedies and costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from rnn_longctx.config import counted, format_length
from rnn_longctx.eval.show.answers import guess
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import Line, lengths_axis, level, look, number, upright
from rnn_longctx.eval.show.page.parts import KINDS, Figure, Kind, Page, Section, Table
from rnn_longctx.eval.show.recovery import recovered
from rnn_longctx.eval.show.states import of_states
from rnn_longctx.eval.tables.compare import DEFINITION, FILE, of_all_seeds, read

MANY = 10  # entries that are all shown at first
_TRAINING = {
    "train_tokens": "tokens", "train_seconds": "seconds", "train_joules": "joules", "train_cost": "cost",
    "score_tokens": "tokens to the score", "score_seconds": "seconds to the score", "score_cost": "cost to the score",
}  # fmt: skip
_READING = {
    "tokens_per_second": "tokens per second", "first_token_seconds": "first token, s",
    "next_token_seconds": "next token, s", "peak_bytes": "most memory, bytes", "carry_bytes": "kept, bytes",
    "first_token_joules": "first token, J", "next_token_joules": "next token, J",
    "first_token_cost": "cost of the first token", "next_token_cost": "cost of the next token",
}  # fmt: skip
_STATES = {
    "heads": "heads", "heads_left": "heads that leave their range", "onset": "first at, tokens",
    "worst_ratio": "largest ratio to the range",
}  # fmt: skip


def fits(path: Path) -> bool:
    return (path / FILE).is_file()


def page(path: Path) -> Page:
    """Return the page of a comparison. Raises InputError: its table cannot be read."""
    frame = read(path)
    if frame.empty:
        return Page("Comparison", ["No entry is measured yet."], {}, [])
    bare = [Section("Loss over length", [loss_figure(frame, text) for text in texts(frame)])] if texts(frame) else []
    parts: list[tuple[str, list[Any]]] = [
        ("Right answers", answer_figures(frame)),
        ("Links found by gap and noise", recovery_maps(frame)),
        ("Remedies", remedies(frame)),
        ("States while reading", _states(frame)),
        ("Cost", costs(frame)),
        ("Not applicable", _refused(frame)),
        ("All that was measured", [Table("Every row", frame.drop(columns="samples").dropna(axis=1, how="all"))]),
    ]
    sections = bare + [Section(title, some) for title, some in parts if some]
    return Page(
        f"Comparison of {counted(frame['entry'].nunique(), 'entry', 'entries')}", verdict(frame), about(frame), sections
    )


def texts(frame: pd.DataFrame) -> list[str]:
    """Return the texts that losses were measured on, the first of the config first."""
    return list(dict.fromkeys(frame.loc[frame["metric"] == "verdict", "text"]))


def entries(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame["entry"]))


def verdict(frame: pd.DataFrame) -> list[str]:
    """Return a line an entry: what its loss does beyond training, what older context gives it, how far it recalls."""
    lines = []
    for entry in entries(frame):
        of, clauses = frame[frame["entry"] == entry], []
        for text in texts(frame):
            if len(judged := of_all_seeds(of, "verdict", text=text)):
                clauses.append(f"{judged['note'].iloc[0]} on {text}")
        if len(gains := of_all_seeds(of, "gain", mitigation="none")):
            last = gains.sort_values("length").iloc[-1]
            span = "" if math.isnan(last["low"]) else f" (95% {last['low']:+.3f} to {last['high']:+.3f})"
            clauses.append(
                f"older context gains {last['value']:+.3f} nats at {format_length(int(last['length']))}{span}"
            )
        answers = of_all_seeds(of, "accuracy", mitigation="none")
        for task, some in answers.groupby("task", sort=False):
            last = some.sort_values("length").iloc[-1]
            span = "" if math.isnan(last["low"]) else f" (95% {last['low']:.2f} to {last['high']:.2f})"
            clauses.append(f"{task} at {format_length(int(last['length']))}: {last['value']:.2f} right{span}")
        if clauses:
            lines.append(f"{entry}: {'; '.join(clauses)}.")
    return [*lines, DEFINITION] if texts(frame) else lines or ["Nothing is measured to the end yet."]


def about(frame: pd.DataFrame) -> dict[str, str]:
    of_entry = frame.drop_duplicates("entry")
    sizes = f"{int(of_entry['parameters'].min()):,} to {int(of_entry['parameters'].max()):,} parameters"
    trained = sorted(int(n) for n in frame["train_length"].dropna().unique())
    seeds = frame["seed"].dropna().nunique()
    return {
        "entries": str(len(of_entry)),
        "sizes": sizes,
        "training length": ", ".join(map(format_length, trained)),
        "seeds": str(seeds),
        "texts": ", ".join(texts(frame)) or "none",
        "mixers": "; ".join(f"{e}: {m}" for e, m in zip(of_entry["entry"], of_entry["mixer"])),
    }


def over_length(frame: pd.DataFrame, rows: pd.DataFrame) -> list[Line]:
    """Return a line an entry over length, the mean of seeds, with its interval."""
    lines, names = [], entries(frame)
    for i, entry in enumerate(names):
        some = rows[rows["entry"] == entry].sort_values("length")
        if some.empty:
            continue
        low, high = (some[c].where(some[c].notna(), some["value"]).tolist() for c in ("low", "high"))
        lengths = [int(n) for n in some["length"]]
        lines.append(Line(entry, lengths, some["value"].tolist(), low, high, on=i < MANY, **look(i)))
    return lines


def ends(lines: list[Line], form: str, what: str) -> str:
    """Return a sentence with each entry's value at its longest length."""
    ranked = sorted(lines, key=lambda line: (-max(line.x), line.y[-1]))
    texts = [f"{line.name} {number(line.y[-1], form)} at {format_length(int(line.x[-1]))}" for line in ranked[:MANY]]
    more = f", and {len(ranked) - MANY} more" if len(ranked) > MANY else ""
    return f"{what}: {', '.join(texts)}{more}. Shaded: 95% intervals over seeds and slices."


def shortest(frame: pd.DataFrame) -> int:
    return int(frame["train_length"].dropna().min())


def loss_figure(frame: pd.DataFrame, text: str) -> Figure:
    """Return the losses of one text, an entry a line, the mean of seeds."""
    rows = of_all_seeds(frame, "loss", text=text, mitigation="none")
    of = over_length(frame, rows)
    y = figures.values_axis([v for line in of for v in line.y], "loss, nats per token")
    x = lengths_axis([n for line in of for n in line.x])
    table = rows[["entry", "mixer", "parameters", "length", "value", "low", "high", "n", "seeds"]]
    marks = [upright(shortest(frame), "training length")]
    words = ends(of, ".3f", "Nats per token")
    return figures.lines(f"Loss over positions (L/2, L] of {text}", words, table, of, x, y, marks)


def answer_figures(frame: pd.DataFrame) -> list[Figure]:
    """Return a figure a task: the share of answers that are right, an entry a line."""
    out, answers = [], of_all_seeds(frame, "accuracy", mitigation="none")
    for task, rows in answers.groupby("task", sort=False):
        of = over_length(frame, rows)
        marks = [upright(shortest(frame), "training length")]
        if (chance := guess(frame, str(task))) is not None and chance > 0.01:
            marks.append(level(chance, f"a guess: {chance:.2g}"))
        y = figures.share_axis("share of answers that are right")
        x = lengths_axis([n for line in of for n in line.x])
        table = rows[["entry", "mixer", "parameters", "length", "value", "low", "high", "n", "seeds"]]
        out.append(
            figures.lines(f"{task}: right answers over length", ends(of, ".2f", "Right"), table, of, x, y, marks)
        )
    return out


def recovery_maps(frame: pd.DataFrame) -> list[Figure]:
    """Return a map an entry: the share of planted links found by gap (across) and noise (down)."""
    rows, out = recovered(frame), []
    if rows.empty:
        return []
    settings = sorted(set(zip(rows["noise"], -rows["strength"])))
    depths = sorted((float(d) for d in rows["depth"].unique()), reverse=True)
    length = int(rows["length"].iloc[0])
    gaps = [f"{2 * math.exp(math.log((length - 1) / 2) * (1 - d)):.0f}" for d in depths]
    down = [f"noise {n:g}, strength {-s:g}" for n, s in settings]
    for entry, some in rows.groupby("entry", sort=False):
        shares = dict(zip(zip(some["noise"], -some["strength"], some["depth"].astype(float)), some["share"]))
        grid = [[shares.get((*setting, d)) for d in depths] for setting in settings]
        hover = {"hovertemplate": "gap %{x}, %{y}: %{z:.2f}<extra></extra>"}
        plot = go.Figure(figures.heat_map(grid, gaps, down, "share found", **hover))
        figures.grid_axes(plot, "gap, tokens", "", columns=gaps)
        plot.update_layout(height=140 + 28 * len(settings))
        words = f"Over all gaps and settings {some['share'].mean():.2f} of the links are found (0: a guess)."
        table = some[["entry", "noise", "strength", "depth", "share", "low", "high"]]
        out.append(Figure(f"Planted links found: {entry}", plot, words, table, small=True))
    return out


def remedies(frame: pd.DataFrame) -> list[Figure | Table]:
    """Return losses and answers with each remedy at the longest length that remedies were measured at: a map of
    remedies by entries, and its table."""
    out: list[Figure | Table] = []
    for metric, what in (("loss", "nats per token"), ("accuracy", "share of right answers")):
        rows = of_all_seeds(frame, metric)
        bare = rows["mitigation"].str.startswith("recompute:") | (rows["mitigation"] == "none")
        for (task, text), remedied in rows[~bare].groupby(["task", "text"], sort=False):
            length = remedied["length"].max()
            here = rows[(rows["task"] == task) & (rows["text"] == text) & (rows["length"] == length)]
            wide = here.pivot_table(index="mitigation", columns="entry", values="value", sort=False)
            title = f"{text or task} at {format_length(int(length))} with each remedy, {what}"
            best = here.loc[here["value"].idxmin() if metric == "loss" else here["value"].idxmax()]
            note = f"The best is {best['entry']} with {best['mitigation']}, {best['value']:.3f}."
            out.append(Table(title, wide.reset_index(), note))
    return out


def _wide(frame: pd.DataFrame, heads: dict[str, str], by: list[str]) -> pd.DataFrame:
    """Return metrics as columns, the mean of seeds at the shortest training length; those of no value are left out."""
    alike = frame["seed"].isna() & (frame["train_length"] == shortest(frame))
    rows = frame[alike & frame["metric"].isin(heads) & frame["value"].notna()]
    if rows.empty:
        return rows
    wide = rows.pivot_table(index=by, columns="metric", values="value", sort=False).reset_index()
    wide.columns.name = None
    return wide[[*by, *(m for m in heads if m in wide)]].rename(columns=heads)


def _states(frame: pd.DataFrame) -> list[Figure | Table]:
    """Return which heads leave their range, and how states grow with the length, under each remedy that they were
    looked at with."""
    out: list[Figure | Table] = []
    if (frame := of_states(frame)).empty:
        return out
    growth = of_all_seeds(frame, "state_growth")
    if len(growth):
        of = over_length(frame, growth)
        y = figures.values_axis([v for line in of for v in line.y], "norm, times that at the training length")
        x, marks = lengths_axis([n for line in of for n in line.x]), [upright(shortest(frame), "training length")]
        table = growth[["entry", "length", "value", "low", "high", "seeds"]]
        out.append(figures.lines("Growth of the state", ends(of, ".2f", "Times"), table, of, x, y, marks))
    heads = _wide(frame, _STATES, ["entry"])
    return out if heads.empty else [*out, Table("Heads that leave the range of training", heads)]


def costs(frame: pd.DataFrame) -> list[Table]:
    """Return what training took, and reading by length."""
    pairs: list[tuple[str, dict[str, str], list[str]]] = [
        ("Training, a seed", _TRAINING, ["entry"]),
        ("Reading one prompt, and a token after it", _READING, ["entry", "length"]),
    ]
    tables = [(title, _wide(frame, heads, by)) for title, heads, by in pairs]
    return [Table(title, table) for title, table in tables if len(table)]


def _refused(frame: pd.DataFrame) -> list[Table]:
    rows = frame.loc[frame["metric"] == "not_applicable", ["entry", "mitigation", "task", "note"]]
    return [Table("What could not be put on an entry, and why", rows.drop_duplicates())] if len(rows) else []


KINDS.register(Kind("compare", fits, page))
