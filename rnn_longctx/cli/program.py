"""The command line: parses, calls, prints. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rnn_longctx.cli.command import COMMANDS, flattened
from rnn_longctx.cli.options import Many
from rnn_longctx.cli.output import problem
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.plain import plain
from rnn_longctx.ranks import leave_to_first

PLUGIN = "--plugin MODULE_OR_FILE.py, anywhere on the line, adds remedies, tasks, mixers and so on of your own."


class _Program(TyperGroup):
    """The commands of the registry. `--plugin` may stand anywhere on the line: what it registers, a command too, is
    there before a command is looked for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        line, words = [], iter(args)
        for word in words:
            name, equals, value = word.partition("=")
            if word == "--":  # what follows are no options
                line += [word, *words]
            elif name != "--plugin":
                line.append(word)
            else:
                _load(value if equals else next(words, ""))
        self.commands.update(_registered())
        return super().parse_args(ctx, line)


def _load(plugin: str) -> None:
    """Import a plugin. Raises InputError, which names it, for whatever goes wrong in it."""
    from rnn_longctx.plugins import load_plugin

    if not plugin:
        raise InputError("--plugin needs a module, or a file: --plugin my_remedy.py")
    try:
        load_plugin(plugin)
    except InputError as error:
        raise InputError(f"--plugin {plugin}: {error}") from None
    except Exception as error:  # its code is somebody else's
        raise InputError(
            f"--plugin {plugin} fails as it is imported: {type(error).__name__}: {one_line(error)}"
        ) from error


def _registered() -> Mapping[str, Any]:
    """Return the commands of the registry as click runs them, by their names."""
    program = typer.Typer(add_completion=False)
    for name, command in COMMANDS.items():
        if isinstance(command.run, typer.Typer):
            program.add_typer(command.run, name=name)
        else:
            program.command(name)(flattened(command.run))
    commands = typer.main.get_group(program).commands
    for runnable in commands.values():
        _say_plugin(runnable)
    return commands


def _say_plugin(command: Any) -> None:
    """Put a line about --plugin, which `_Program` reads anywhere on the line, under the help of a command, and of those
    below it."""
    command.epilog = PLUGIN
    for inner in getattr(command, "commands", {}).values():
        _say_plugin(inner)


app = typer.Typer(
    cls=_Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find where a recurrent language model stops working as its context grows, and what fixes it.",
)


@app.callback()
def _options(
    plugin: Annotated[
        Many,
        typer.Option(
            help="A module or a .py file of your own, with remedies, tasks, mixers, recurrences, commands or benches; "
            "again for more."
        ),
    ] = None,
) -> None:
    """(`_Program` reads it.)"""


class _PlainLines(logging.Formatter):
    """A line of a log in which nothing steers a terminal: it may name files and models."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), lines=True)


def _tune_cpu() -> None:
    """Before torch is loaded: threads that wait asleep (spinning ones stall each other if anything else runs), and
    an allocator that keeps a call's activations instead of handing them back and faulting them in anew."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 29)  # M_TRIM_THRESHOLD


def main() -> None:
    """Run the command line. An error of input or a full GPU is one line; a reader that went away (`| head`) is no
    error."""
    _tune_cpu()
    warnings.formatwarning = lambda message, *_: f"rnn-longctx: warning: {plain(' '.join(str(message).split()))}\n"
    if logging.lastResort is not None:  # what prints a library's warnings where a program has set nothing up
        logging.lastResort.setFormatter(_PlainLines())
    try:
        app(standalone_mode=True)
    except (InputError, RuntimeError) as error:
        if not isinstance(error, InputError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        leave_to_first()
        problem(error)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
