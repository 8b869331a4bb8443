"""A report page as one HTML file that asks for nothing: Plotly, styles, scripts and data are all inside.

Its Content-Security-Policy allows no request at all, and of scripts only those written here, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.page.figures import LOOKS
from rnn_longctx.eval.show.page.parts import Code, Figure, Page, Section, Slider, Switch, Table
from rnn_longctx.eval.show.page.text import cell, clean, escaped, for_plotly, for_script, unpacked
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text

LIMIT = 5_900_000  # bytes of a page
ROWS = (5000, 2000, 800, 300, 100, 30)  # points of a line and rows of a table, at most: the first that fits
SHOWN = 24  # rows of a table that are always shown; more are folded away

_HERE = Path(__file__).parent


def write_page(page: Page, path: str | Path) -> Path:
    """Write a page; return its path. Lines and tables are thinned until it is below LIMIT bytes, and figures are left
    out where that is not enough; the page says so. Raises InputError: it cannot be written."""
    path = home_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    write_atomic(path, rendered(page).encode())
    return path


def rendered(page: Page) -> str:
    """Return a page as HTML of at most LIMIT bytes."""
    before = math.inf
    for rows in ROWS:
        text = Renderer(rows).page(page)
        if (size := len(text.encode())) <= LIMIT:
            return text
        if size > 0.9 * before:  # what makes it large is no line and no table
            break
        before = size
    room = LIMIT - len(Renderer(ROWS[-1], room=0).page(page).encode())
    return Renderer(ROWS[-1], room).page(page)


@cache
def script(name: str) -> str:
    """Return the text of a script or style that lies beside this file."""
    return (_HERE / name).read_text()


@cache
def _plotly() -> str:
    """Return Plotly's script, without what would end a script element."""
    return re.sub(r"</(?=script)", r"<\\/", get_plotlyjs(), flags=re.IGNORECASE)


@cache
def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy(scripts: Sequence[str], connect: str = "'none'") -> str:
    """Return the Content-Security-Policy of a page with these scripts. Plotly sets styles as it draws."""
    allowed = " ".join(_hash(text) for text in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def policy_of(html: str) -> str:
    """Return the policy that a page was written with."""
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert found is not None
    return unescape(found[1])


@dataclass
class Renderer:
    """Writes the pieces of one page, and collects the data of its figures and tables.

    Attributes:
        rows: points of a line and rows of a table, at most.
        room: bytes that figures and tables may take together; None: as many as they like.
    """

    rows: int
    room: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)

    def page(self, page: Page, scripts: Sequence[str] = (), connect: str = "'none'") -> str:
        """Return the page as HTML, with more scripts of its own, which may connect to there."""
        body = "\n".join(self.body(page))
        data = for_script({"figures": self.figures, "tables": self.tables})
        parts = [_plotly(), script("page.js"), *scripts]
        code = "\n".join(f"<script>{text}</script>" for text in parts)
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escaped(policy(parts, connect))}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escaped(page.title)}</title>
<style>{LOOKS}{script("page.css")}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
{code}
</body>
</html>
"""

    def body(self, page: Page) -> Iterator[str]:
        yield f"<header><h1>{escaped(page.title)}</h1></header>\n<main>"
        yield '<section class="verdict" aria-labelledby="verdict"><h2 id="verdict">What was found</h2>'
        item = "<li>{}</li>" if len(page.verdict) > 1 else "<p>{}</p>"
        found = "".join(item.format(escaped(line)) for line in page.verdict)
        yield (f"<ul>{found}</ul>" if len(page.verdict) > 1 else found) + "</section>"
        if page.header:
            lines = (
                f"<div{_class('line' if len(v) > 60 else '')}><dt>{escaped(k)}</dt><dd>{escaped(v)}</dd></div>"
                for k, v in page.header.items()
            )
            yield f"<dl>{''.join(lines)}</dl>"
        if len(page.sections) > 2:
            links = (
                f'<li><a href="#s{i}">{escaped(section.title)}</a></li>' for i, section in enumerate(page.sections)
            )
            yield f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>'
        for i, section in enumerate(page.sections):
            yield from self.section(f"s{i}", section)
        yield "</main>"

    def section(self, name: str, section: Section) -> Iterator[str]:
        yield f'<section aria-labelledby="{name}"><h2 id="{name}">{escaped(section.title)}</h2>'
        beside = False
        for part in section.parts:
            small = isinstance(part, Figure) and part.small
            if small != beside:
                yield '<div class="beside">' if small else "</div>"
            beside = small
            if isinstance(part, Figure):
                yield self.figure(part)
            elif isinstance(part, Table):
                yield self.table(part)
            elif isinstance(part, Code):
                text = part.text.rstrip()
                yield f'<pre tabindex="0" aria-label="To copy">{escaped(text)}</pre>'
            else:
                yield f"<p>{escaped(part)}</p>"
        yield ("</div>" if beside else "") + "</section>"

    def figure(self, figure: Figure) -> str:
        name = f"f{len(self.figures)}"
        plot = figure.plot.to_plotly_json()
        traces = [for_plotly(thinned(unpacked(trace), self.rows)) for trace in plot.get("data", [])]
        spec: dict[str, Any] = {
            "title": for_plotly(figure.title),
            "file": file_name(figure.title),
            "data": traces,
            "layout": for_plotly(plot.get("layout", {}), "layout"),
            "switches": [{"traces": list(s.traces), "on": s.on} for s in figure.switches],
        }
        if figure.slider:
            spec["steps"] = [
                {"label": clean(s.label), "traces": list(s.traces), "words": clean(s.words)}
                for s in figure.slider.steps
            ]
        if not self.fits(spec):
            return (
                f"<p>{escaped(figure.title)}: left out of a page that is too large. {escaped(figure.alternative)}</p>"
            )
        self.figures[name] = spec
        kind = "small" if figure.small else "whole"
        title = escaped(figure.title)
        save = "".join(
            f'<button type="button" data-save="{form}" data-figure="{name}" aria-label="{form.upper()} of {title}">'
            f"{form.upper()}</button>"
            for form in ("png", "svg")
        )
        table, link = self.data(figure.title, figure.frame)
        return f"""<figure id="{name}" class="{kind}"><h3>{title}</h3>
{_switches(name, title, figure.switches, traces)}{_slider(name, title, figure.slider)}
<div class="plot" id="{name}-plot" role="img" aria-labelledby="{name}-words"></div>
<figcaption id="{name}-words">{escaped(figure.alternative)}</figcaption>
<div class="tools">{save}{link}</div>
<details data-table="{table}"><summary>Data of this figure as a table</summary></details>
</figure>"""

    def fits(self, piece: Any) -> bool:
        """Take the bytes of a piece from the room that is left, and say whether there were enough."""
        if self.room is None:
            return True
        size = len(for_script(piece).encode())
        if size > self.room:
            return False
        self.room -= size
        return True

    def table(self, table: Table) -> str:
        if self.room is not None and not self.fits(csv_text(table.frame.head(SHOWN).astype(str)) * 3):
            return f"<p>{escaped(table.title)}: left out of a page that is too large.</p>"
        name, link = self.data(table.title, table.frame)
        title, note = escaped(table.title), f"<p>{escaped(table.note)}</p>" if table.note else ""
        frame, more = table.frame.head(SHOWN), len(table.frame) - SHOWN
        numeric = [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
        heads = "".join(
            f'<th scope="col"{_class("number" if is_number else "")}>{escaped(column)}</th>'
            for column, is_number in zip(frame.columns, numeric)
        )
        lines = "".join(
            f"<tr>{''.join(_cell(value, is_number) for value, is_number in zip(row, numeric))}</tr>"
            for row in frame.itertuples(index=False, name=None)
        )
        whole = f'<details data-table="{name}"><summary>All {len(table.frame):,} rows</summary></details>'
        return f"""<div class="table"><h3>{title}</h3>
<div class="wide" tabindex="0" role="region" aria-label="{title}"><table><thead><tr>{heads}</tr></thead>
<tbody>{lines}</tbody></table></div>{whole if more > 0 else ""}{note}
<div class="tools">{link}</div></div>"""

    def data(self, title: str, frame: pd.DataFrame) -> tuple[str, str]:
        """Keep a table for its CSV; return its name and the link to it."""
        name = f"t{len(self.tables)}"
        places = spread(len(frame), self.rows)
        some = frame.iloc[places]
        rows = [[cell(v) for v in row] for row in some.astype(object).itertuples(index=False, name=None)]
        rows = rows if self.fits(rows) else []
        self.tables[name] = {"columns": [clean(c) for c in frame.columns], "rows": rows, "of": len(frame)}
        part = f" ({len(rows):,} of {len(frame):,} rows)" if len(rows) < len(frame) else ""
        label = f"CSV{part} of {clean(title)}"
        return name, (
            f'<a class="csv" data-csv="{name}" download="{file_name(title)}.csv" href="data:text/csv," '
            f'aria-label="{escaped(label)}">CSV{part}</a>'
        )


def _switches(name: str, title: str, switches: Sequence[Switch], traces: list[dict[str, Any]]) -> str:
    boxes = []
    for i, switch in enumerate(switches):
        checked = " checked" if switch.on else ""
        box = f'<input type="checkbox" data-figure="{name}" data-switch="{i}"{checked}>'
        boxes.append(f"<label>{box}{_swatch(traces, switch)}{escaped(switch.label)}</label>")
    if not boxes:
        return ""
    legend = f'<legend class="unseen">Shown in {title}</legend>'
    return f'<fieldset class="switches">{legend}{"".join(boxes)}</fieldset>'


_MARKERS = {
    "circle": "M14 2.5a3.5 3.5 0 1 1 0 7a3.5 3.5 0 1 1 0 -7", "square": "M11 3h6v6h-6z",
    "triangle-up": "M14 2l4 7h-8z", "triangle-down": "M14 10l4-7h-8z", "diamond": "M14 1.5l4 4.5l-4 4.5l-4-4.5z",
    "cross": "M13 2h2v3h3v2h-3v3h-2v-3h-3v-2h3z",
    "x": "M11 3l1-1l2 2.5l2-2.5l1 1l-2 3l2 3l-1 1l-2-2.5l-2 2.5l-1-1l2-3z",
}  # fmt: skip
_DASHES = {"dash": "5 3", "dashdot": "6 2 2 2", "dot": "2 2"}
_COLOUR = re.compile(r"var\(--[a-z0-9-]+\)|#[0-9A-Fa-f]{3,8}")


def _swatch(traces: list[dict[str, Any]], switch: Switch) -> str:
    """Return the mark of a switch: the colour, dashes and marker of the first of its traces that has one colour."""
    for trace in (traces[place] for place in switch.traces):
        line, marker, mode = trace.get("line") or {}, trace.get("marker") or {}, trace.get("mode", "markers")
        colour = line.get("color") or marker.get("color")
        if not isinstance(colour, str) or not _COLOUR.fullmatch(colour) or (mode == "lines" and not line.get("width")):
            continue
        dashes, path = _DASHES.get(line.get("dash", ""), ""), _MARKERS.get(marker.get("symbol", "circle"), "")
        rule = f'<path d="M0 6h28" style="stroke:{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        mark = f'<path d="{path}" style="fill:{colour}"/>'
        drawn = (rule if "lines" in mode else "") + (mark if "markers" in mode else "")
        return f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">{drawn}</svg>'
    return ""


def _slider(name: str, title: str, slider: Slider | None) -> str:
    if slider is None:
        return ""
    step = slider.steps[slider.start]
    return (
        f'<div class="slider"><label for="{name}-range">{escaped(slider.label)}</label>'
        f'<input type="range" id="{name}-range" data-figure="{name}" min="0" max="{len(slider.steps) - 1}" step="1" '
        f'value="{slider.start}" aria-valuetext="{escaped(step.label)}">'
        f'<output for="{name}-range"><b>{escaped(step.label)}</b> {escaped(step.words)}</output></div>'
    )


def shown(value: Any) -> str:
    """Return a value as a table shows it: numbers to four digits, truth as yes or no, nothing for what is missing."""
    value = cell(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    return value


def _cell(value: Any, is_number: bool) -> str:
    text = shown(value)
    return f"<td{_class('number' if is_number else 'long' if len(text) > 40 else '')}>{escaped(text)}</td>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def file_name(title: str) -> str:
    """Return a file's name for what has a title: letters and digits alone."""
    return re.sub(r"[^a-z0-9]+", "-", clean(title).lower()).strip("-")[:60] or "table"


def spread(length: int, most: int) -> list[int]:
    """Return at most so many places of a sequence, evenly spread, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return sorted({round(i * (length - 1) / (most - 1)) for i in range(most)})


def thinned(trace: dict[str, Any], most: int) -> dict[str, Any]:
    """Return a line with at most so many points: of each stretch the lowest and the highest, so that no peak is lost.
    Lines that bound an area are thinned evenly, and traces of other types are as they are."""
    x, y = trace.get("x"), trace.get("y")
    if not isinstance(x, list) or not isinstance(y, list) or len(x) <= most or len(x) != len(y) or "z" in trace:
        return trace
    places: set[int] = {0, len(x) - 1}
    if trace.get("fill"):
        places |= set(spread(len(x), most))
    else:
        stretches = max(1, most // 2 - 1)
        for i in range(stretches):
            stretch = range(i * len(x) // stretches, (i + 1) * len(x) // stretches)
            known = [k for k in stretch if y[k] is not None and y[k] == y[k]]
            places |= {min(known, key=lambda k: y[k]), max(known, key=lambda k: y[k])} if known else {stretch[0]}
    order = sorted(places)
    return {k: [v[i] for i in order] if isinstance(v, list) and len(v) == len(x) else v for k, v in trace.items()}
