"""What a command is: a function in a file of `rnn_longctx.cli.commands`, found there by the program.

    @command("plot")
    def plot(directory: Annotated[Path, typer.Argument(help="...")]) -> None:
        \"\"\"Draw the plots again, from the table alone.\"\"\"

A parameter whose type is a dataclass stands for all of its fields, each an option by itself, so that commands share
groups of options (`rnn_longctx.cli.options.ModelOptions`). Every command has `--json` and `--quiet`
(`rnn_longctx.cli.output`). The lines under "Examples:" in a docstring are shown as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from rnn_longctx.cli.output import speaking
from rnn_longctx.registry import Registry

HABITS: dict[str, Any] = {  # the options of every command
    "as_json": Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else; messages go to stderr.")
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", help="Leave out messages: results, warnings and errors alone.")],
}


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
    of a parameter of its type, and those of HABITS."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints.get(name, parameter.annotation)
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

    habits = [name for name in HABITS if name not in {p.name for p in parameters}]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HABITS[name])
        for name in habits
    ]

    def run(**values: Any) -> None:
        as_json, quiet = (name in habits and bool(values.pop(name, False)) for name in HABITS)
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in fields(kind)})
        with speaking(as_json, quiet):
            function(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = function.__name__, _help(function.__doc__)
    return run


def _help(docstring: str | None) -> str | None:
    """Return a docstring as typer shows it: a backspace before the examples keeps their lines apart."""
    if not docstring or "\nExamples:\n" not in (clean := inspect.cleandoc(docstring)):
        return docstring
    return clean.replace("\nExamples:\n", "\n\b\nExamples:\n")
