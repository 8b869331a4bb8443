"""Mixers of transformers, whose forward calls functions of its modeling file: the scan and the step.

While a mixer with a policy runs, and only then, dispatchers stand in the place of these functions; a context variable
tells them whose call it is, so that other mixers (and other threads) get the originals. Everything else of the mixer
stays as it is. docs/develop/adoption.md draws it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.cache import cache_in
from rnn_longctx.models.adopt.mixer import AdoptedMixer, Call
from rnn_longctx.recurrence.rows import LeftPaddingError

_running: ContextVar[Call | None] = ContextVar("running", default=None)
_lock = threading.Lock()
_users: dict[int, int] = {}  # by the id of a modeling file's globals: calls on their way
_originals: dict[int, dict[str, Any]] = {}


class DispatchedMixer(AdoptedMixer):
    """A mixer whose scan and step are functions that it looks up when it is called."""

    def __init__(self, module: nn.Module, name: str):
        self.module: Any = module
        missing = [n for n in list(self.functions())[:2] if n not in self.names]
        if missing and type(module).__module__.startswith("mamba_ssm."):
            raise InputError(f"{name} is a Mamba-1 mixer of mamba_ssm: of that library's, Mamba-2's alone are adopted")
        if missing:
            raise InputError(
                f"{name} is a mixer ({type(module).__name__}) that does not call {' and '.join(missing)}: "
                f"transformers 5.15 or newer is needed, and a model of its own code"
            )
        super().__init__(module, name)

    @staticmethod
    def functions() -> dict[str, Callable]:
        """Return what stands in the place of the modeling file's scan, its step, and its shortcut in training, by their
        names: each is called with the `Call` before the arguments of the original."""
        raise NotImplementedError

    @property
    def names(self) -> dict[str, Any]:
        """The place where the mixer's forward looks up what it calls: the globals of the file of the class that defines
        it."""
        home = next(c for c in type(self.module).__mro__ if "forward" in vars(c))
        return vars(sys.modules[home.__module__])

    def drops(self, arguments: dict[str, Any], cache: Any) -> bool:
        """Whether the library's own scan would drop the state in this call of the mixer."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the mixer's own forward, its scan and step ours where a policy is active or the library's would be
        wrong. InputError: a static cache that attention shares."""
        arguments = self.arguments(args, kwargs)
        cache = cache_in(arguments)
        if self.active or self.drops(arguments, cache):
            return self._dispatched(arguments, cache, args, kwargs)
        return self.original("forward")(*args, **kwargs)

    @torch.compiler.disable
    def _dispatched(self, arguments: dict[str, Any], cache: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        mask = arguments.get("attention_mask")
        if self.active:
            grows(self, cache)
        layer = None if cache is None else cache.layers[self.module.layer_idx]
        fresh = cache is None or not cache.has_previous_state(self.module.layer_idx)
        call = Call(self, layer, None if mask is None or mask.ndim != 2 else mask.bool(), fresh)
        token = _running.set(call)
        try:
            with _dispatchers(self.names, self.functions()), pads_explained(mask):
                return self.original("forward")(*args, **kwargs)
        finally:
            _running.reset(token)


@contextmanager
def pads_explained(mask: Any) -> Iterator[None]:
    """Say, where padding is found elsewhere than at the left, what may have taken a token for padding."""
    try:
        yield
    except LeftPaddingError as error:
        if mask is None:
            raise
        raise InputError(
            f"{error}; the library's generate takes every pad id for padding: where no token is, pass "
            "it attention_mask=torch.ones_like(ids)"
        ) from None


def no_shortcut(call: Call, *_: Any, **__: Any) -> None:
    """Stand for the kernel that training takes instead of all of a mixer: None says that there is none."""


@contextmanager
def _dispatchers(names: dict[str, Any], functions: dict[str, Callable]) -> Iterator[None]:
    """Put dispatchers in the place of a modeling file's functions, for as long as a mixer with a policy runs."""
    key = id(names)
    with _lock:
        _users[key] = _users.get(key, 0) + 1
        if _users[key] == 1:
            _originals[key] = {n: names[n] for n in functions if n in names}
            names.update({n: _dispatcher(f, functions[n]) for n, f in _originals[key].items()})
    try:
        yield
    finally:
        with _lock:
            _users[key] -= 1
            if not _users[key]:
                names.update(_originals.pop(key))
                del _users[key]


def _dispatcher(original: Callable, ours: Callable) -> Callable:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        running = _running.get()
        return original(*args, **kwargs) if running is None else ours(running, *args, **kwargs)

    return call


def grows(mixer: AdoptedMixer, cache: Any) -> None:
    """Raise InputError where an active mixer's cache is a static one that attention shares."""
    if static_attention(cache):
        raise InputError(
            f"{mixer.name} is under a remedy or watched, which takes the cache that grows: generate without "
            'cache_implementation="static"'
        )


def static_attention(cache: Any) -> bool:
    """Whether attention's keys in a cache have room for more tokens than were read. A layer of ours is not compilable,
    and the library leaves the mask of a single token out where one of a cache's layers is not: attention would read the
    room, too."""
    if cache is None or type(cache).__name__ != "StaticCache":
        return False
    return any(hasattr(layer, "max_cache_len") for layer in cache.layers)


def read_mask(attention: Any, u: Tensor) -> Tensor | None:
    """Return what attention's mask says of the tokens u (B, T, d_model): (B, T) bool, False at padding; None where it
    says nothing, or that there is none. A token that does not attend to itself is padding."""
    length = u.shape[1]
    if length == 1 or not isinstance(attention, Tensor):
        return None
    if attention.ndim == 4:
        own = attention[:, 0, :, -length:].diagonal(dim1=-2, dim2=-1)
        own = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    else:
        own = attention[:, -length:].bool()
    return None if bool(own.all()) else own.expand(u.shape[:2])
