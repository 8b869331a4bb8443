"""What a remedy changes about a layer's recurrence, as data.

    gates    log_decay'   = keep * (mul * log_decay + add)          per head
             input_scale' = keep * gain * input_scale
             keep         = 1 if dt >= min_dt else 0
    erasing  beta' = max(erase * beta, least_erase) for what a delta rule erases, per head
    caps     a list of (cap per head, every k tokens), applied in order
    window   tokens, or none
    reset    every k tokens, or none
    start    the initial state: zero, or stored

`recurrence.ssd.reference` and `recurrence.delta.reference` are the definitions of what each field does; every backend
is tested against them. A recurrence says which fields it follows, and refuses the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError, nearest

# A value for every head, or one value for all of them.
PerHead = float | tuple[float, ...]


@dataclass(frozen=True)
class Cap:
    """Norm cap: after every `every`-th token of a row, S <- S * min(1, norm / ||S||_F), per head.

    Stuffed Mamba v1 (arXiv 2410.07145), state normalisation. `norm` is in the units of the state.
    """

    norm: PerHead
    every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", _per_head(self.norm, "cap norm"))
        if not (isinstance(self.every, int) and self.every >= 1):
            raise InputError(f"a cap applies every k >= 1 tokens, got every={self.every}")
        if any(not value > 0 for value in _values(self.norm)):
            raise InputError(f"a cap's norm must be above 0, got {min(_values(self.norm))}")


@dataclass(frozen=True)
class ScanPolicy:
    """The change to one layer's recurrence. The default changes nothing.

    Args:
        mul, add: log-decay (natural log, per token) becomes mul * log_decay + add.
        gain: the input scale is multiplied by it.
        min_dt: tokens whose dt (after softplus and clamp) is below it are skipped: log-decay 0, input scale 0.
        erase, least_erase: what a delta rule erases is multiplied by `erase`, and is `least_erase` at the least.
        caps: norm caps, applied in order.
        window: the state holds the last `window` tokens only.
        reset: the state is dropped before tokens reset, 2 * reset, ... of a row (counted from 0).
        start: the state of shape (H, P, N) a row starts from, as nested tuples; None is zero.

    Raises:
        InputError: a cap together with a window (three readings of it differ by 10 to 30%), a window with a
            stored start, values out of range.
    """

    mul: PerHead = 1.0
    add: PerHead = 0.0
    gain: PerHead = 1.0
    min_dt: PerHead = 0.0
    erase: PerHead = 1.0
    least_erase: PerHead = 0.0
    caps: tuple[Cap, ...] = ()
    window: int | None = None
    reset: int | None = None
    start: tuple | None = None

    def __post_init__(self) -> None:
        for name in ("mul", "add", "gain", "min_dt", "erase", "least_erase"):
            object.__setattr__(self, name, _per_head(getattr(self, name), name))
        object.__setattr__(self, "caps", tuple(self.caps))
        for name in ("window", "reset"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise InputError(f"{name} is a number of tokens of at least 1, got {value}")
        if self.window is not None and self.caps:
            raise InputError("a norm cap cannot be combined with a window: what the cap should measure is undefined")
        if self.window is not None and self.start is not None:
            raise InputError("a window forgets its start: a stored initial state cannot be combined with it")
        if isinstance(self.start, Tensor):
            object.__setattr__(self, "start", nested(self.start))

    @property
    def changes_gates(self) -> bool:
        return (self.mul, self.add, self.gain, self.min_dt) != (1.0, 0.0, 1.0, 0.0)

    @property
    def changes(self) -> frozenset[str]:
        """The fields that are not what they are in a plain policy."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) != f.default)

    def then(self, other: ScanPolicy) -> ScanPolicy:
        """This policy, then `other`: affine parts compose left to right, all caps apply, the smaller window and
        reset win, the later start wins."""
        return ScanPolicy(
            mul=_combine(lambda a, b: a * b, self.mul, other.mul),
            add=_combine(lambda m, a, b: m * a + b, other.mul, self.add, other.add),
            gain=_combine(lambda a, b: a * b, self.gain, other.gain),
            min_dt=_combine(max, self.min_dt, other.min_dt),
            erase=_combine(lambda a, b: a * b, self.erase, other.erase),
            least_erase=_combine(
                lambda floor, by, other: max(floor * by, other), self.least_erase, other.erase, other.least_erase
            ),
            caps=self.caps + other.caps,
            window=min((w for w in (self.window, other.window) if w is not None), default=None),
            reset=min((r for r in (self.reset, other.reset) if r is not None), default=None),
            start=other.start if other.start is not None else self.start,
        )

    def start_state(self, like: Tensor) -> Tensor:
        """The state (B, H, P, N) a row starts from, in the shape and dtype of `like`."""
        if self.start is None:
            return torch.zeros_like(like)
        try:
            start = torch.tensor(self.start, dtype=like.dtype, device=like.device)
        except (TypeError, ValueError) as error:
            raise InputError(f"start is no state of numbers: {error}") from None
        if start.shape != like.shape[1:]:
            raise InputError(
                f"start has shape {tuple(start.shape)}, the layer's state is (H, P, N) = {tuple(like.shape[1:])}"
            )
        return start.expand_as(like).clone()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML: only the fields that differ from the default."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScanPolicy:
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise InputError(f"unknown policy field {key!r}{nearest(key, known)}")
        values = {key: _tuples(value) for key, value in data.items()}
        values["caps"] = tuple(Cap(**{k: _tuples(v) for k, v in cap.items()}) for cap in data.get("caps", ()))
        return cls(**values)

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def per_head(value: PerHead, heads: int, like: Tensor) -> Tensor | float:
    """A policy value as something that broadcasts over a trailing head axis: a float, or a tensor (H)."""
    if isinstance(value, float):
        return value
    if len(value) != heads:
        raise InputError(f"the policy gives {len(value)} per-head values, the layer has {heads} heads")
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _values(value: PerHead) -> tuple[float, ...]:
    return (value,) if isinstance(value, float) else value


def _per_head(value: Any, name: str) -> PerHead:
    try:
        if isinstance(value, Tensor):
            value = value.tolist()
        result = tuple(float(v) for v in value) if isinstance(value, Sequence) else float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} is a number or one number a head, got {value!r}") from None
    if any(v != v for v in _values(result)):
        raise InputError(f"{name} is not a number (NaN)")
    return result


def _combine(function: Any, *values: PerHead) -> PerHead:
    lengths = {len(v) for v in values if isinstance(v, tuple)}
    if not lengths:
        return function(*values)
    if len(lengths) > 1:
        raise InputError(f"policies for {' and '.join(map(str, sorted(lengths)))} heads cannot be combined")
    (heads,) = lengths
    return tuple(function(*row) for row in zip(*(v if isinstance(v, tuple) else (v,) * heads for v in values)))


def nested(tensor: Tensor) -> tuple:
    """A state as plain data, for `ScanPolicy.start`."""
    return _tuples(tensor.tolist())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Cap):
        return {k: _plain(v) for k, v in asdict(value).items()}
    return value


PLAIN = ScanPolicy()
