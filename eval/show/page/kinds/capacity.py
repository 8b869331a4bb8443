"""The page of a study of capacity, or of single checkpoints: whether they forget, how far they recall, and how that
follows from the size of the state."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rnn_longctx.config import counted, format_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import INK, Line, look
from rnn_longctx.eval.show.page.kinds import eval as evaluation
from rnn_longctx.eval.show.page.parts import KINDS, Figure, Kind, Page, Section, Switch, Table

K = 1024
FEW = 4  # models whose losses and answers have figures of their own
_BOUNDS = {"above": "at least", "below": "below"}


def fits(path: Path) -> bool:
    return (path / "models.csv").is_file() and evaluation.fits(path)


def page(path: Path) -> Page:
    """Return the page of a study. Raises InputError: a table is missing, or cannot be read."""
    findings, points, curves, pairs, sizes = (
        _read(path / f"{name}.csv") for name in ("findings", "points", "fits", "mqar", "same_size")
    )
    if findings.empty and pairs.empty:
        raise InputError(f"{path} has no findings.csv yet: rnn-longctx capacity plot {path}")
    results = Results.read(path)
    models = _read(path / "models.csv")
    parts = [
        Section("Lengths over the size of the state", _growth(points, curves)) if len(points) else None,
        Section("Associative recall", associations(pairs)) if len(pairs) else None,
        *(evaluation.sections(results)[:2] if results["model"].nunique() <= FEW else []),
        Section("Findings", [Table("Every model", findings)]) if len(findings) else None,
        Section("Fits", [Table("Forms of growth", curves, _FITS)]) if len(curves) else None,
        Section("Shapes of one size", [Table("Lengths of states of one size", sizes)]) if len(sizes) else None,
    ]
    title = f"Capacity of {counted(len(models), 'model')}"
    header = evaluation.about(results) | {"models": str(len(models))}
    return Page(title, verdict(findings, points, curves, pairs), header, [part for part in parts if part])


_FITS = (
    "y is in K tokens, s in millions of numbers of state. r2_loo: of predicting each point from the others, below 0 "
    "worse than their mean; carrier: the shape that the curve leans on most, r2_without: the fit without it; aic: the "
    "smaller the better."
)


def _read(path: Path) -> pd.DataFrame:
    """Return a table, an empty one where there is none. Raises InputError: it cannot be read."""
    if not path.is_file() or path.stat().st_size < 2:
        return pd.DataFrame()
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def verdict(findings: pd.DataFrame, points: pd.DataFrame, curves: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """Return a line a quantity of a family, with how far the best form of growth is to be trusted; or a line a
    checkpoint."""
    family = len(points) > 0 and (points["models"] > points.groupby("shape")["quantity"].transform("nunique")).any()
    lines = []
    if not family:
        for (shape, mitigation), some in findings.groupby(["shape", "mitigation"], sort=False) if len(findings) else []:
            train = some["train_length"].iloc[0]
            trained = "" if pd.isna(train) else f", trained at {format_length(int(train))}"
            texts = [t if q == "forgets" else f"{q} {t}" for q, t in zip(some["quantity"], some["text"])]
            lines.append(f"{shape}{trained}, {mitigation}: {'; '.join(texts)}.")
    else:
        for (mitigation, quantity), some in points.groupby(["mitigation", "quantity"], sort=False):
            low, high = some["value"].min(), some["value"].max()
            bounds = int(some["bound"].notna().sum())
            on = "" if mitigation == "none" else f" with {mitigation}"
            line = f"{quantity}{on} of {counted(len(some), 'shape')} is {_k(low)} to {_k(high)} tokens"
            line += f" ({bounds} of them only bounds)" if bounds else ""
            lines.append(line + _best(curves, str(mitigation), str(quantity)) + ".")
    if len(pairs):
        most = pairs.sort_values("value").iloc[-1]
        lines.append(
            f"Associative recall: at best {most['value']:.2f} of the answers are right (95% {most['low']:.2f} to "
            f"{most['high']:.2f}), {most['shape']} at {most['pairs']:.0f} pairs of {most['task']}."
        )
    return lines or ["Nothing is measured to the end yet."]


def _best(curves: pd.DataFrame, mitigation: str, quantity: str) -> str:
    """Return what the best form of growth is, and how surely."""
    if curves.empty:
        return ""
    here = curves[(curves["mitigation"] == mitigation) & (curves["quantity"] == quantity)]
    here = here[(here["axis"] == "state_elements") & here["best"].astype(bool)]
    if here.empty:
        return ""
    one = here.iloc[0]
    if one["form"] == "constant":
        return f"; no growth with the state can be told from chance with {counted(int(one['points']), 'point')}"
    sure = f"R² {one['r2']:.2f}, of each point predicted from the others {one['r2_loo']:.2f}"
    return f"; it grows as a {one['form']}, {one['curve']} ({counted(int(one['points']), 'point')}, {sure})"


def _k(tokens: float) -> str:
    return format_length(round(tokens))


def _growth(points: pd.DataFrame, curves: pd.DataFrame) -> list[Figure]:
    return [
        growth(some, curves, str(mitigation), str(quantity))
        for (mitigation, quantity), some in points.groupby(["mitigation", "quantity"], sort=False)
    ]


def growth(points: pd.DataFrame, curves: pd.DataFrame, mitigation: str, quantity: str) -> Figure:
    """Return the points of one quantity over the size of the state, with the curves fitted to them."""
    plot, switches = go.Figure(), []
    for bound, name, symbol in (("", "measured", "circle"), ("above", "at least", "triangle-up"),
                                ("below", "below", "triangle-down")):  # fmt: skip
        some = points[points["bound"].fillna("") == bound]
        if some.empty:
            continue
        low, high = (some[c].fillna(some["value"]).clip(lower=1) for c in ("low", "high"))
        bars = {"array": (high - some["value"]).clip(lower=0).tolist(),
                "arrayminus": (some["value"] - low).clip(lower=0).tolist(), "color": INK, "thickness": 1.2}  # fmt: skip
        plot.add_scatter(
            x=some["state_elements"].tolist(),
            y=some["value"].tolist(),
            name=name,
            mode="markers",
            marker={"symbol": symbol, "size": 9, "color": INK},
            error_y=bars if not bound else None,
            customdata=[[s, _k(v)] for s, v in zip(some["shape"], some["value"])],
            hovertemplate="%{customdata[0]}: %{customdata[1]}",
        )
        switches.append(Switch(f"{name} ({len(some)})", [len(plot.data) - 1]))
    rows = curves
    if len(curves):
        rows = curves[(curves["mitigation"] == mitigation) & (curves["quantity"] == quantity)]
        rows = rows[rows["axis"] == "state_elements"]
    least, largest = float(points["state_elements"].min()), float(points["state_elements"].max())
    states = np.geomspace(least / 1.2, largest * 1.2, 80)
    for i, (_, row) in enumerate(rows.iterrows()):
        y = [v * K if v > 0 else None for v in curve(row, states / 1e6)]
        r2 = "" if math.isnan(row["r2"]) else f", R² {row['r2']:.2f}"
        line = Line(f"{row['form']}: {row['curve']}{r2}", states.tolist(), y, **(look(i) | {"symbol": ""}),
                    text=[f"{s:,.0f} numbers" for s in states])  # fmt: skip
        plot.add_traces(figures.traces_of(line))
        switches.append(Switch(line.name, [len(plot.data) - 1], bool(row["best"])))
    values = points["value"].tolist()
    y_axis = figures.lengths_axis(values, f"{quantity}, tokens")
    y_axis["range"] = [math.log10(min(values) / 2), math.log10(max(values) * 3)]
    x_axis = {"title": {"text": "state, numbers"}, "type": "log", "dtick": "D2" if largest < 30 * least else 1}
    plot.update_layout(xaxis=x_axis | {"tickformat": "~s"}, yaxis=y_axis)
    most = points.sort_values("value").iloc[-1]
    known = _BOUNDS.get(str(most["bound"]), "")
    words = (
        f"{quantity} over the size of the state, of {counted(len(points), 'shape')}: the longest is {known} "
        f"{_k(most['value'])} tokens, of {most['shape']} with {most['state_elements']:,.0f} numbers"
        f"{_best(curves, mitigation, quantity)}. Bars: as far as the search or the seeds go."
    ).replace("  ", " ")
    on = "" if mitigation == "none" else f", {mitigation}"
    table = points.drop(columns=[c for c in ("weights_hash", "task") if c in points]).dropna(axis=1, how="all")
    return Figure(f"{quantity}{on}", plot, words, table, switches if len(switches) > 1 else ())


def curve(row: pd.Series, s: np.ndarray) -> np.ndarray:
    """Return a fitted form at states s, in millions of numbers: K tokens."""
    form, a, c, k = row["form"], row["a"], row["c"], row["k"]
    with np.errstate(over="ignore"):
        shape = {"line": s, "power": s**k, "exponential": np.exp(k * s)}.get(form, np.zeros_like(s))
    return c + a * shape


def associations(pairs: pd.DataFrame) -> list[Figure]:
    """Return, of each task, the share of right answers over the number of pairs: a shape a line, the median of seeds;
    shaded from the lowest seed's interval to the highest's."""
    out = []
    for task, rows in pairs.groupby("task", sort=False):
        of = []
        for i, (shape, some) in enumerate(rows.sort_values("state_elements").groupby("shape", sort=False)):
            at = some.groupby("pairs")
            middle, low, high = at["value"].median(), at["low"].min(), at["high"].max()
            x = [int(n) for n in middle.index]
            text = [counted(n, "pair") for n in x]
            of.append(Line(str(shape), x, middle.tolist(), low.tolist(), high.tolist(), text=text, **look(i)))
        ends = ", ".join(f"{line.name} {line.y[-1]:.2f} at {counted(int(line.x[-1]), 'pair')}" for line in of)
        axis = figures.lengths_axis([n for line in of for n in line.x], "pairs of key and value")
        y = figures.share_axis("share of answers that are right")
        out.append(figures.lines(f"{task}: right answers over pairs", f"Medians of seeds: {ends}.", rows, of, axis, y))
    return out


KINDS.register(Kind("capacity", fits, page, over=("eval",)))
