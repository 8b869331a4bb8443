"""Commands from their folder and from outside, and options that are gathered in dataclasses."""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

import rnn_longctx.cli.commands
from rnn_longctx.cli.command import COMMANDS, HABITS, Command, command, flattened
from rnn_longctx.errors import InputError


@dataclass(frozen=True)
class Options:
    """A group."""

    length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 8
    name: Annotated[str | None, typer.Option()] = None


@dataclass(frozen=True)
class Required:
    """Another group, one of whose options has no default."""

    out: Annotated[str, typer.Option(help="A folder.")]
    seed: int = 3


def test_every_file_of_the_folder_is_a_command():
    files = {module.name.replace("_", "-") for module in pkgutil.iter_modules(rnn_longctx.cli.commands.__path__)}
    assert files == set(COMMANDS) and "eval" in files
    assert all(COMMANDS[name].name == name for name in files)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(InputError, match="two commands are called 'plot'"):
        command("plot")(lambda: None)
    with pytest.raises(InputError, match="unknown command 'plto'; did you mean \"plot\""):
        COMMANDS["plto"]
    assert isinstance(COMMANDS["plot"], Command)


def test_the_fields_of_a_dataclass_are_options():
    calls = []

    def run(
        model: Annotated[str, typer.Argument(help="A name.")], required: Required, options: Options = Options()
    ) -> None:
        """What it does."""
        calls.append((model, required, options))

    flat = flattened(run)
    parameters = inspect.signature(flat).parameters
    assert list(parameters) == ["model", "out", "seed", "length", "name", *HABITS]
    assert flat.__doc__ == "What it does." and flat.__name__ == "run"
    assert parameters["out"].default is inspect.Parameter.empty and parameters["seed"].default == 3
    assert parameters["length"].default == 8 and parameters["name"].default is None
    kind, option = parameters["length"].annotation.__origin__, parameters["length"].annotation.__metadata__[0]
    assert kind is int and option.min == 1 and option.help == "Tokens."
    flat(model="demo", out="here", seed=1, length=2, name="x")
    assert calls == [("demo", Required("here", 1), Options(2, "x"))]


def test_typer_takes_them_as_options(capsys):
    calls = []

    def run(required: Required, options: Options = Options()) -> None:
        calls.append((required, options))

    app = typer.Typer(add_completion=False)
    app.command()(flattened(run))
    app(["--out", "a", "--length", "5"], standalone_mode=False)
    assert calls == [(Required("a", 3), Options(5, None))]
    with pytest.raises(SystemExit):
        app(["--length", "0", "--out", "a"])
    assert "--length" in capsys.readouterr().err and len(calls) == 1
    with pytest.raises(SystemExit):
        app([])
    assert "--out" in capsys.readouterr().err
