"""`rnn-longctx compare`: architectures trained alike and measured alike, in one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import Many


@command("compare")
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/compare/smoke.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder for cells, table and plots; the config's, if not given.")] = (
        None
    ),
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda (all GPUs), cuda:1; the config's, if not given.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models trained and measured at once.")] = 1,
    only: Annotated[Many, typer.Option(help="An entry of the config; again for more.")] = None,
) -> None:
    """Train and measure the entries of a config, or measure how their time and memory grow; a comparison that was
    killed goes on where it stopped."""
    from rnn_longctx.config import home_path
    from rnn_longctx.errors import InputError
    from rnn_longctx.eval.cells import CellsFailed
    from rnn_longctx.eval.compare import CompareConfig, load_comparison, run_growth, run_study

    study = load_comparison(config)
    study = replace(study, out=str(out or study.out), device=device or study.device)
    try:
        if isinstance(study, CompareConfig):
            run_study(study, jobs, only or [], typer.echo)
        elif jobs > 1:
            raise InputError(f"jobs: what is timed runs by itself; expected 1, got {jobs}")
        else:
            run_growth(study, only or [], typer.echo)
    except CellsFailed:
        _report(home_path(study.out))  # of the others
        raise
    _report(home_path(study.out))


def _report(folder: Path) -> None:
    """Print the table of what is finished, and draw it."""
    from rich.console import Console

    from rnn_longctx.eval.show import compare as show_compare
    from rnn_longctx.eval.show import growth as show_growth
    from rnn_longctx.eval.tables import compare as tables_compare
    from rnn_longctx.eval.tables import growth as tables_growth

    console = Console()
    if not console.is_terminal:
        console = Console(width=190)
    for table, show in ((tables_compare, show_compare), (tables_growth, show_growth)):
        if (folder / table.FILE).exists():
            frame = table.read(folder)
            for piece in show.tables(frame):
                console.print(piece)
            drawn = ", ".join(path.name for path in show.draw(frame, folder))
            console.print(f"{folder}: {table.FILE}, {Path(table.FILE).stem}.csv, {drawn}")
