"""What was written outside this package, put into its registries.

    @rnn_longctx.register
    @dataclass(frozen=True)
    class ForgetFaster(rnn_longctx.mitigations.Remedy):
        name = "forget-faster"
        ...

`rnn-longctx --plugin my_remedy.py eval ...` imports the file, so that what it registers can be named after it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.registry import Registry

T = TypeVar("T", bound=type)

# What a class is, by its base, and where such classes are registered; looked up one after the other when one comes.
_KINDS = (
    ("remedy", "rnn_longctx.mitigations.base:Remedy", "rnn_longctx.mitigations.base:REMEDIES"),
    ("task", "rnn_longctx.tasks.base:Task", "rnn_longctx.tasks.base:TASKS"),
    ("mixer", "torch.nn:Module", "rnn_longctx.models.mixers:MIXERS"),
)


def register(thing: T) -> T:
    """Put a class into the registry of its kind by its `name`, and return it (so it is a decorator).

    A remedy is a `rnn_longctx.mitigations.Remedy`, a task a `rnn_longctx.tasks.Task`, a mixer a `torch.nn.Module`.

    Raises:
        InputError: it is nothing of these, has no name, or its name is taken.
    """
    for _, base, registry in _KINDS:
        if isinstance(thing, type) and issubclass(thing, _named(base)):
            things: Registry[T] = _named(registry)
            _ = getattr(thing, "name", None) in things  # imports the file that has the name already, if there is one
            return things.register(thing)
    kinds = ", ".join(f"a {what} ({base.partition(':')[2]})" for what, base, _ in _KINDS)
    raise InputError(f"{thing!r:.80} cannot be registered: it is none of {kinds}")


def load_plugin(name: str) -> ModuleType:
    """Import a module by its name, or a file by its path, for what it registers; a second time, it is what it was.

    Raises:
        InputError: there is no such module or file.
    """
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except (ModuleNotFoundError, TypeError, ValueError) as error:
            missing = getattr(error, "name", None)  # of what the plugin imports itself, Python's own words say more
            if missing and not (name == missing or name.startswith(f"{missing}.")):
                raise
            raise InputError(
                f"no module named {name!r}: a plugin is a module, or a file such as my_remedy.py"
            ) from None
    path = home_path(name).resolve()
    if not path.is_file():
        raise InputError(f"no such file: {name}")
    module_name = f"rnn_longctx_plugin_{path.stem}"
    known = sys.modules.get(module_name)
    if known is not None and Path(str(known.__file__)) == path:
        return known
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
