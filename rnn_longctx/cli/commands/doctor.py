"""`rnn-longctx doctor`: what works on this machine, what is missing, and the line that installs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.output import fact, table

if TYPE_CHECKING:
    from rich.table import Table

    from rnn_longctx.eval.doctor import Finding

STYLES = {"works": "green", "broken": "bold red", "missing": "yellow", "not here": "dim"}


@command("doctor")
def doctor() -> None:
    """Try everything on this machine, and say what works, what is missing and the line that installs it.

    The exit code is 0 if the core works, 1 if not.

    Examples:
        rnn-longctx doctor
        rnn-longctx doctor --json
    """
    from rnn_longctx.eval.doctor import core_works, examine

    findings = examine()
    works = core_works(findings)
    fact("core_works", works)
    table("findings", [asdict(finding) for finding in findings], _table(findings), _lines(findings, works), width=160)
    if not works:
        raise typer.Exit(1)


def _table(findings: Sequence[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("what", "version", "state", "what was seen"):
        drawn.add_column(column, overflow="fold", no_wrap=column == "state")
    for f in findings:
        drawn.add_row(Text(f.name), Text(f.version or ""), Text(f.state, STYLES[f.state]), Text(f.said))
    return drawn


def _lines(findings: Sequence[Finding], works: bool) -> str:
    """Return what is to be done: a line for each thing that is missing or broken, and the verdict."""
    lines = []
    for f in findings:
        if f.state in ("missing", "broken"):
            to_do = f": {f.install}" if f.install else ""
            lines.append(f"{f.state}: {f.name}, for {f.needed_for}{to_do}")
    broken = ", ".join(f.name for f in findings if f.core and f.state in ("missing", "broken"))
    verdict = "the core works" if works else f"the core does not work: {broken}"
    return "\n".join(["", *lines, *([""] if lines else []), verdict])
