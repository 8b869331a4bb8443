"""Typed configs: YAML files and ``--set a.b=value`` into nested dataclasses, and lengths such as ``64k``.

Every mistake (an unknown key, a wrong type, a missing file) is one InputError line that names the key and the
file.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rnn_longctx.errors import InputError, nearest

T = TypeVar("T")
_UNITS = {"": 1, "k": 1024, "m": 1024**2}


class _Loader(yaml.SafeLoader):
    """YAML whose mappings say every key once: PyYAML silently takes the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.composer.ComposerError(None, None, f"{twice!r} is there twice", node.start_mark)
        return node


def home_path(path: str | Path) -> Path:
    """Return a person's path, with a leading ~ as the home directory, which a shell leaves alone in `--out=~/x`, as
    YAML does. Raises InputError for what can be no path: text in the place of a file's name, a number."""
    if not isinstance(path, str | Path):
        raise InputError(f"expected a path, got {type(path).__name__} {path!r:.60}")
    if "\0" in str(path) or any(len(os.fsencode(name)) > 255 for name in Path(path).parts):
        raise InputError(
            f"{str(path)[:40]!r}... cannot be the name of a file: a path was expected, not the text itself"
        )
    return Path(os.path.expanduser(path))


def parse_length(text: str | int, what: str = "a length") -> int:
    """Return a length in tokens: "64k" -> 65536, "1m" -> 1048576 (k = 1024, m = 1024**2).

    Raises:
        InputError: it is zero, negative or no whole number.
    """
    raw = str(text).strip().lower()
    number, unit = (raw[:-1].strip(), raw[-1]) if raw[-1:] in ("k", "m") else (raw, "")
    if isinstance(text, bool) or not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise InputError(f"{what} is a positive whole number such as 256, 64k or 1m, not {text!r}")
    return int(number) * _UNITS[unit]


def parse_lengths(text: str | Sequence[str | int]) -> list[int]:
    """Return several lengths, in their order: "256,1k,4k" -> [256, 1024, 4096]. Raises InputError for none."""
    if not isinstance(text, str | Sequence) and not hasattr(text, "__iter__"):
        raise InputError(f"lengths are whole numbers such as 256,1k,4k, not {text!r:.60}")
    parts = text.split(",") if isinstance(text, str) else list(text)
    if not parts:
        raise InputError("no length given; expected some, such as 256,1k,4k")
    return [parse_length(p) for p in parts]


def format_length(length: int) -> str:
    """Return a length as `parse_length` reads it: 65536 -> "64K", 1048576 -> "1M", 1000 -> "1000"."""
    for unit, size in (("M", 1024**2), ("K", 1024)):
        if length and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number of things in words: "1 head", "2 heads"; plural: where it is not the noun and an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from a plain mapping; `where` (a file name) leads every error message.

    Fields may be int ("64k" is read as a length), float (so is the string "3e-3", which YAML 1.1 does not
    take for a number), bool, str, Path, Literal, list, tuple, dict, Any, unions of them and nested
    dataclasses. Raises InputError: unknown or missing key, wrong type, or whatever the dataclass itself
    refuses.
    """
    return _build(cls, mapping, "", f"{where}: " if where else "")


def read_yaml(path: str | Path, what: str = "config") -> dict[str, Any]:
    """Return the mapping that a YAML file holds; `what` the file is called where it cannot be read. Raises
    InputError."""
    path = home_path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read {what} {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys to values, got {_shown(data)}")
    return data


def load_yaml(cls: type[T], path: str | Path, overrides: Sequence[str] = (), what: str = "config") -> T:
    """Read a YAML file into the dataclass `cls`; `overrides` are ``"a.b=value"`` with a YAML value; `what` the file is
    called where it cannot be read."""
    path, data = home_path(path), read_yaml(path, what)
    strange = [str(name) for name in data if name not in {f.name for f in dataclasses.fields(cls)}]  # type: ignore[arg-type]
    if len(strange) > 1 and 2 * len(strange) > len(data):
        names = f"of its {len(data)} keys {', '.join(strange[:6])} are unknown here"
        raise InputError(
            f"{path} is a config of something else (train, eval, capacity and compare have their own): {names}"
        )
    for item in overrides:
        data = _override(data, item)
    return from_dict(cls, data, where=str(path))


def to_dict(obj: Any) -> Any:
    """Return plain dicts, lists and scalars (tuples become lists, paths strings), which from_dict and YAML read."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_dict(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {k: to_dict(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_dict(v) for v in obj]
    return str(obj) if isinstance(obj, Path) else obj


def _override(data: dict[str, Any], item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set expects key=value (such as optimizer.lr=1e-3), got {item!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {item}: {text!r} is not a YAML value") from None
    data = copy.deepcopy(data)
    node = data
    for depth, name in enumerate(parts[:-1]):
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise InputError(f"--set {item}: {'.'.join(parts[: depth + 1])} is {_shown(child)}, not a group of keys")
        node = child
    node[parts[-1]] = value
    return data


def _build(cls: type[T], mapping: Any, key: str, where: str) -> T:
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where}{key or 'config'}: expected a mapping of keys to values, got {_shown(mapping)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for name in mapping:
        if name not in fields:
            raise InputError(f'{where}unknown key "{prefix}{name}"{nearest(str(name), fields)}')
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in mapping:
            raise InputError(f'{where}missing key "{prefix}{name}" ({_expected(hints[name])})')
    values = {n: _convert(hints[n], v, f"{prefix}{n}", where) for n, v in mapping.items()}
    try:
        return cls(**values)
    except InputError as error:  # a check in __post_init__ knows neither the file nor its own place in it
        raise InputError(f"{where}{prefix}{error}") from None


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """Return `value` as `hint`, or raise InputError. It is strict but for what YAML cannot write: tuples, 3e-3, 64k,
    inf."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = InputError(f"{where}{key}: expected {_expected(hint)}, got {_shown(value)}")
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # An exact type goes first, so that a number given to `str | float` stays a number, and of several dataclasses
        # the one that a mapping spells out best.
        for arg in sorted(args, key=lambda a: (a is not type(value), _misfit(a, value))):
            try:
                return _convert(arg, value, key, where)
            except InputError as error:
                if dataclasses.is_dataclass(arg) and isinstance(value, Mapping):
                    raise error
        raise wrong
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key, where)
    if origin is typing.Literal:
        if value in args:
            return value
        raise InputError(f"{where}{key}: unknown value {value!r}{nearest(str(value), map(str, args))}")
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        element = args[0] if args else Any
        fixed = origin is tuple and len(args) > 0 and Ellipsis not in args
        if isinstance(value, str):  # `--set lengths=256,1k`; a single string is one item (names may hold commas)
            name = element in (str, Any) or str in typing.get_args(element)
            value = [value] if name else [p.strip() for p in value.split(",")]
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(args)):
            raise wrong
        hints = args if fixed else [element] * len(value)
        items = [_convert(h, v, f"{key}[{i}]", where) for i, (h, v) in enumerate(zip(hints, value))]
        return tuple(items) if tuple in (origin, hint) else items
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise wrong
        element = args[1] if args else Any
        return {str(k): _convert(element, v, f"{key}.{k}", where) for k, v in value.items()}
    if hint is Path and isinstance(value, str):
        return home_path(value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value) if isinstance(value, (int, float, str)) else _fail(wrong)
        except ValueError:
            raise wrong from None
    if hint is int and isinstance(value, str):
        try:
            return parse_length(value)
        except InputError:
            raise wrong from None
    if hint is type(None) and value is None:
        return None
    if not isinstance(hint, type) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong
    return value


def _misfit(hint: Any, value: Any) -> tuple[int, int]:
    """Return how many keys a mapping lacks to be a dataclass, and how many it has too many."""
    if not dataclasses.is_dataclass(hint) or not isinstance(value, Mapping):
        return 0, 0
    fields = {f.name: f for f in dataclasses.fields(hint) if f.init}
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    return sum(n not in value for n in required), sum(n not in fields for n in value)


def _fail(error: Exception) -> Any:
    raise error


def _expected(hint: Any) -> str:
    """Return a type as a person would say it: "int or null", "a list of float"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(a) for a in args)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in args)
    if origin is tuple and args and Ellipsis not in args:
        return f"a list of {len(args)} ({', '.join(_expected(a) for a in args)})"
    if origin in (list, tuple, Sequence):
        return f"a list of {_expected(args[0])}"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "a mapping of keys to values"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _shown(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r}"
