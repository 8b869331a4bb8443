"""`rnn-longctx compare`: architectures trained alike and measured alike, in one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import Many
from rnn_longctx.cli.output import say, table, wrote
from rnn_longctx.plain import plain_table


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
    killed goes on where it stopped.

    Examples:
        rnn-longctx compare configs/compare/smoke.yaml
        rnn-longctx compare configs/compare/growth_smoke.yaml --out runs/growth
    """
    from rnn_longctx.config import home_path
    from rnn_longctx.errors import InputError
    from rnn_longctx.eval.cells import CellsFailed
    from rnn_longctx.eval.compare import CompareConfig, load_comparison, run_growth, run_study

    study = load_comparison(config)
    study = replace(study, out=str(out or study.out), device=device or study.device)
    try:
        if isinstance(study, CompareConfig):
            run_study(study, jobs, only or [], say)
        elif jobs > 1:
            raise InputError(f"jobs: what is timed runs by itself; expected 1, got {jobs}")
        else:
            run_growth(study, only or [], say)
    except CellsFailed:
        _report(home_path(study.out))  # of the others
        raise
    _report(home_path(study.out))


def _report(folder: Path) -> None:
    """Print the table of what is finished, and draw it."""
    from rnn_longctx.eval.show import compare as show_compare
    from rnn_longctx.eval.show import growth as show_growth
    from rnn_longctx.eval.tables import compare as tables_compare
    from rnn_longctx.eval.tables import growth as tables_growth

    for of, shown in ((tables_compare, show_compare), (tables_growth, show_growth)):
        if (folder / of.FILE).exists():
            frame, name = of.read(folder), Path(of.FILE).stem
            table(name, frame, *shown.tables(plain_table(frame)), width=190)
            drawn = [path.name for path in shown.draw(frame, folder)]
            wrote(folder, [of.FILE, f"{name}.csv", *drawn])
