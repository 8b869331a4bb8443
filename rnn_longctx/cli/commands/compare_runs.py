"""`rnn-longctx compare-runs`: what changed between two folders of results."""

from __future__ import annotations

from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.output import fact, table

FOLDER = "A folder that eval, pilot, compare or lm-eval filled."


@command("compare-runs")
def compare_runs(
    a: Annotated[str, typer.Argument(help=f"{FOLDER[:-1]}: what was before.")],
    b: Annotated[str, typer.Argument(help="Another one: what is now.")],
) -> None:
    """Say what changed from one folder of results to another, cell by cell, paired by slice, with intervals.

    Examples:
        rnn-longctx compare-runs runs/before runs/after
        rnn-longctx compare-runs runs/before runs/after --json
    """
    from rnn_longctx.eval.show.runs import in_words, tables
    from rnn_longctx.eval.tables.runs import compare_runs, read_run

    changes = compare_runs(read_run(a), read_run(b))
    fact("a", a)
    fact("b", b)
    fact("summary", in_words(changes))
    table("header", changes.header)
    table("only_a", changes.only_a)
    table("only_b", changes.only_b)
    table("cells", changes.cells, *tables(changes), width=150)
