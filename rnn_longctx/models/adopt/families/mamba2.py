"""Mamba-2 mixers of transformers (Mamba2, Bamba, FalconH1, GraniteMoeHybrid, NemotronH, Zamba2) under our policies.

In each modeling file the mixer's forward calls two functions of the module, the scan and the step. While a mixer with
a policy runs, and only then, dispatchers stand in their place; a context variable tells them whose call it is, so that
other mixers (and other threads) get the originals. Everything else of the mixer stays as it is. What a policy needs
beside the state (position, delay line) lies in the layer of the library's cache, and moves with its rows.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.layer import Beside, following
from rnn_longctx.models.adopt.wrapped import holds
from rnn_longctx.models.hashing import held
from rnn_longctx.models.mixers.mamba2 import dt_limits
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import ScanInputs, SteppedGates
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd.scan import scan
from rnn_longctx.recurrence.ssd.window import window_state
from rnn_longctx.recurrence.statistics import Observer

UNLIMITED = (0.0, math.inf)
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # from transformers 5.24 on; hybrids, pure models before
UNKNOWN = -(2**30)  # the position of a row that was read before a policy was there to count; below 0 for a long time

_eras = itertools.count(1)


class AdoptedMixer:
    """One mixer of another library, behind the interface that remedies use.

    Attributes:
        name: its path in the model.
        heads, headdim, d_state: its shape.
        backend: the scan to force, or None.
        state_dtype: see `scan`; another than None takes our scan, as a policy does.
        continuing: our scan runs under any policy, as long as it is set (see `continue_stream`).
        stays: ours stand before the module's methods without a policy too, from `stand` on.
    """

    library = "transformers"
    one_step_a_head = True
    per_channel = False  # whether a head has a rate for each channel of its state
    continuing = stays = False
    entries: tuple[str, ...] = ("forward",)  # the module's methods that ours stand before

    def __init__(self, module: nn.Module, name: str, time_step_limit_in_decode: bool = False):
        m: Any = module
        self.module, self.name = m, name
        self.backend: str | None = None
        self.state_dtype: torch.dtype | None = None
        missing = [n for n in list(self.functions())[:2] if n not in self.names]
        if missing and type(module).__module__.startswith("mamba_ssm."):
            raise InputError(f"{name} is a Mamba-1 mixer of mamba_ssm: of that library's, Mamba-2's alone are adopted")
        if missing:
            raise InputError(
                f"{name} is a mixer ({type(module).__name__}) that does not call {' and '.join(missing)}: "
                f"transformers 5.15 or newer is needed, and a model of its own code"
            )
        limits = dt_limits(self.dt_limit, f"{name}: the limits of dt")
        if limits != self.dt_limit:  # its own forward would fail at the first token
            raise InputError(f"{name}: the limits of dt, {self.dt_limit}, are beyond float32: {limits} says the same")
        self.heads, self.headdim, self.d_state = self.shape
        self.limit_in_decode = time_step_limit_in_decode
        self._arguments = list(inspect.signature(type(module).forward).parameters)[1:]
        self._policy = PLAIN
        self._observer: Observer | None = None
        self._era = 0
        self._stands = self._on = False  # whether ours stand before the mixer's own methods, and whether they act
        self._had: dict[str, Any] = {}  # what the instance itself held (a hook of accelerate)

    @staticmethod
    def functions() -> dict[str, Any]:
        """What stands in the place of the modeling file's scan, its step, and its shortcut in training."""
        return {"mamba2_chunk_scan": _scan, "mamba2_selective_state_update": _step,
                "mamba2_split_conv1d_scan_combined": _fused}  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.module.num_heads, self.module.head_dim, self.module.ssm_state_size

    @property
    def names(self) -> dict[str, Any]:
        """Where the mixer's forward looks up what it calls: the globals of the file of the class that defines it."""
        home = next(c for c in type(self.module).__mro__ if "forward" in vars(c))
        return vars(sys.modules[home.__module__])

    @property
    def A(self) -> Tensor:
        """(H,) or (H, N) float32, the decay rates: -exp(A_log)."""
        return -held(self.module, "A_log").detach().float().exp()

    @property
    def in_proj(self) -> nn.Module:
        return self.module.in_proj

    def steps(self, projected: Tensor) -> Tensor:
        """dt (B, T, H), after softplus and clamp, from what `in_proj` gives (B, T, ...): its last H channels in every
        family, times FalconH1's multipliers."""
        dt = projected[..., -self.heads :]
        if (multipliers := getattr(self.module, "mup_vector", None)) is not None:
            dt = dt * multipliers[..., -self.heads :]
        return F.softplus(dt + held(self.module, "dt_bias").to(dt.device)).clamp(*self.dt_limit)

    @property
    def D(self) -> Tensor:
        """(H,) or (H, P)."""
        return held(self.module, "D")

    @property
    def policy(self) -> ScanPolicy:
        return self._policy

    @policy.setter
    def policy(self, policy: ScanPolicy) -> None:
        self._policy = policy
        if self._needed and not self._on:
            other = getattr(self.module.forward, "__self__", None)
            if isinstance(other, AdoptedMixer) and other is not self and other.active:
                self._policy = PLAIN
                raise InputError(f"{self.name} is under a remedy already, by way of another model that holds it")
            self._era = next(_eras)
        self._on = self._needed
        if (self._on or self.stays) and not self._stands:
            self._stands, self._had = True, {n: self.module.__dict__.get(n) for n in self.entries}
            for n in self.entries:
                setattr(self.module, n, getattr(self, n))
        elif not (self._on or self.stays) and self._stands and self.module.__dict__.get("forward") == self.forward:
            # (a hook that was put before ours in the meantime stays, and ours behind it passes everything on)
            for n, had in self._had.items():
                if had is None:
                    delattr(self.module, n)
                else:
                    setattr(self.module, n, had)
            self._stands, self._had = False, {}

    def stand(self) -> None:
        """Begin to stand before the module's methods, where that is so without a policy too."""
        self.policy = self.policy

    def own(self, name: str) -> Callable:
        """Return the mixer's own method, or what the instance held in its place. (Looked up anew, so that a model can
        be pickled.)"""
        had = self._had.get(name)
        return had if had is not None else getattr(type(self.module), name).__get__(self.module)

    @property
    def observer(self) -> Observer | None:
        """Shown the states, as `Mamba2.observer`: our scan runs while there is one."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._observer = observer
        self.policy = self._policy

    @property
    def active(self) -> bool:
        return self._on and self._needed

    @property
    def _needed(self) -> bool:
        limited = self.limit_in_decode and self.dt_limit != UNLIMITED
        watched = self._observer is not None
        return self._policy != PLAIN or self.state_dtype is not None or self.continuing or limited or watched

    @property
    def dt_limit(self) -> tuple[float, float]:
        return tuple(self.module.time_step_limit or ())

    def continue_stream(self, on: bool) -> None:
        """Read what the library's own forward cannot: set before a call, and taken back after it."""
        self.continuing = on
        self.policy = self.policy

    def layer_of(self, library: Any) -> Any:
        """This mixer's part of the library's cache."""
        return library.layers[self.module.layer_idx]

    def state_of(self, layer: Any) -> Tensor:
        """The state (B, H, P, N) in a layer of the library's cache."""
        return layer.recurrent_states[0]

    def conv_of(self, library: Any) -> Tensor:
        """The inputs of the convolution, (B, channels, taps), in the library's cache."""
        return self.layer_of(library).conv_states[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mixer's own forward, its scan and step ours where a policy is active or the library's would be wrong.
        InputError: a static cache that attention shares."""
        given = dict(zip(self._arguments, args)) | kwargs
        cache = next((given[n] for n in CACHE_NAMES if given.get(n) is not None), None)
        if self.active or self.drops(given, cache):
            return self._forward(given, cache, args, kwargs)
        return self.own("forward")(*args, **kwargs)

    @torch.compiler.disable
    def _forward(self, given: dict[str, Any], cache: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        mask = given.get("attention_mask")
        if self.active and _static_attention(cache):
            raise InputError(
                f"{self.name} is under a remedy or watched, which takes the cache that grows: generate without "
                'cache_implementation="static"'
            )
        layer = None if cache is None else cache.layers[self.module.layer_idx]
        fresh = cache is None or not cache.has_previous_state(self.module.layer_idx)
        token = _running.set(_Call(self, layer, None if mask is None or mask.ndim != 2 else mask.bool(), fresh))
        try:
            with _replaced(self.names, self.functions()):
                return self.own("forward")(*args, **kwargs)
        except InputError as error:
            if mask is None or "left padding" not in str(error):
                raise
            raise InputError(f"{error}; the library's generate takes every pad id for padding: where no token is, pass "
                             "it attention_mask=torch.ones_like(ids)") from None  # fmt: skip
        finally:
            _running.reset(token)

    def drops(self, given: dict[str, Any], cache: Any) -> bool:
        """Whether the library's own scan would drop the state in this call of the mixer."""
        return False

    # --- what lies beside the state in a cache's layer

    def beside(self, layer: Any) -> Any:
        """What this policy keeps there, or None where it has not read all the tokens before."""
        found = getattr(layer, "beside", None)
        return found if found is not None and found.era == self._era else None

    def carry(self, layer: Any, state: Tensor) -> ScanCarry:
        """The carry of a layer that has read something; state (B, H, P, N) is the library's."""
        if (beside := self.beside(layer)) is None:
            self.place(layer, torch.full((len(state),), UNKNOWN, dtype=torch.int64, device="cpu"))
            beside = layer.beside
        p = self._policy
        placed = p.window is not None or p.reset is not None or any(c.every > 1 for c in p.caps)
        if placed and bool((beside.position < 0).any()):
            raise InputError(
                "this policy counts tokens, and the cache holds tokens read before it was there: start a new cache"
            )
        if beside.window is not None:
            state = beside.window.block
        elif torch.is_grad_enabled():
            state = state.clone()  # the library writes into it, and a backward pass reads it later
        if beside.log_decay is None:
            beside.log_decay = self.no_log_decay(state)
        return ScanCarry(state, beside.position, beside.log_decay, beside.window)

    def no_log_decay(self, state: Tensor) -> Tensor:
        return torch.full(state.shape[:2], math.nan, dtype=torch.float64, device=state.device)

    def place(self, layer: Any, position: Tensor) -> None:
        """Say where the rows of a layer stand, unless it is known. position: (B,) on the CPU."""
        if self.beside(layer) is None:
            self.keep(layer, Beside(self._era, position.clone(), None, None))

    def keep(self, layer: Any, beside: Beside) -> None:
        if not hasattr(layer, "beside"):
            layer.__class__ = following(type(layer))  # type: ignore[arg-type]
        layer.beside = beside

    def read(self, call: _Call, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None,
             dt_limit: tuple[float, float], seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x (B,T,H,P), dt (B,T,H), B and C (B,T,G,N), the library's state; returns y like x, and the state after."""
        m, reset = self.module, None
        if seq_idx is not None:
            reset = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        A = -m.A_log.to(torch.promote_types(m.A_log.dtype, torch.float32)).exp()
        y, new = scan(
            ScanInputs(x, B, C, self.D), SteppedGates(dt, A, m.dt_bias, dt_limit), Span(call.mask, reset),
            policy=self._policy, backend=self.backend, state_dtype=self.state_dtype, observer=self._observer,
            carry=None if state is None else self.carry(call.layer, state),
        )  # fmt: skip
        if call.layer is not None:
            self.keep(call.layer, Beside(self._era, new.position, new.log_decay, new.window))
        return y.contiguous(), window_state(new)


# --- the two functions


@dataclass
class _Call:
    """A mixer's forward on its way: mask (B, T) is False at padding."""

    mixer: AdoptedMixer
    layer: Any
    mask: Tensor | None
    fresh: bool = True


_running: ContextVar[_Call | None] = ContextVar("running", default=None)


def _scan(call: _Call, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
          initial_states: Tensor | None = None, dt_limit: tuple[float, float] = UNLIMITED,
          return_final_states: bool = False, z: Tensor | None = None, seq_idx: Tensor | None = None,
          cu_seqlens: Tensor | None = None, **_: Any) -> Any:  # fmt: skip
    if cu_seqlens is not None and seq_idx is None:
        raise InputError("packed sequences need seq_idx beside cu_seqlens")
    y, state = call.mixer.read(call, hidden_states, dt, B, C, initial_states, dt_limit, seq_idx)
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_final_states else y


def _step(call: _Call, state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
          D: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
          z: Tensor | None = None, **_: Any) -> Tensor:  # fmt: skip
    # One head's dt, D and dt_bias come repeated headdim times. The library's step ignores the limit of dt.
    limit = call.mixer.dt_limit if call.mixer.limit_in_decode else UNLIMITED
    y, new = call.mixer.read(
        call, hidden_states[:, None], dt[:, None, :, 0], B[:, None], C[:, None], state, limit, None
    )
    state.copy_(new)
    return y[:, 0] if z is None else y[:, 0] * F.silu(z)


def _fused(call: _Call, *_: Any, **__: Any) -> None:
    """The kernel that training takes instead of all of a mixer: None says that there is none."""


_lock = threading.Lock()
_users: dict[int, int] = {}
_originals: dict[int, dict[str, Any]] = {}


@contextmanager
def _replaced(names: dict[str, Any], ours: dict[str, Any]) -> Iterator[None]:
    """Dispatchers in the place of a modeling file's functions, for as long as a mixer with a policy runs."""
    key = id(names)
    with _lock:
        _users[key] = _users.get(key, 0) + 1
        if _users[key] == 1:
            _originals[key] = {n: names[n] for n in ours if n in names}
            names.update({n: _dispatch(f, ours[n]) for n, f in _originals[key].items()})
    try:
        yield
    finally:
        with _lock:
            _users[key] -= 1
            if not _users[key]:
                names.update(_originals.pop(key))
                del _users[key]


def _dispatch(original: Callable, ours: Any) -> Callable:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        now = _running.get()
        return original(*args, **kwargs) if now is None else ours(now, *args, **kwargs)

    return call


def _static_attention(cache: Any) -> bool:
    """Whether attention's keys in a cache have room for more tokens than were read. A layer of ours is not compilable,
    and the library leaves the mask of a single token out where one of a cache's layers is not: attention would read the
    room, too."""
    if cache is None or type(cache).__name__ != "StaticCache":
        return False
    return any(hasattr(layer, "max_cache_len") for layer in cache.layers)


# --- finding mixers


def cache_name(module: nn.Module) -> str:
    """What a module of transformers calls the cache, as an argument and in its output."""
    takes = inspect.signature(module.forward).parameters
    name = next((n for n in CACHE_NAMES if n in takes), None)
    if name is None:
        raise InputError(f"{type(module).__name__} takes no cache: mitigate it, and read with its own forward")
    return name


def is_mamba2(module: nn.Module) -> bool:
    """By its parts: isinstance across families fails."""
    return holds(module, "A_log", 1) and all(
        hasattr(module, part) for part in ("dt_bias", "in_proj", "conv1d")
    )  # fmt: skip


def is_mamba_ssm(module: nn.Module) -> bool:
    """A Mamba-2 mixer of mamba_ssm, by the names that it alone gives its shape."""
    return is_mamba2(module) and all(hasattr(module, part) for part in ("nheads", "headdim", "d_state", "dt_limit"))
