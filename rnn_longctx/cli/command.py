"""What a command is: a function in a file of `rnn_longctx.cli.commands`, found there by the program.

    @command("plot")
    def plot(directory: Annotated[Path, typer.Argument(help="...")]) -> None:
        \"\"\"Draw the plots again, from the table alone.\"\"\"

A parameter whose type is a dataclass stands for all of its fields, each an option by itself, so that commands share
groups of options (`rnn_longctx.cli.options.ModelOptions`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

import typer

from rnn_longctx.registry import Registry


@dataclass(frozen=True)
class Command:
    """A name, and what runs: a function with typer's annotations, or a typer program of several."""

    name: str
    run: Callable[..., None] | typer.Typer


COMMANDS: Registry[Command] = Registry("command", "rnn_longctx.cli.commands")


def command(name: str) -> Callable[[Any], Any]:
    """Register a function (or a typer program of several commands) as `rnn-longctx NAME`."""

    def register(run: Any) -> Any:
        COMMANDS.register(Command(name, run))
        return run

    return register


def flattened(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer whose parameters are those of `function`, with the fields of a dataclass in the place
    of a parameter of its type."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))
            continue
        groups[name] = kind  # type: ignore[assignment]
        of_fields = get_type_hints(kind, include_extras=True)
        for f in fields(kind):
            default = inspect.Parameter.empty if f.default is MISSING else f.default
            new = inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=of_fields[f.name]
            )
            parameters.append(new)

    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in fields(kind)})
        function(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run
