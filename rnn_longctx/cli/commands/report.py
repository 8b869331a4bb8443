"""`rnn-longctx report`: what a folder of results says, as one page that opens from disk and asks for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import option
from rnn_longctx.cli.output import wrote


@command("report")
def report(
    results: Annotated[
        Path,
        typer.Argument(help="A folder that eval, pilot, probe, capacity, compare or train wrote, or a monitor's log."),
    ],
    out: Annotated[
        Path | None, option("The HTML file.", "report.html in the folder; of a file, beside it as FILE.html")
    ] = None,
) -> None:
    """One HTML file of a folder of results, with all that its figures need; from the tables alone.

    Examples:
        rnn-longctx report runs/demo
        rnn-longctx report runs/monitor.jsonl --out monitor.html
    """
    from rnn_longctx.config import home_path
    from rnn_longctx.eval.show.page.page import write_page
    from rnn_longctx.eval.show.page.parts import page_of

    path = home_path(results)
    target = out or (path / "report.html" if path.is_dir() else path.with_suffix(".html"))
    page = write_page(page_of(path), target)
    wrote(page.parent, [page.name])
