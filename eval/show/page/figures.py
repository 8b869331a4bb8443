"""The looks of a page's figures, and figures that several kinds of folder have: lines over lengths, and heat maps.

Colours are names of CSS variables, `var(--line-0)`, which the page fills in by light or dark; those of lines are
`rnn_longctx.eval.show.style.COLOURS`, lighter where the page is dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from rnn_longctx.config import format_length
from rnn_longctx.eval.show.page.parts import Figure, Switch
from rnn_longctx.eval.show.style import COLOURS, GREYS, RED

INK, MUTED, MARK, EMPTY = "var(--ink)", "var(--muted)", "var(--mark)", "var(--empty)"
LINES = tuple(f"var(--line-{i})" for i in range(len(COLOURS)))
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
TICKS = 7  # at most, on an axis of lengths: more would touch on a phone
_LIGHT = {
    "ink": "#1a1a1a", "muted": "#595959", "paper": "#ffffff", "raised": "#f4f4f2", "grid": "#e2e2e2", "rule": "#c4c4c4",
    "link": "#00568a", "mark": RED, "empty": "#dddddd",
    **{f"line-{i}": colour for i, colour in enumerate((*COLOURS[:-1], "#9a8b00"))},
}  # fmt: skip
_DARK = {
    "ink": "#ececec", "muted": "#b4b4b4", "paper": "#16181b", "raised": "#212429", "grid": "#33373d", "rule": "#4a4f57",
    "link": "#7cc4f5", "mark": "#ff7b66", "empty": "#3a3d42",
    **{f"line-{i}": colour for i, colour in enumerate(
        ("#4aa8e0", "#ff8f4d", "#2ecc9b", "#e3a0c6", "#f0b640", "#8fd0f5", "#f0e442"))},
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    bands = {f"band-{name}": f"{colour}2e" for name, colour in colours.items()}  # of intervals: some 18% of the colour
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in (colours | bands).items()) + "}\n"


LOOKS = (
    _variables(_LIGHT)
    + "@media (prefers-color-scheme: dark){"
    + _variables(_DARK)
    + "}\n@media print{"
    + _variables(_LIGHT)
    + "}\n"
    + _variables(_LIGHT).replace(":root", ":root[data-scheme=light]")
)

# Of losses and accuracies, readable without colour vision; and of ratios, with 1 in the middle.
ACCURACY, RATIO = "Cividis", "PuOr_r"


@dataclass(frozen=True)
class Line:
    """A line of a figure: values over x, with an interval where it has one.

    Attributes:
        name: what it is of.
        low, high: its interval, or None.
        colour: a colour of this module.
        dash, symbol: of Plotly; no symbol where it is "".
        on: whether it is shown at first.
        width: in pixels; 0: markers alone.
        text: what stands for x in the box under the pointer; of none, x in tokens.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: str = INK
    dash: str = "solid"
    symbol: str = "circle"
    on: bool = True
    width: float = 2.0
    text: Sequence[str] = field(default_factory=list)


def look(i: int) -> dict[str, Any]:
    """Return colour, dash and symbol of the i-th of lines that are told apart."""
    n = len(LINES)
    return {"colour": LINES[i % n], "symbol": SYMBOLS[i % n], "dash": ("solid", "dash", "dot")[i // n % 3]}


def control(i: int) -> dict[str, Any]:
    """Return colour, dash and symbol of the i-th control."""
    return {"colour": MUTED, "dash": ("dash", "dashdot", "dot")[i % len(GREYS)], "symbol": ""}


def traces_of(line: Line, unit: str = "", **more: Any) -> list[go.Scatter]:
    """Return a line as Plotly has it, its interval before it. unit: of y, in the box under the pointer."""
    traces = []
    if line.low is not None and line.high is not None:
        edge = {"mode": "lines", "line": {"width": 0, "color": line.colour}, "hoverinfo": "skip", "showlegend": False}
        shade = {"fill": "tonexty", "fillcolor": line.colour.replace("--", "--band-")}
        traces = [go.Scatter(x=list(line.x), y=list(line.low), **edge, **more),
                  go.Scatter(x=list(line.x), y=list(line.high), **edge, **shade, **more)]  # fmt: skip
    traces.append(
        go.Scatter(
            x=list(line.x),
            y=list(line.y),
            name=line.name,
            mode="markers" if not line.width else "lines+markers" if line.symbol else "lines",
            line={"color": line.colour, "width": line.width, "dash": line.dash},
            marker={"symbol": line.symbol or "circle", "size": 7, "color": line.colour},
            customdata=list(line.text) or [_place(x) for x in line.x],
            hovertemplate=f"%{{customdata}}: %{{y:.4g}}{unit}",
            **more,
        )
    )
    return traces


def lines(
    title: str,
    alternative: str,
    frame: pd.DataFrame,
    of: Sequence[Line],
    x: dict[str, Any],
    y: dict[str, Any],
    shapes: Sequence[dict[str, Any]] = (),
    unit: str = "",
    height: int = 400,
) -> Figure:
    """Return a figure of lines, each with a switch where there are several. x, y: axes, of `lengths_axis` or
    `values_axis`; shapes: of `upright` and `level`, which stand for no line."""
    plot, switches = go.Figure(), []
    for line in of:
        first = len(plot.data)
        plot.add_traces(traces_of(line, unit))
        switches.append(Switch(line.name, range(first, len(plot.data))[::-1], line.on))
    plot.update_layout(xaxis=x, yaxis=y, height=height)
    add_marks(plot, shapes)
    return Figure(title, plot, alternative, frame, switches if len(of) > 1 else ())


def upright(x: float, words: str, log: bool = True) -> dict[str, Any]:
    """Return a mark at a place of the axis of lengths, such as the training length. log: whether it is logarithmic."""
    at = math.log10(x) if log and x > 0 else x
    line = {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
    label = {"x": at, "y": 1, "yref": "paper", "text": words, "xanchor": "left", "yanchor": "bottom"}
    return {"shape": line, "label": label}


def level(y: float, words: str, log: bool = False) -> dict[str, Any]:
    """Return a mark at a value, such as a threshold. log: whether the axis of values is logarithmic."""
    line = {"type": "line", "y0": y, "y1": y, "x0": 0, "x1": 1, "xref": "paper", "dash": "dot"}
    at = math.log10(y) if log and y > 0 else y
    label = {"x": 1, "y": at, "xref": "paper", "text": words, "xanchor": "right", "yanchor": "bottom"}
    return {"shape": line, "label": label}


def add_marks(plot: go.Figure, marks: Sequence[dict[str, Any]]) -> None:
    """Draw marks of `upright` and `level` into a figure."""
    for mark in marks:
        shape = dict(mark["shape"])
        dash = shape.pop("dash", "solid")
        plot.add_shape(**shape, line={"color": MARK, "width": 1.5, "dash": dash})
        plot.add_annotation(**mark["label"], showarrow=False, font={"color": MARK, "size": 11})


def lengths_axis(lengths: Sequence[float], title: str = "length, tokens") -> dict[str, Any]:
    """Return a logarithmic axis of tokens, with ticks such as 512, 4K and 1M at powers of two."""
    known = [float(n) for n in lengths if n > 0 and math.isfinite(n)]
    if not known:
        return {"title": {"text": title}, "type": "log"}
    low, high = math.floor(math.log2(min(known))), math.ceil(math.log2(max(known)))
    step = max(1, math.ceil((high - low + 1) / TICKS))
    values = [2.0**k for k in range(low, high + 1) if (high - k) % step == 0]
    exact = sorted(set(known))
    if 1 < len(exact) <= TICKS and min(b / a for a, b in zip(exact, exact[1:])) ** TICKS >= exact[-1] / exact[0]:
        values = exact  # those that were measured, where they lie far enough apart
    return {
        "title": {"text": title},
        "type": "log",
        "tickvals": values,
        "ticktext": [_place(v) for v in values],
        "range": [math.log10(min(known)) - 0.06, math.log10(max(known)) + 0.06],
    }


def values_axis(values: Sequence[float | None], title: str, log: bool | None = None) -> dict[str, Any]:
    """Return an axis of values; logarithmic, unless said, where all are above 0 and the largest is over three times the
    smallest: a collapse by five times must not flatten differences of a percent."""
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    if log is None:
        log = bool(known) and min(known) > 0 and max(known) > 3 * min(known)
    if not log:
        return {"title": {"text": title}}
    axis: dict[str, Any] = {"title": {"text": title}, "type": "log"}
    low, high = (min(known), max(known)) if known else (0.1, 10.0)
    if high > 100 * low:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [10.0**e for e in exponents[:: math.ceil(len(exponents) / 8)]]
    else:
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 10 * low else (1, 2, 5)
        start = math.floor(math.log10(low)) - 1
        ticks = [float(f"{m * 10.0**e:.2g}") for e in range(start, start + 5) for m in steps]
        ticks = [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]
    return axis | {"tickvals": ticks, "ticktext": [number(tick, "g") for tick in ticks]}


def steps_axis(title: str) -> dict[str, Any]:
    """Return an axis of counts from 0 on, such as steps or tokens one after another."""
    return {"title": {"text": title}, "tickformat": ",d", "nticks": 6}


def share_axis(title: str) -> dict[str, Any]:
    """Return an axis from 0 to 1."""
    return {"title": {"text": title}, "range": [-0.03, 1.03]}


def is_log(axis: dict[str, Any]) -> bool:
    return axis.get("type") == "log"


def heat_map(
    z: Sequence[Sequence[float | None]],
    x: Sequence[str],
    y: Sequence[str],
    what: str,
    scale: str = ACCURACY,
    **more: Any,
) -> go.Heatmap:
    """Return a heat map; x and y label its columns and rows, `what` its values. More: of Plotly's heat map."""
    usual = {
        "zmin": 0, "zmax": 1, "colorscale": scale, "xgap": 1, "ygap": 1, "hoverongaps": False,
        "colorbar": {"title": {"text": what, "side": "right"}, "thickness": 12, "outlinewidth": 0},
    }  # fmt: skip
    return go.Heatmap(z=[list(row) for row in z], x=list(x), y=list(y), **(usual | more))


def grid_axes(plot: go.Figure, x: str, y: str, down: bool = True, columns: Sequence[str] = ()) -> None:
    """Give a figure of heat maps its axes: categories, the first row on top where `down`. columns: labels, of which
    only some are written where there are many."""
    step = max(1, math.ceil(len(columns) / TICKS))
    ticks = {"tickmode": "array", "tickvals": list(columns[::step])} if columns else {}
    plot.update_layout(
        plot_bgcolor=EMPTY,
        xaxis={"title": {"text": x}, "type": "category", "showgrid": False, "tickangle": 0} | ticks,
        yaxis={"title": {"text": y}, "type": "category", "showgrid": False}
        | ({"autorange": "reversed"} if down else {}),
    )


def _place(x: float) -> str:
    """1024 -> 1K, 5120 -> 5K, 1434 -> 1,434"""
    whole = round(x)
    text = format_length(whole)
    return text if not text.isdigit() else f"{whole:,}"


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number for a sentence, and words for one that is not finite."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else format(float(value), form)
