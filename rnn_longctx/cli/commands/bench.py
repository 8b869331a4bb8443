"""`rnn-longctx bench`: the commands that measure speed, one for each file of `rnn_longctx.eval.bench`."""

from __future__ import annotations

import csv
import inspect
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from rnn_longctx.cli.command import command, flattened
from rnn_longctx.cli.output import fact, row, show, table
from rnn_longctx.config import home_path
from rnn_longctx.plain import guarded

OUT = Annotated[Path | None, typer.Option(help="CSV file to write the table to.")]


class _Benches(TyperGroup):
    """The benches of the registry, which is read (and torch with it) only where one of them is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        from rnn_longctx.eval.bench.base import BENCHES

        return list(BENCHES)

    def get_command(self, ctx: Any, name: str) -> Any:
        from rnn_longctx.eval.bench.base import BENCHES

        if name not in BENCHES:
            return None
        program = typer.Typer(add_completion=False)
        program.command(name)(flattened(_as_command(BENCHES[name].run)))
        return typer.main.get_command(program)


bench = typer.Typer(cls=_Benches, no_args_is_help=True, help="Speed, side by side with what people use today.")
command("bench")(bench)


@bench.callback()
def _only_benches() -> None:
    """(A group without commands of its own needs a callback.)"""


def _as_command(run: Callable[..., Iterator[dict[str, Any]] | str]) -> Callable[..., None]:
    """Return a function for typer: parameters before the star are arguments, the others options; one more for a CSV."""
    hints = get_type_hints(run, include_extras=True)
    parameters = []
    for name, parameter in inspect.signature(run).parameters.items():
        kind, about = hints[name].__origin__, hints[name].__metadata__[0]
        option: Any = typer.Option(help=about, min=1 if kind is int else None)
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            option = typer.Argument(help=about)
        parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option]))
    parameters.append(inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=OUT))

    def measure(**values: Any) -> None:
        out = values.pop("out")
        result = run(**values)
        if isinstance(result, str):
            fact("text", result)
            show(result)
        else:
            _record(result, out)

    measure.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    measure.__doc__ = run.__doc__
    return measure


def _record(rows: Iterator[dict[str, Any]], out: Path | None) -> None:
    """Print each row as it is measured, and keep those there are in a CSV file."""
    from rnn_longctx.eval.bench.base import environment

    words = [w for i, w in enumerate(sys.argv) if i > 0 and w != "--out" and sys.argv[i - 1] != "--out"]
    about = {**environment(), "command": shlex.join(["rnn-longctx", *words])}
    measured: list[dict[str, Any]] = []
    written: list[dict[str, Any]] = []
    for one in rows:
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in one.items()}
        row("  ".join(f"{k} {v}" for k, v in shown.items()))
        measured.append(one)
        written.append({k: guarded(v) for k, v in (shown | about).items()})
        table("rows", measured)
        if out:
            out = home_path(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, written[0].keys())
                writer.writeheader()
                writer.writerows(written)
