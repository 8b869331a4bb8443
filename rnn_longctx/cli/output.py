"""What a command says: tables and lines for a person, or with `--json` one document for a program.

Every command has `--json` and `--quiet` (`rnn_longctx.cli.command`), and speaks through this module alone:

    say(line)                       a message: what goes on
    table("heads", frame, shown)    a result: shown to a person, and put into the document
    wrote(folder, names)            a message, whose files the document lists

Under `--json` messages go to stderr, and the document to stdout when the command ends; under `--quiet` there are no
messages. All that is shown is made harmless for a terminal (`rnn_longctx.plain`).
"""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rnn_longctx.plain import plain
from rnn_longctx.progress import Say, silent, to_stdout
from rnn_longctx.ranks import rank
from rnn_longctx.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

WIDTH = 110  # of tables in a log


@dataclass
class _Output:
    """What the command that runs has said. facts: what stands in the document beside tables and files."""

    as_json: bool = False
    quiet: bool = False
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


_now = _Output()


@contextmanager
def speaking(as_json: bool, quiet: bool) -> Iterator[None]:
    """Run a command inside the block. With as_json what anything prints goes to stderr, and at the end the document to
    stdout: also where the command ends with an exit code of its own, or fails after it has a table."""
    global _now
    before, _now = _now, _Output(as_json, quiet)
    stdout, failed = sys.stdout, True
    try:
        with redirect_stdout(sys.stderr) if as_json else _as_it_is():
            yield
        failed = False
    except typer.Exit:
        failed = False
        raise
    finally:
        said, _now = _now, before
        if as_json and rank() == 0 and (said.tables or not failed):
            print(_document(said), file=stdout, flush=True)


def say(line: object = "") -> None:
    """Say a message of one line: a name with a line break in it makes no second one."""
    if not _now.quiet:
        typer.echo(plain(str(line)))


def note(line: str) -> None:
    """Say a message beside a text that is the output."""
    if not _now.quiet:
        typer.echo(plain(line), err=True)


def problem(text: object) -> None:
    """Say on one line what went wrong, whatever else is to be said."""
    typer.echo(f"rnn-longctx: {plain(' '.join(str(text).split()))}", err=True)


def text(piece: str = "\n") -> None:
    """Print a piece of a text that is the output, as it is made: for a pipe as it is, for a terminal harmless."""
    if not _now.as_json:  # (typer.echo would strip escape sequences on the way into a pipe)
        sys.stdout.write(plain(piece, lines=True) if on_terminal() else piece)
        sys.stdout.flush()


def hush() -> None:
    """From here on say errors alone: warnings and messages are those of the first of several processes."""
    _now.quiet = True
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def on_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout.isatty()


def speaker() -> Say:
    """Return what long work speaks of its progress with, which knows `to_stdout` from others: it may draw a bar."""
    return silent if _now.quiet else to_stdout


def talks() -> bool:
    """Return whether there are messages: progress too."""
    return not _now.quiet


def table(
    name: str, rows: pd.DataFrame | Iterable[Mapping[str, Any]], *shown: RenderableType, width: int = WIDTH
) -> None:
    """Give a result: what is `shown` to a person (rich's renderables, or text as it is), and under its name the table.
    width: of what is shown where there is no terminal."""
    records: Any = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    _now.tables[name] = [_value(row) for row in records]
    show(*shown, width=width)


def fact(name: str, value: Any) -> None:
    """Put a value into the document that is no table: a verdict, a text."""
    _now.facts[name] = _value(value)


def row(line: str) -> None:
    """Show a line while the command goes on, such as a row of a table that is still being measured; where a document
    is asked for it is a message."""
    if _now.as_json:
        say(line)
    else:
        show(line)


def address(line: str) -> None:
    """Show the line without which nobody can use the command while it runs: also where messages are not wanted, and
    on stderr where a document is."""
    typer.echo(plain(line), err=_now.as_json)


def show(*shown: RenderableType, width: int = WIDTH) -> None:
    """Show results to a person."""
    if _now.as_json:
        return
    console = terminal(width)
    for piece in shown:
        if isinstance(piece, str):
            typer.echo(plain(piece, lines=True))
        else:
            console.print(_Plain(piece))


def head(shown: RenderableType) -> None:
    """Show what stands above results: a message that is no line."""
    if not _now.quiet:
        terminal().print(_Plain(shown))


def wrote(folder: Path | str, names: Iterable[str], more: str = "") -> None:
    """Say which files were written, and list them in the document. more: the end of the line."""
    names = list(names)
    _now.files += [str(Path(folder) / name) for name in names]
    say(f"{folder}: {', '.join(names)}{more}")


def terminal(width: int = WIDTH) -> Console:
    """Return the terminal, or, for a log, a console as wide as tables want."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(width=width, markup=False, highlight=False)


class _Plain:
    """Something rich draws, with every text of it made harmless."""

    def __init__(self, piece: RenderableType):
        self.piece = piece

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        for segment in console.render(self.piece, options):
            yield segment if segment.control else Segment(plain(segment.text, lines=True), segment.style)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _document(said: _Output) -> str:
    about = {"version": __version__, "command": ["rnn-longctx", *sys.argv[1:]]}
    return json.dumps(about | said.facts | {"tables": said.tables, "files": said.files}, indent=1)


def _value(value: Any) -> Any:
    """Return a value as JSON has it: what is missing is null, as is NaN; an infinite number is the text inf or -inf."""
    if isinstance(value, Mapping):
        return {str(k): _value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)) or hasattr(value, "tolist"):
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        return [_value(v) for v in items] if isinstance(items, list) else _value(items)
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return None if str(value) in ("<NA>", "NaT") else str(value)
