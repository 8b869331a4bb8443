"""What can be added is one file: a registry reads a folder of them, and of other packages what is registered by hand.

    REMEDIES: Registry[Remedy] = Registry("mitigation", "rnn_longctx.mitigations")

    @REMEDIES.register
    @dataclass(frozen=True)
    class RRI(Remedy):
        name = "rri"

A file is read when a name is looked up: first the one that is called like it (`state_norm.py` for "state-norm"), so
that one remedy does not cost the import of all, and the whole folder where that does not have it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from rnn_longctx.errors import InputError, nearest

T = TypeVar("T", bound=Any)

# What a command line takes for a name: `name:key=value,...`, `a+b`, a file's name and an option are then none.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Registry(Mapping[str, T], Generic[T]):
    """The classes (or other objects with a `name`) of one kind, by their names, in alphabetical order.

    Args:
        what: the kind in messages, such as "mitigation".
        package: the folder whose modules hold them. None: only what is registered.
    """

    def __init__(self, what: str, package: str | None = None):
        self.what, self.package = what, package
        self._known: dict[str, T] = {}
        self._read = package is None

    def register(self, thing: T) -> T:
        """Add a thing by its `name`, and return it (so it is a decorator).

        Raises:
            InputError: it has no name (see `name_of`), or another thing has it already.
        """
        name = self.name_of(thing)
        known = self._known.get(name)
        if known is not None and known is not thing and _home(known) != _home(thing):
            raise InputError(f"two {self.what}s are called {name!r}: {_home(known)} and {_home(thing)}")
        self._known[name] = thing
        return thing

    def name_of(self, thing: Any) -> str:
        """Return the name of a thing. Raises InputError where it has none, or one that a command line cannot take."""
        name = getattr(thing, "name", None)
        if not isinstance(name, str) or not name:
            raise InputError(f"a {self.what} is registered by its name, and {thing!r:.80} has none")
        if not _NAME.fullmatch(name):
            raise InputError(
                f"a {self.what} cannot be called {name!r}: a name is letters, digits, - and _ (as in my-own)"
            )
        return name

    def __getitem__(self, name: str) -> T:
        """Return the thing of a name. Raises InputError for an unknown one, with the nearest."""
        if name not in self:
            raise InputError(f"unknown {self.what} {name!r}{nearest(name, self)}")
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._known and not self._read and isinstance(name, str):
            self._import_file(name.replace("-", "_"))
        return name in self._known or (not self._read and name in set(self))

    def __iter__(self) -> Iterator[str]:
        self._import_folder()
        return iter(sorted(self._known))

    def __len__(self) -> int:
        self._import_folder()
        return len(self._known)

    def _import_file(self, leaf: str) -> None:
        if leaf.isidentifier():
            module = f"{self.package}.{leaf}"
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:  # the file is there, and something that it imports is not
                    raise

    def _import_folder(self) -> None:
        if not self._read:
            self._read = True
            package: Any = importlib.import_module(str(self.package))
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self.package}.{module}")


def _home(thing: Any) -> str:
    """Return where a class is defined (a module that is read again registers the same one), or what an object is."""
    return f"{thing.__module__}.{thing.__qualname__}" if isinstance(thing, type) else repr(thing)
