"""What was written outside this package, put into its registries.

    @rnn_longctx.register
    @dataclass(frozen=True)
    class ForgetFaster(rnn_longctx.mitigations.Remedy):
        name = "forget-faster"
        ...

`rnn-longctx --plugin my_remedy.py eval ...` imports the file, so that what it registers can be named after it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.registry import Registry

if TYPE_CHECKING:
    from rnn_longctx.mitigations.base import Remedy
    from rnn_longctx.tasks.base import Task

T = TypeVar("T")

LOADED = "RNN_LONGCTX_PLUGINS"  # the environment variable of what was loaded, one a line, for processes begun from here
_SOURCES: dict[str, tuple[ModuleType, str]] = {}  # each plugin that this process has loaded, and a hash of its source

COUNTS = ("n", "least", "tokens", "max")  # parameters of any task: how many examples are asked of it

_MIXER = ("Config", "attends", "of", "new_carry", "state_size")
_RECURRENCE = ("follows", "takes", "backends", "scan", "unfollowed", "reference", "state")


def register(thing: T) -> T:
    """Put a thing into the registry of its kind by its `name`, and return it (so it is a decorator of classes).

    A remedy is a class of `rnn_longctx.mitigations.Remedy`, a task one of `rnn_longctx.tasks.Task`, a mixer one of
    `torch.nn.Module`; a recurrence is an object as `rnn_longctx.recurrence.interface.Recurrence` describes it. Commands
    and benches have decorators of their own, `rnn_longctx.cli.command.command` and `rnn_longctx.eval.bench.base.bench`.

    Raises:
        InputError: it is nothing of these, lacks what its kind needs, or has no name, or one that is taken.
    """
    registry, check = _kind_of(thing)
    if check is _check_mixer and not getattr(thing, "name", ""):  # all that it lacks is said at once
        check(thing, str(getattr(thing, "__name__", thing)))
    name = registry.name_of(thing)
    check(thing, name)
    _ = name in registry  # imports the file that has the name already, if there is one
    registry.register(thing)
    return thing


def _kind_of(thing: Any) -> tuple[Registry[Any], Callable[[Any, str], None]]:
    """Return where a thing is registered, and what raises InputError if it lacks something."""
    from torch import nn

    from rnn_longctx.mitigations.base import REMEDIES, Remedy
    from rnn_longctx.models.mixers import MIXERS
    from rnn_longctx.recurrence.backends import Backends
    from rnn_longctx.recurrence.interface import RECURRENCES
    from rnn_longctx.tasks.base import TASKS, Task

    if isinstance(thing, type):
        if issubclass(thing, Remedy):
            return REMEDIES, _check_remedy
        if issubclass(thing, Task):
            return TASKS, _check_task
        if issubclass(thing, nn.Module):
            return MIXERS, _check_mixer
    elif isinstance(getattr(thing, "backends", None), Backends):
        return RECURRENCES, _check_recurrence
    kinds = "a remedy (Remedy), a task (Task), a mixer (Module), a recurrence (an object with backends)"
    raise InputError(f"{thing!r:.80} cannot be registered: it is none of {kinds}")


def _check_remedy(kind: type[Remedy], name: str) -> None:
    from rnn_longctx.mitigations.base import Remedy

    if name == "all":
        raise InputError('a remedy cannot be called "all", which stands for every remedy')
    _check_parameters(kind, f"remedy {name}")
    if kind.plan is Remedy.plan:
        raise InputError(f"remedy {name} lacks the method plan")


def _check_task(kind: type[Task], name: str) -> None:
    if name == "lm":
        raise InputError('a task cannot be called "lm", which is the loss of a text')
    _check_parameters(kind, f"task {name}")
    if kind.__abstractmethods__:
        raise InputError(f"task {name} lacks the method {', '.join(sorted(kind.__abstractmethods__))}")
    if taken := sorted(f.name for f in fields(kind) if f.name in COUNTS):
        raise InputError(f"task {name}: {', '.join(taken)} says how many examples are asked of every task: rename it")


def _check_mixer(kind: Any, name: str) -> None:
    from torch import nn

    from rnn_longctx.models.mixers.base import Recurrent

    missing = [] if getattr(kind, "name", "") else ["name"]
    missing += _missing(kind, _MIXER)
    if kind.forward is nn.Module.forward:
        missing.append("forward")
    if issubclass(kind, Recurrent):  # what every other method of it builds upon
        members = ("of", "heads", "headdim", "d_state", "inputs")
        missing += [m for m in members if _same(getattr(kind, m), getattr(Recurrent, m))]
    if missing:
        raise InputError(f"mixer {name} lacks {', '.join(missing)} (see rnn_longctx.models.interface.Mixer)")
    if not is_dataclass(kind.Config):
        raise InputError(f"mixer {name}: its Config must be a dataclass, whose fields are its parameters")


def _check_recurrence(thing: Any, name: str) -> None:
    if missing := _missing(thing, _RECURRENCE):
        lacks = ", ".join(missing)
        raise InputError(f"recurrence {name} lacks {lacks} (see rnn_longctx.recurrence.interface.Recurrence)")


def _check_parameters(kind: type, what: str) -> None:
    """Raise InputError unless a class is a dataclass itself: in one that only inherits it, new fields are none."""
    if "__dataclass_fields__" not in vars(kind):
        raise InputError(f"{what} must be a frozen dataclass: put @dataclass(frozen=True) above the class")


def _missing(thing: Any, members: Iterable[str]) -> list[str]:
    return [member for member in members if not hasattr(thing, member)]


def _same(ours: Any, base: Any) -> bool:
    """Return whether a member is the base's own, a classmethod by its function."""
    return getattr(ours, "__func__", ours) is getattr(base, "__func__", base)


def load_plugin(name: str) -> ModuleType:
    """Import a module by its name, or a file by its path, for what it registers; a second time, it is what it was.
    Processes that are begun from here can import it too (`load_handed_on`).

    Raises:
        InputError: there is no such module or file.
    """
    if name.endswith(".py"):
        path = home_path(name).resolve()
        module, loaded = _import_file(path, name), str(path)
    else:
        module, loaded = _import_module(name), name
    before = _handed_on()
    if loaded not in _SOURCES or _SOURCES[loaded][0] is not module:
        _SOURCES[loaded] = module, _source_hash(module)
    if loaded not in before:
        os.environ[LOADED] = "\n".join([*before, loaded])
    return module


def digest() -> str | None:
    """Return a hash of the source texts of all plugins loaded, as they were when they were imported; None: there are
    none."""
    texts = sorted(_SOURCES[name][1] for name in _handed_on() if name in _SOURCES)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8] if texts else None


def _source_hash(module: ModuleType) -> str:
    """Return a hash of a module's file, or of all Python files of a package. Where there is none: of its name."""
    if module.__file__ is None:
        return module.__name__
    file = Path(module.__file__)
    files = sorted(file.parent.rglob("*.py")) if hasattr(module, "__path__") else [file]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def load_handed_on() -> None:
    """Load the plugins of the process that began this one. Raises InputError as `load_plugin` does."""
    for name in _handed_on():
        load_plugin(name)


def _handed_on() -> list[str]:
    return [name for name in os.environ.get(LOADED, "").split("\n") if name]


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        missing = getattr(error, "name", None)  # of what the plugin imports itself, Python's own words say more
        if missing and not (name == missing or name.startswith(f"{missing}.")):
            raise
        raise InputError(f"no module named {name!r}: a plugin is a module, or a file such as my_remedy.py") from None


def _import_file(path: Path, name: str) -> ModuleType:
    """Import a file; name: as it was given, for the message where there is none."""
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
