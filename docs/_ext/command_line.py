"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from prose import escaped, table

from rnn_longctx.cli.program import PLUGIN, _registered

PROGRAM = "rnn-longctx"
NAMES = {str: "text", int: "number", float: "number", bool: ""}


def commands() -> dict[str, Any]:
    """Return every command by its words, those of a group below it: "eval", "capacity", "capacity train"."""
    return {name: command for top, runnable in sorted(_registered().items()) for name, command in _walk(top, runnable)}


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for inner, runnable in getattr(command, "commands", {}).items():
        yield from _walk(f"{name} {inner}", runnable)


def page() -> str:
    """Return the page: a section a command, with its help and its options."""
    option, _, meaning = PLUGIN.partition(",")
    return "\n\n".join([f"`{option}`,{meaning}", *(_section(*item) for item in commands().items())])


def _section(name: str, command: Any) -> str:
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    rows = [[_names(p), _kind(p), _default(p), _help(p)] for p in shown]
    arguments = [_argument(p) for p in shown if _is_argument(p)]
    usage = " ".join([f"{PROGRAM} {name}", "[OPTIONS]", *(arguments or ["COMMAND ..."] * hasattr(command, "commands"))])
    parts = [f"## {name}", f"    {usage}", _about(command)]
    if rows:
        parts.append(table(["", "takes", "unless given", ""], rows))
    return "\n\n".join(part for part in parts if part)


def _about(command: Any) -> str:
    """Return a command's help, lines that are indented as they are."""
    text = (command.help or "").replace("\b\n", "").replace("\f", "")
    return "\n".join(line if line.startswith("    ") else escaped(line) for line in text.strip().splitlines())


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _argument(parameter: Any) -> str:
    text = parameter.name.upper() + (" ..." if _many(parameter) else "")
    return text if parameter.required else f"[{text}]"


def _names(parameter: Any) -> str:
    if _is_argument(parameter):
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _kind(parameter: Any) -> str:
    """Return what a parameter takes; typer has click's types or, from 0.20 on, annotations in their place."""
    if getattr(parameter, "is_flag", False):
        return ""
    if hasattr(parameter, "type"):
        choices = getattr(parameter.type, "choices", ())
        word = ", ".join(map(str, choices)) or parameter.type.name
    else:
        kind = parameter.type_descriptor.annotation
        kind = next(iter(get_args(kind)), kind) if get_origin(kind) in (list, tuple) else kind
        word = NAMES.get(kind) or getattr(kind, "__name__", str(kind)).lower()
    return f"{word}, more than once" if _many(parameter) else word


def _many(parameter: Any) -> bool:
    """Return whether a parameter may be given again."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    return parameter.multiple or parameter.nargs == -1 or get_origin(kind) in (list, tuple)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "(needed)"
    if isinstance(shown := getattr(parameter, "show_default", None), str):
        return escaped(shown)
    default = parameter.default
    if default is None or default == () or callable(default) or getattr(parameter, "is_flag", False):
        return ""
    return f"`{default}`"


def _help(parameter: Any) -> str:
    return escaped(" ".join((getattr(parameter, "help", "") or "").split()))
