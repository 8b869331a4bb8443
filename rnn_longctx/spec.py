"""Things named on a command line with parameters, `name:key=value,key=value`: remedies and tasks.

A thing is a frozen dataclass; its fields are its parameters. The canonical text lists them in the order of the
fields; one with the metadata `{"quiet": True}` is left out where it has its default, and one with `{"over": ...}` may
be tuned (`rnn-longctx tune`) over the values that it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar

from rnn_longctx.config import from_dict
from rnn_longctx.errors import InputError, nearest

T = TypeVar("T")


def quiet(default: Any) -> Any:
    """Return a parameter that canonical text leaves out where it has its default."""
    return field(default=default, metadata={"quiet": True})


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included, that a parameter may be tuned over.

    Attributes:
        scale: on which they are drawn evenly: "linear", "log", or "near-one", the logarithm of 1 - x, of shares such as
            a factor on a decay.
    """

    low: float
    high: float
    scale: Literal["linear", "log", "near-one"] = "linear"


Over = Range | tuple[Any, ...]  # a range, or values to choose from


def tuned(default: Any, over: Over, quiet: bool = False) -> Any:
    """Return a parameter that may be tuned over a range or some values; quiet: see `quiet`."""
    return field(default=default, metadata={"over": over, "quiet": quiet})


def tunable(kind: type) -> dict[str, Over]:
    """Return the parameters of a dataclass that may be tuned, each with what it is tuned over."""
    return {f.name: f.metadata["over"] for f in fields(kind) if "over" in f.metadata}


def parse(text: str, kinds: Mapping[str, type[T]], what: str) -> T:
    """Return the instance of `kinds[name]` that `name:key=value,...` stands for.

    Raises:
        InputError: an unknown name or parameter (with the nearest one), one given twice, a value of the wrong kind or
            beyond 64 bits, a missing one.
    """
    name = text.strip().partition(":")[0]
    if name not in kinds:
        raise InputError(f"unknown {what} {name!r}{nearest(name, kinds)}")
    kind = kinds[name]
    return build(kind, arguments(text, fields(kind), what), text, what)  # type: ignore[arg-type]


def arguments(text: str, parameters: Sequence[Field], what: str) -> dict[str, Any]:
    """Return the values of `name:key=value,...` by their names, each of which must be one of `parameters`. Raises
    InputError as `parse` does."""
    name, _, rest = text.strip().partition(":")
    known = [f.name for f in parameters]
    values: dict[str, Any] = {}
    for item in rest.split(",") if rest else ():
        key, equals, value = (word.strip() for word in item.partition("="))
        if not equals or not value:
            raise InputError(f"{what} {name}: {item!r} is not key=value")
        if key not in known:
            hint = nearest(key, known) if known else " (it has none)"
            raise InputError(f"{what} {name} has no parameter {key!r}{hint}")
        if key in values:
            raise InputError(f"{what} {name}: {key} is given twice")
        values[key] = _number(value)
        if isinstance(values[key], int) and abs(values[key]) >= 2**63:  # more than a tensor can count
            raise InputError(f"{what} {name}: {key} is out of range, got {value}")
    for f in parameters:
        if f.name not in values and _required(f):
            raise InputError(f"{what} {name} needs {f.name}, as in {name}:{f.name}=...")
    return values


def build(kind: type[T], values: Mapping[str, Any], text: str, what: str) -> T:
    """Return a thing of the values that `text` names. Raises InputError for what the thing refuses."""
    name = text.strip().partition(":")[0]
    try:
        return from_dict(kind, values, f"{what} {text!r}")
    except InputError as error:  # the thing's own message begins with its name, which stands there already
        raise InputError(str(error).replace(f": {name}: ", ": ", 1)) from None


def canonical(name: str, thing: Any) -> str:
    """Return the text that `parse` would read the thing from, parameters in the order of the fields."""
    silent = left_out(thing)
    text = ",".join(f"{f.name}={_text(getattr(thing, f.name))}" for f in fields(thing) if f.name not in silent)
    return f"{name}:{text}" if text else name


def left_out(thing: Any) -> set[str]:
    """Return the quiet parameters of a dataclass that have their defaults."""
    return {f.name for f in fields(thing) if f.metadata.get("quiet") and getattr(thing, f.name) == f.default}


def _required(f: Field) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _number(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
