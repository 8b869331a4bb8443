"""The page of a probe's folder: which heads left their range, when, and what the loss did meanwhile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rnn_longctx.config import counted, format_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import Line, lengths_axis, level, look, number, upright
from rnn_longctx.eval.show.page.parts import KINDS, Figure, Kind, Page, Section, Slider, Step, Switch, Table
from rnn_longctx.probes.onset import MARGIN, not_finite_is_beyond

FILES = ("probe.json", "heads.csv", "losses.csv", "trace.parquet")
WORST = 7  # heads drawn one by one
OTHERS = 40  # of the rest, drawn as one group
CELLS = 24_000  # of all maps together: a model of many heads has fewer lengths
MOST = 2.0**6  # a ratio that is drawn as such
_ABOUT = {
    "model": "model", "weights_hash": "weights", "train_length": "training length", "prompt": "prompt", "text": "text",
    "text_hash": "hash of the text", "length": "tokens read", "every": "tokens between two looks", "slices": "rows",
    "seed": "seed", "envelope_of": "range measured on", "dtype": "computed in", "state_dtype": "states kept in",
}  # fmt: skip
_LENGTHS = ("train_length", "length", "every")


def fits(path: Path) -> bool:
    return all((path / name).is_file() for name in FILES)


def page(path: Path) -> Page:
    """Return the page of a probe. Raises InputError: one of its tables cannot be read."""
    try:
        about = json.loads((path / "probe.json").read_text())
        envelope = [list(row) for row in about["envelope"]]
        heads, losses = pd.read_csv(path / "heads.csv"), pd.read_csv(path / "losses.csv")
        trace = pd.read_parquet(path / "trace.parquet")
        far = path / "remembrance.csv"
        remembrance = pd.read_csv(far) if far.is_file() else None
        table = ratios(trace, envelope)
        train = int(about["train_length"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"cannot read the probe in {path}: {' '.join(str(error).split())}") from None
    more = [] if remembrance is None else [Section("What the rest still changes", [remembered(remembrance, train)])]
    verdict = [f"{clause[:1].upper()}{clause[1:]}." for clause in str(about["verdict"]).split("; ")]
    header = {
        name: format_length(int(about[key])) if key in _LENGTHS else str(about[key])
        for key, name in _ABOUT.items()
        if about.get(key) is not None
    }
    return Page(
        f"{about['model']}: heads that leave the range of their training",
        verdict,
        header,
        [
            Section("Heads by layer", [head_maps(table, train)]),
            Section("States, memory and loss while reading", curves(table, trace, heads, losses, train)),
            *more,
            Section("Heads, worst first", [_heads(heads), *_ablation(about)]),
        ],
    )


def ratios(trace: pd.DataFrame, envelope: list[list[float]]) -> pd.DataFrame:
    """Return layer, head, position and ratio: the mean norm of rows over the largest in training, infinite where it is
    not finite."""
    trace = trace.assign(norm=not_finite_is_beyond(trace["norm"]))
    mean = trace.groupby(["layer", "head", "position"], as_index=False).agg(norm=("norm", "mean"))
    limits = np.array([envelope[layer][head] for layer, head in zip(mean["layer"], mean["head"])])
    return mean.assign(ratio=mean["norm"] / limits)


def head_maps(table: pd.DataFrame, train: int) -> Figure:
    """Return the ratios, layer by head, with a slider over lengths."""
    looks = np.sort(table["position"].unique())
    heads = table.groupby(["layer", "head"]).ngroups
    count = int(max(3, min(len(looks), 32, CELLS // heads)))
    wanted = np.geomspace(looks[0], looks[-1], count)
    chosen = sorted({int(looks[np.abs(looks - w).argmin()]) for w in wanted})
    plot, steps, rows = go.Figure(), [], []
    bar = {"title": {"text": "norm over the largest in training", "side": "right"}, "thickness": 12, "outlinewidth": 0,
           "tickvals": [-6, -3, 0, 3, 6], "ticktext": ["1/64", "1/8", "1", "8", "64"]}  # fmt: skip
    for i, position in enumerate(chosen):
        here = table[table["position"] == position]
        grid = here.pivot(index="layer", columns="head", values="ratio")
        values = grid.to_numpy()
        logs = np.log2(values.clip(1 / MOST, MOST))
        shown = [[None if math.isnan(v) else v for v in row] for row in logs.tolist()]
        texts = [[number(v, ".2g") + " times" for v in row] for row in values.tolist()]
        across, down = [str(h) for h in grid.columns], [str(layer) for layer in grid.index]
        about = {"colorbar": bar, "text": texts, "hovertemplate": "layer %{y}, head %{x}: %{text}<extra></extra>"}
        plot.add_trace(figures.heat_map(shown, across, down, "", figures.RATIO, zmin=-6, zmax=6, **about))
        beyond = here["ratio"] > MARGIN
        worst = here.sort_values("ratio").iloc[-1]
        furthest = f"layer {worst['layer']:.0f} head {worst['head']:.0f}, {number(worst['ratio'])} times"
        words = (
            f"tokens: {int(beyond.sum())} of {counted(len(here), 'head')} above {MARGIN:g} times their largest norm "
            f"in training; the furthest is {furthest}."
        )
        steps.append(Step(format_length(position), [i], words))
        rows.append(here)
    figures.grid_axes(plot, "head", "layer", columns=across)
    plot.update_layout(height=min(900, 150 + 24 * table["layer"].nunique() + 60))
    alternative = (
        f"State norms over the largest in training ({format_length(train)} tokens), from {steps[0].label} to "
        f"{steps[-1].label} tokens. At the end {steps[-1].words.removeprefix('tokens: ')}"
    )
    return Figure(
        "Norm of each head's state over its largest in training, layer by head", plot, alternative,
        pd.concat(rows, ignore_index=True), slider=Slider("Length", steps, len(steps) - 1),
    )  # fmt: skip


def curves(
    table: pd.DataFrame, trace: pd.DataFrame, heads: pd.DataFrame, losses: pd.DataFrame, train: int
) -> list[Figure]:
    """Return the norms and retentions of the worst heads and of the rest, and the loss, over the tokens read."""
    mean = trace.groupby(["layer", "head", "position"], as_index=False).agg(retention=("retention", "mean"))
    norms = of_heads(
        table, "ratio", heads, "Norm over the largest in training", "norm over the largest in training", train
    )
    kept = of_heads(mean, "retention", heads, "Share left of the first token", "share left", train)
    smooth = losses["loss"].rolling(8, min_periods=1).mean()
    y = figures.values_axis(list(smooth), "loss, nats per token")
    places = list(losses["position"])
    onsets = sorted(heads["onset"].dropna())
    lines = [
        Line("each stretch", places, list(losses["loss"]), colour=figures.MUTED, symbol="", width=1),
        Line("mean of eight stretches", places, list(smooth), symbol=""),
    ]
    words = f"The loss ends at {number(float(smooth.iloc[-1]), '.3f')} nats per token, after {places[-1]:,} tokens."
    if onsets:
        words += f" {counted(len(onsets), 'head')} left the range of training from {onsets[0]:,.0f} tokens on."
    marks = [upright(train, "training length")]
    loss = figures.lines("Loss while reading", words, losses, lines, lengths_axis(places, "tokens read"), y, marks)
    return [norms, kept, loss]


def of_heads(table: pd.DataFrame, column: str, heads: pd.DataFrame, title: str, what: str, train: int) -> Figure:
    """Return a column over positions: the worst heads one by one, and some of the rest together."""
    order = list(zip(heads["layer"], heads["head"]))
    wide = table.pivot(index="position", columns=["layer", "head"], values=column)
    places = [int(p) for p in wide.index]
    plot, switches = go.Figure(), []
    for i, (layer, head) in enumerate(order[:WORST]):
        line = Line(f"layer {layer} head {head}", places, _finite(wide[layer, head]), **(look(i) | {"symbol": ""}))
        plot.add_traces(figures.traces_of(line))
        switches.append(Switch(line.name, [i]))
    rest = order[WORST:]
    some = [rest[i] for i in np.unique(np.linspace(0, len(rest) - 1, OTHERS).round().astype(int))] if rest else []
    if some:
        x, y = [], []
        for layer, head in some:
            x += [*places, None]
            y += [*_finite(wide[layer, head]), None]
        first = len(plot.data)
        name = f"{len(some)} of the other {counted(len(rest), 'head')}" if len(some) < len(rest) else "the others"
        plot.add_scatter(
            x=x, y=y, name=name, mode="lines", line={"color": figures.MUTED, "width": 0.7}, hoverinfo="skip"
        )
        switches.append(Switch(name, [first]))
    is_ratio = column == "ratio"
    values = [v for trace in plot.data for v in trace.y if v is not None and v > 0]
    axis = figures.values_axis(values, what, log=True) if is_ratio else figures.share_axis(what)
    plot.update_layout(xaxis=lengths_axis(places, "tokens read"), yaxis=axis)
    figures.add_marks(plot, [upright(train, "training length")])
    if is_ratio:
        figures.add_marks(plot, [level(MARGIN, f"leaves its range: above {MARGIN:g}", log=True)])
    layer, head = order[0]
    words = f"Of layer {layer} head {head}, the worst, it ends at {number(float(wide[layer, head].iloc[-1]))}."
    if len(order) > 1:
        ends = wide.iloc[-1]
        words += f" Of all {len(order)} heads the middle one ends at {number(float(ends.median()))}."
    return Figure(title, plot, words, table.drop(columns=[c for c in ("norm",) if c in table]), switches)


def _finite(values: pd.Series) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in values]


def remembered(remembrance: pd.DataFrame, train: int) -> Figure:
    """Return effective remembrance over the tokens that were kept."""
    mean = remembrance[remembrance["cut"] > 0].groupby("kept", as_index=False).agg(tv=("tv", "mean"))
    line = Line("what the rest still changes", list(mean["kept"]), list(mean["tv"]), **look(0))
    last = mean.iloc[-1]
    words = (
        f"With the last {last['kept']:,.0f} tokens kept, the rest still changes {last['tv']:.2f} of what is said next."
    )
    y = figures.share_axis("total variation of the next token")
    x = lengths_axis(list(mean["kept"]), "tokens kept")
    return figures.lines("Effective remembrance", words, mean, [line], x, y, [upright(train, "training length")])


def _heads(heads: pd.DataFrame) -> Table:
    note = (
        f"onset: the first token from which a head's norm stays above {MARGIN:g} times its largest in training (none: "
        "it stays in range); ratio: that at the end; worst: the largest; retained: of the first token, at the end."
    )
    return Table("Every head", heads, note)


def _ablation(about: dict[str, Any]) -> list[Table]:
    """Return what capping the accused heads alone recovered, where it was measured."""
    known = about.get("ablation")
    if not known:
        return []
    rows = [{"what": name.replace("_", " "), "value": str(value)} for name, value in known.items()]
    return [Table("Accused heads capped alone, and others", pd.DataFrame(rows))]


KINDS.register(Kind("probe", fits, page))
