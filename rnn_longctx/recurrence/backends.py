"""Which implementations of the scan exist, what each needs and which policies it supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rnn_longctx.errors import InputError, nearest
from rnn_longctx.recurrence.policy import ScanPolicy


@dataclass(frozen=True)
class Call:
    """What a scan is asked to read."""

    device: torch.device
    dtype: torch.dtype
    per_channel: bool
    headdim: int
    d_state: int


@dataclass
class Gate:
    """A gated RMSNorm, y * silu(z) / rms * weight, that a scan may apply as it writes y: all but 1 / rms, which is one
    factor a token, so that what reads y can take it over if it is linear. Without gradients only.

    z (B,T,H,P); weight (H*P). squares (B,T,·), float32: left by a scan that did so (others return y as ever); they add
    up to the sum over all channels of (y * silu(z))^2.
    """

    z: Tensor
    weight: Tensor
    squares: Tensor | None = None

    def operands(self) -> tuple[Tensor, Tensor]:
        """z and weight as kernels read them."""
        return self.z if self.z.stride(-1) == 1 else self.z.contiguous(), self.weight.contiguous()


@dataclass(frozen=True)
class Backend:
    """`missing()` says in words why it cannot run here, `refuses(policy, call)` why not with this policy and (unless
    the call is None) these inputs; None is yes. `observes(policy, call, k)`: whether it shows the state every k tokens
    from inside a scan. `gates`: whether `run` takes a Gate, and applies it where it can. `stretch_sum`: as that of
    `recurrence.ssd.pytorch`, which is the one of backends without."""

    name: str
    run: Callable
    missing: Callable[[], str | None]
    refuses: Callable[[ScanPolicy, Call | None], str | None]
    observes: Callable[[ScanPolicy, Call, int], bool] = lambda policy, call, every: False
    gates: bool = False
    stretch_sum: Callable | None = None


_BACKENDS: dict[str, Backend] = {}  # the first that can run is taken, so registration order is preference


def register(backend: Backend) -> Backend:
    _BACKENDS[backend.name] = backend
    choose.cache_clear()
    return backend


@lru_cache(maxsize=1024)  # asked at every scan
def choose(policy: ScanPolicy, forced: str | None = None, call: Call | None = None) -> Backend:
    """The backend for a policy and, where given, what it is to read.

    Raises:
        InputError: a forced backend that is unknown, missing here, or does not support the policy. Nothing falls
            back silently.
    """
    if forced is None:
        for backend in _BACKENDS.values():
            if not backend.missing() and not backend.refuses(policy, call):
                return backend
        raise InputError(f"no backend here supports the policy {policy.to_dict()}")
    if forced not in _BACKENDS:
        raise InputError(f"unknown backend {forced!r}{nearest(forced, _BACKENDS)}")
    backend = _BACKENDS[forced]
    reason = backend.missing() or backend.refuses(policy, call)
    if reason:
        raise InputError(f"backend {forced!r}: {reason}")
    return backend
