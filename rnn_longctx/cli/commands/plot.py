"""`rnn-longctx plot`: the plots of a folder of results, from its table alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.output import table


@command("plot")
def plot(directory: Annotated[Path, typer.Argument(help="A folder with results.parquet or results.csv.")]) -> None:
    """Draw the plots again, from the table alone.

    Examples:
        rnn-longctx plot runs/mine
    """
    from rnn_longctx.eval.results import Results
    from rnn_longctx.eval.show.plots import plot_all

    paths = plot_all(Results.read(directory), directory)
    table("plots", [{"file": str(path)} for path in paths], *map(str, paths))
