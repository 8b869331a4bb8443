"""What a report page is made of, and which kinds of folder there are.

A kind of folder is a file in `kinds`. It says which folders (or files) are of its kind, and makes a `Page` of one:

    KINDS.register(Kind("probe", fits=lambda path: (path / "probe.json").is_file(), page=page))

All text in a page is plain: names from tables go in as they are. `rnn_longctx.eval.show.page.page` cleans and escapes
every text once, also those inside Plotly figures, where a line break is "\\n" and tags mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.registry import Registry

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Table:
    """A table that is shown, and offered as CSV.

    Attributes:
        title: what stands above it.
        frame: its values as they are; numbers are shown to four digits, and the CSV has all of them.
        note: a sentence below it, or nothing.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Lines to copy: commands, or Python."""

    text: str


@dataclass(frozen=True)
class Switch:
    """A checkbox that shows and hides traces of a figure, and says what they are.

    Attributes:
        label: the name of what it shows.
        traces: places in the figure's data.
        on: whether they are shown at first.
    """

    label: str
    traces: Sequence[int]
    on: bool = True


@dataclass(frozen=True)
class Step:
    """One place of a slider: its label, the traces that are shown there, and a sentence on what they show."""

    label: str
    traces: Sequence[int]
    words: str = ""


@dataclass(frozen=True)
class Slider:
    """A slider that shows the traces of one of its steps; at first those of step `start`."""

    label: str
    steps: Sequence[Step]
    start: int = 0


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure, with a sentence and a table that say the same.

    Attributes:
        title: what stands above it.
        plot: a Plotly figure of scatter, bar or heat map traces. Its template is the page's; colours that follow light
            and dark are those of `rnn_longctx.eval.show.page.figures`.
        alternative: a sentence with its main numbers, for whoever does not see it.
        frame: its data.
        switches: see `Switch`; traces of none are always shown. They stand for the legend.
        slider: see `Slider`.
        small: whether several stand side by side.
    """

    title: str
    plot: go.Figure
    alternative: str
    frame: pd.DataFrame
    switches: Sequence[Switch] = ()
    slider: Slider | None = None
    small: bool = False


@dataclass(frozen=True)
class Section:
    """A title and what stands below it; a text is a paragraph."""

    title: str
    parts: Sequence[str | Code | Figure | Table]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: of the page.
        verdict: paragraphs that say in plain words what was found, and how surely.
        header: what was measured on what, a line a name.
        sections: in their order.
    """

    title: str
    verdict: Sequence[str]
    header: Mapping[str, str]
    sections: Sequence[Section] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """A kind of folder (or file).

    Attributes:
        name: of the kind.
        fits: whether a path is of the kind, by what lies there.
        page: makes the page of one. Raises InputError: what lies there cannot be read.
        over: kinds whose files lie in a folder of this kind, too; theirs is then no page of its own.
    """

    name: str
    fits: Callable[[Path], bool]
    page: Callable[[Path], Page]
    over: tuple[str, ...] = ()


KINDS: Registry[Kind] = Registry("kind of folder", "rnn_longctx.eval.show.page.kinds")


def page_of(path: Path) -> Page:
    """Return the page of a folder or file; of one that several kinds fit, with the sections of each. Raises InputError:
    there is no such thing, none fits, or what lies there cannot be read."""
    if not path.exists():
        raise InputError(f"there is no {path}")
    fitting = [kind for kind in KINDS.values() if kind.fits(path)]
    covered = {name for kind in fitting for name in kind.over}
    pages = [kind.page(path) for kind in fitting if kind.name not in covered]
    if not pages:
        known = ", ".join(KINDS)
        raise InputError(f"{path} is nothing that a report can be made of: it knows folders of {known}")
    first = pages[0]
    if len(pages) == 1:
        return first
    return Page(
        first.title,
        [line for page in pages for line in page.verdict],
        {name: text for page in reversed(pages) for name, text in page.header.items()},
        [section for page in pages for section in page.sections],
    )
