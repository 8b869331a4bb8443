"""What the sheets of results say, as rich tables and as plain text for a log."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rnn_longctx.config import counted, format_length
from rnn_longctx.eval.show.ranking import board_tables
from rnn_longctx.eval.stats import wilson
from rnn_longctx.eval.tables.conclusion import conclusion
from rnn_longctx.eval.tables.sheets import (
    RECALL,
    SETTING,
    Sheet,
    alike,
    context_gain,
    is_control,
    kind_of,
    sheets,
    summary,
)

if TYPE_CHECKING:
    from rnn_longctx.models.state_size import StateSize

__all__ = ["asked", "conclusion", "context_gain", "header", "summary", "table", "to_text"]

MANY = 8  # mitigations whose gains are still read one by one
_BOX = Box("    \n    \n -- \n    \n -- \n    \n    \n    \n", ascii=True)
# A line of a table: its label, a text per length, and the text of the last column.
Line = tuple[Text, dict[int, Text], Text]


def header(
    model: str,
    parameters: int,
    state: StateSize,
    train_length: int | None,
    device: str,
    dtype: str,
    backend: str,
    reads: str | None = None,
) -> RenderableType:
    """What is measured, on what. `state`: of one sequence, all layers; `reads`: how, where that is unusual."""
    lines = [
        ("model", f"{model}, {_count(parameters)} parameters"),
        ("state", _state_text(state)),
        ("trained at", "unknown length" if train_length is None else f"{format_length(train_length)} tokens"),
        ("runs on", f"{device}, {dtype}, {backend}"),
        *([("reads", reads)] if reads else []),
    ]
    grid = Table.grid(padding=(0, 2))
    for name, text in lines:
        grid.add_row(Text(name, style="dim"), Text(text))
    return grid


def _state_text(state: StateSize) -> str:
    """Return in words what a sequence keeps, and how that grows."""
    parts = []
    if state.fixed:
        of = " + ".join(f"{name} {numbers:,}" for name, numbers in state.fixed.items())
        parts.append(f"{sum(state.fixed.values()):,} elements ({of})")
    if within := sum(longest * numbers for longest, numbers in state.windows.items()):
        parts.append(f"up to {within:,} of the last tokens")
    if state.per_token:
        parts.append(f"{state.per_token:,} more with every token read")
    parts += [f"{numbers:,} more with every {tokens:,} tokens" for tokens, numbers in state.chunks.items()]
    return ", and ".join(parts) or "none"


def table(frame: pd.DataFrame, width: int = 110) -> list[RenderableType]:
    """Rich tables no wider than `width`, split by lengths where they must be, and under them the conclusion.

    Per sheet: loss over length with a verdict, then the context gain; or accuracy over length. Of more than MANY
    mitigations the gain stands in their ranking alone, at the longest length. Bold is the lowest loss of a length among
    what is no control, a gain surely above 0, or an accuracy above 0.95; red is collapse.
    """
    pieces: list[RenderableType] = []
    everything = sheets(frame)
    ranked = any(len(sheet.cells) > MANY for sheet in everything)
    for sheet in everything:
        pieces += _loss_tables(sheet, width) if sheet.kind == "loss" else _accuracy_tables(sheet, width)
        pieces += _gain_tables(sheet, width) if sheet.kind == "loss" and not ranked else []
    pieces += board_tables(frame) if ranked else []
    words = conclusion(frame)
    return [*pieces, Text(words or "no results yet", style="bold" if words else "")]


def asked(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows of a folder's table that a call of `evaluate` asked for, whose `attrs` it has, and a line that
    says what else is among them and what is left out. Its remedies at the folder's other lengths are among them, for a
    verdict that knew less than the folder would contradict it, and so are `none` and the controls, for comparison."""
    question = frame.attrs["asked"]
    settings = [tuple(setting) for setting in question["settings"]]
    remedies, tasks = ({s[i] for s in settings} for i in (0, 1))
    compared = frame["mitigation"].map(lambda m: m in remedies or m == "none" or is_control(m))
    losses = frame["metric"].map(kind_of) == "loss"
    keep = compared & frame["task"].isin(tasks) & (~losses | frame["text_hash"].isin(question["texts"]))
    shown = frame[keep & alike(frame, {c: question[c] for c in (*SETTING, "seed")})]
    left = len(frame) - len(shown)
    more = len(set(zip(shown["mitigation"], shown["task"], shown["length"])) - set(settings))
    notes = [f"with {counted(more, 'other setting')} measured here before"] if more else []
    notes += [f"{counted(left, 'row')} of other models, texts, tasks or remedies not shown"] if left else []
    return shown, "; ".join(notes)


def to_text(frame: pd.DataFrame, width: int = 110) -> str:
    """The same tables as plain lines of at most `width` characters (ASCII if all names are), for a log."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(Group(*table(frame, width)))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


# ---- tables


def _loss_tables(sheet: Sheet, width: int) -> list[RenderableType]:
    candidates = [name for name in sheet.cells if not sheet.is_control(name)]

    def cell(name: str, length: int) -> Text:
        value, peak = sheet.cells[name][length].value, sheet.peak(name)
        failed = peak is not None and length > (sheet.train_length or 0) and not value <= 2 * peak
        if failed or not math.isfinite(value):
            return Text(_number(value), style="red")
        rivals = [row[length].value for n, row in sheet.cells.items() if length in row and n in candidates]
        best = len(rivals) > 1 and name in candidates and value == min(rivals, key=_finite)
        return Text(_number(value), style="bold" if best else "")

    def collapse(name: str) -> Text:
        first, text = sheet.verdict(name)
        if first is not None:
            return Text(f"at {format_length(first)}", style="red")
        if sheet.broken(name):
            return Text("no number", style="red")
        return Text(text.replace("no collapse up to", "not by") if text.startswith("no ") else "unknown")

    peak = sheet.peak("none")
    head = "collapses" + ("" if peak is None else f"\n> 2 x {peak:.2f}")
    return _tables(_title(sheet, "loss in nats per token", "slice"), sheet, cell, width, (head, collapse))


def _gain_tables(sheet: Sheet, width: int) -> list[RenderableType]:
    """Three lines per remedy, gain and interval, so that the lengths keep their columns. One slice has no interval."""
    tables: list[RenderableType] = []
    for control in sheet.recomputes():
        lines: list[Line | None] = []
        measured: set[int] = set()
        for name in (n for n in sheet.cells if not sheet.is_control(n)):
            gains = {k: g for k in sheet.lengths if (g := sheet.gain(control, name, k))}
            measured |= set(gains)
            known = {k: g for k, g in gains.items() if math.isfinite(g.low)}
            for head, values in (
                (Text(name), {k: Text(_signed(g.gain), "bold" if g.low > 0 else "") for k, g in gains.items()}),
                (Text("  95% from", "dim"), {k: Text(_signed(g.low), "dim") for k, g in known.items()}),
                (Text("  to", "dim"), {k: Text(_signed(g.high), "dim") for k, g in known.items()}),
            ):
                lines += [(head, values, Text())] if values else []
        title = f"context gain: loss of {control} minus loss, nats per token (above 0: uses older context)"
        heads = {k: format_length(k) for k in sorted(measured)}
        tables += _draw(title + _suffix(sheet), heads, lines, width) if lines else []
    return tables


def _accuracy_tables(sheet: Sheet, width: int) -> list[RenderableType]:
    def cell(name: str, length: int) -> Text:
        value = sheet.cells[name][length].value
        return Text(f"{value:.2f}", style="bold" if value > RECALL else "")

    title = _title(sheet, f"{sheet.task} accuracy", "prompt")
    fewest = min(c.n for row in sheet.cells.values() for c in row.values())
    if fewest:
        middle = wilson(fewest // 2, fewest)  # where the interval is widest
        title += f"; 95% within {(middle.high - middle.low) / 2:.2f}"
    if sheet.chance is not None:
        title += f"; a guess: {sheet.chance:.2g}"
    return _tables(title, sheet, cell, width)


def _tables(
    title: str,
    sheet: Sheet,
    cell: Callable[[str, int], Text],
    width: int,
    last: tuple[str, Callable[[str], Text]] | None = None,
) -> list[RenderableType]:
    """A row per mitigation, a column per length; n is in the header unless in the title."""
    counts = {k: [row[k].n for row in sheet.cells.values() if k in row] for k in sheet.lengths}
    same = len({n for ns in counts.values() for n in ns}) == 1
    heads = {}
    for length, ns in counts.items():
        n = f"{min(ns)}" if min(ns) == max(ns) else f"{min(ns)}-{max(ns)}"
        heads[length] = format_length(length) + ("" if same else f"\nn={n}")
    lines: list[Line | None] = []
    controls = [n for n in sheet.cells if sheet.is_control(n)]
    for name, row in sheet.cells.items():
        if controls and name == controls[0]:
            lines += [None, (Text("controls:", "dim"), {}, Text())]
        label = Text(f"  {name}", "dim") if name in controls else Text(name)
        lines.append((label, {k: cell(name, k) for k in row}, last[1](name) if last else Text()))
    notes = [Text(f"At {', '.join(map(format_length, where))}: {text}.") for text, where in _counts(sheet).items()]
    return [*_draw(title, heads, lines, width, last[0] if last else ""), *notes, *([Text("")] if notes else [])]


def _counts(sheet: Sheet) -> dict[str, list[int]]:
    """What is to be known of lengths whose cells were measured with different numbers of samples, or of which others
    were asked for."""
    unit = "slices" if sheet.kind == "loss" else "prompts"
    notes: dict[str, list[int]] = {}
    for length in sheet.lengths:
        ns = [row[length].n for row in sheet.cells.values() if length in row]
        if min(ns) != max(ns):
            text = f"rows of {min(ns)} to {max(ns)} {unit} do not compare"
        elif length in sheet.cut:
            first = "first" if ns[0] == 1 else f"first {ns[0]}"
            text = f"only the {first} of {sheet.cut[length]} {unit}, which all rows have"
        else:
            continue
        notes.setdefault(text, []).append(length)
    for length, asked in sheet.asked.items():
        notes.setdefault(f"so many tokens were read where {format_length(asked)} were asked for", []).append(length)
    return notes


def _draw(
    title: str, heads: dict[int, str], lines: Sequence[Line | None], width: int, last: str = ""
) -> list[RenderableType]:
    """Lines as one table, or as several with the same labels where the lengths do not fit; None is a rule."""
    rows = [line for line in lines if line is not None]
    label = min(max(10, *(len(line[0]) for line in rows)), max(20, width // 3))
    tail = max([*map(len, last.split("\n")), *(len(line[2]) for line in rows)]) + 2 if last else 0
    columns = {
        k: 2 + max([*map(len, head.split("\n")), *(len(line[1][k]) for line in rows if k in line[1])])
        for k, head in heads.items()
    }
    pages: list[list[int]] = [[]]
    for k in columns:
        end = tail if k == max(columns) else 0
        if pages[-1] and label + sum(columns[c] for c in [*pages[-1], k]) + end > width:
            pages.append([])
        pages[-1].append(k)
    even = -(-len(columns) // len(pages))
    pages = [list(columns)[i : i + even] for i in range(0, len(columns), even)]
    tables: list[RenderableType] = [Text(title, style="bold")]
    for page in pages:
        ends = bool(last) and page is pages[-1]
        grid = Table(box=_BOX, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        grid.add_column("mitigation", width=label, overflow="fold")
        for k in page:
            grid.add_column(heads[k], justify="right", no_wrap=True, width=columns[k] - 2)
        if ends:
            grid.add_column(last, no_wrap=True, width=tail - 2)
        for line in lines:
            if line is None:
                grid.add_section()
            else:
                grid.add_row(line[0], *(line[1].get(k, Text("")) for k in page), *([line[2]] if ends else []))
        tables += [grid, Text("")]
    return tables


def _title(sheet: Sheet, what: str, unit: str) -> str:
    counts = {c.n for row in sheet.cells.values() for c in row.values()}
    title = f"{what}, {sheet.where['model']}"
    title += f" on {sheet.where['text']}" if sheet.where["text"] else ""
    title += f", n = {counted(max(counts), unit)}" if len(counts) == 1 else ""
    title += "" if sheet.train_length is None else f", trained at {format_length(sheet.train_length)}"
    return title + _suffix(sheet)


def _suffix(sheet: Sheet) -> str:
    return f" [{sheet.note}]" if sheet.note else ""


def _number(value: float) -> str:
    """At most five characters for any loss below 1000."""
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"


def _signed(value: float) -> str:
    return f"{value:+.{3 if abs(value) < 10 else 2}f}" if math.isfinite(value) else str(value)


def _finite(value: float) -> float:
    """For sorting: a loss of NaN is the worst."""
    return value if math.isfinite(value) else math.inf


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
