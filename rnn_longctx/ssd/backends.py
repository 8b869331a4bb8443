"""Which implementations of the scan exist, what each needs and which policies it supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rnn_longctx.errors import InputError, nearest
from rnn_longctx.ssd.policy import ScanPolicy


@dataclass(frozen=True)
class Backend:
    """`missing()` says in words why it cannot run here, `refuses(policy)` why not with this policy; None is yes."""

    name: str
    run: Callable
    missing: Callable[[], str | None]
    refuses: Callable[[ScanPolicy], str | None]


_BACKENDS: dict[str, Backend] = {}  # the first that can run is taken, so registration order is preference


def register(backend: Backend) -> Backend:
    _BACKENDS[backend.name] = backend
    return backend


def choose(policy: ScanPolicy, forced: str | None = None) -> Backend:
    """The backend for a policy.

    Raises:
        InputError: a forced backend that is unknown, missing here, or does not support the policy. Nothing falls
            back silently.
    """
    if forced is None:
        for backend in _BACKENDS.values():
            if not backend.missing() and not backend.refuses(policy):
                return backend
        raise InputError(f"no backend here supports the policy {policy.to_dict()}")
    if forced not in _BACKENDS:
        raise InputError(f"unknown backend {forced!r}{nearest(forced, _BACKENDS)}")
    backend = _BACKENDS[forced]
    reason = backend.missing() or backend.refuses(policy)
    if reason:
        raise InputError(f"backend {forced!r}: {reason}")
    return backend
