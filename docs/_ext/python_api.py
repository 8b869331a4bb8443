"""The reference of Python names: of the package, of its subpackages, and of the contracts, from their docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prose import docstring

PACKAGE = "rnn_longctx"
# The rooms in the order of the page; of each its packages that say with `__all__` what is public.
ROOMS = ("data", "tasks", "recurrence", "models", "mitigations", "probes", "train", "eval", "sensors")
INSIDE = ("eval.show",)  # whose `__all__` is for the command line
# Modules without `__all__` all of whose functions and classes without an underscore are public.
MODULES = (
    *("testing.mixers", "testing.recurrences", "testing.remedies", "testing.tasks"),
    *("recurrence.policy", "recurrence.interface", "recurrence.gates"),
    *("probes.attribution", "probes.remembrance", "probes.retention", "probes.held", "probes.links", "probes.reach"),
    *("errors", "models.interface"),
)
SHOWN = ("__call__",)  # of a class, beside the methods without an underscore


def names(module: str) -> list[str]:
    """Return the public names of a module, each `rnn_longctx.` and so on."""
    of = importlib.import_module(module)
    if listed := getattr(of, "__all__", None):
        return [f"{module}.{name}" for name in listed]
    defined = (name for name, thing in vars(of).items() if getattr(thing, "__module__", None) == module)
    return [f"{module}.{name}" for name in defined if not name.startswith("_") and callable(getattr(of, name))]


def page() -> str:
    """Return the page: a section a module, an entry a name. What stands in two places is described in the first."""
    described: dict[int, str] = {}
    return "\n\n".join(_section(module, described) for module in modules())


def modules() -> Iterator[str]:
    """Yield the modules of the page: the package, its packages that say what is public, and MODULES."""
    yield PACKAGE
    root = Path(__file__).resolve().parents[2] / PACKAGE
    for room in ROOMS:
        for path in sorted((root / room).resolve().rglob("__init__.py")):
            name = ".".join((room, *path.parent.relative_to((root / room).resolve()).parts))
            if "\n__all__ = " in path.read_text() and not name.startswith(INSIDE):
                yield f"{PACKAGE}.{name}"
    yield from (f"{PACKAGE}.{name}" for name in MODULES)


def _section(module: str, described: dict[int, str]) -> str:
    of = importlib.import_module(module)
    parts = [f"## {module}", docstring(of)]
    elsewhere: list[str] = []
    for name in names(module):
        thing = pkgutil.resolve_name(name)
        first = described.setdefault(id(thing), name)
        if first == name:
            parts.append(entry(name, thing))
        else:
            elsewhere.append(f"`{name.removeprefix(module + '.')}` is {{py:obj}}`{first}`")
    if elsewhere:
        parts.append("; ".join(elsewhere) + ".")
    return "\n\n".join(part for part in parts if part)


def entry(name: str, thing: Any) -> str:
    """Return the entry of a function, a class with its methods, or a thing of some class."""
    if inspect.isclass(thing):
        members = [_member(member, value) for member, value in _members(thing)]
        return directive("class", name + _signature(thing), [docstring(thing), *members], fence=6)
    if callable(thing) and hasattr(thing, "__name__"):
        return directive("function", name + _signature(thing), [docstring(thing)])
    own = type(thing).__module__.startswith(PACKAGE)
    return directive("data", name, [docstring(type(thing)) if own else f"A {type(thing).__name__}."])


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that have a docstring, those of this package's bases too."""
    seen = set()
    for base in kind.__mro__:
        if base.__module__.startswith(PACKAGE):
            for name, value in vars(base).items():
                if (name in SHOWN or not name.startswith("_")) and name not in seen:
                    seen.add(name)
                    function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                    if isinstance(function, property) or inspect.isfunction(function):
                        yield name, value


def _member(name: str, value: Any) -> str:
    if isinstance(value, property):
        return directive("property", name, [docstring(value)], fence=4)
    options = [f":{kind.__name__}:" for kind in (classmethod, staticmethod) if isinstance(value, kind)]
    function = getattr(value, "__func__", value)
    first = not isinstance(value, staticmethod)
    return directive("method", name + _signature(function, first), [docstring(function)], fence=4, options=options)


def directive(kind: str, title: str, parts: list[str], fence: int = 5, options: list[str] = []) -> str:  # noqa: B006
    """Return a directive of Sphinx's Python domain, in MyST."""
    body = "\n\n".join(part for part in parts if part)
    ticks = "`" * fence
    return "\n".join([f"{ticks}{{py:{kind}}} {title}", *options, "", body, ticks])


def _signature(thing: Any, method: bool = False) -> str:
    """Return the parameters in brackets, and what is returned; without defaults that have no text of their own."""
    try:
        signature = inspect.signature(thing)
    except (ValueError, TypeError):
        return "()"
    parameters = list(signature.parameters.values())[1 if method else 0 :]
    plain = [
        p.replace(default=_Text("...")) if p.default is not p.empty and " " in repr(p.default) else p
        for p in parameters
    ]
    returns = signature.empty if inspect.isclass(thing) else signature.return_annotation
    text = str(signature.replace(parameters=plain, return_annotation=returns))
    return text.replace("'", "").replace("\n", " ")


class _Text:
    """A default that shows as a text."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text
