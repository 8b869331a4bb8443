"""What a layer hands on from one stretch of a stream to the next: a carry, and what a cache of them is to all rooms.

A carry is any dataclass of tensors, rows first, that is registered with `carry`:

    @carry
    @dataclass
    class Averages:
        total: Tensor  # (B, channels)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, Self, TypeVar, overload

from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.carry import ScanCarry, WindowCarry
from rnn_longctx.recurrence.ssd.window import level

C = TypeVar("C", bound=type)
Level = Callable[[list[Any]], list[Any]]

TYPES: dict[str, type] = {}  # by name, which is what a saved file says
LEVELS: dict[type, Level] = {}


@overload
def carry(cls: C) -> C: ...
@overload
def carry(*, level: Level) -> Callable[[C], C]: ...
def carry(cls: Any = None, *, level: Level | None = None) -> Any:
    """Register a dataclass of tensors, rows first, so that caches which hold it are saved and loaded.

    Its other fields may be numbers, text, None, and registered dataclasses; the field of a tensor that stays on the CPU
    is marked: `field(metadata=ON_CPU)`.

    Args:
        level: makes carries of rows that have read unequally much alike in all axes but the first, so that their rows
            can be joined. None: they are so anyway.
    Raises:
        InputError: another class of that name is registered.
    """

    def register(cls: Any) -> Any:
        other = TYPES.get(cls.__name__)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"two carries are called {cls.__name__!r}, in {other.__module__} and in {cls.__module__}")
        TYPES[cls.__name__] = cls
        if level is not None:
            LEVELS[cls] = level
        return cls

    return register if cls is None else register(cls)


def _level_scans(carries: list[ScanCarry]) -> list[ScanCarry]:
    """Begin the blocks of sliding windows at one place."""
    windows = [c.window for c in carries if c.window is not None]
    if not windows:
        return carries
    return [replace(c, state=w.block, window=w) for c, w in zip(carries, level(windows), strict=True)]


carry(level=_level_scans)(ScanCarry)
carry(WindowCarry)


@carry
@dataclass
class Carry:
    """The carry of a recurrent layer.

    Attributes:
        conv: (B, channels, d_conv - 1) the last inputs of its convolution, or None where it has none.
        scan: the state of its recurrence.
    """

    conv: Tensor | None
    scan: ScanCarry


class StreamCache(Protocol):
    """What a model has read of a stream: this library's `Cache`, or what stands for a cache of another library.

    Attributes:
        layers: the carries of its layers, of whatever kinds their mixers make; empty before the first token. Set to
            [], it is empty again.
        position: (B,) int64 on the CPU, tokens each row has read.
        tail: (B, <= overlap) the last token ids, kept only under a control that reads them again.
    """

    position: Tensor
    tail: Tensor | None

    @property
    def layers(self) -> list[Any]: ...
    @layers.setter
    def layers(self, layers: list[Any]) -> None: ...

    def clone(self) -> Self:
        """Return a copy that shares nothing."""
        ...

    def snapshot(self) -> Self:
        """Return the cache as it is now, whatever the model reads after it: what `restore` goes back to."""
        ...

    def restore(self, other: Self) -> None:
        """Become what another cache is, in place; the other is given up."""
        ...

    def rows(self, index: Tensor | list[int]) -> Self:
        """Return the cache of some rows, in that order."""
        ...

    @staticmethod
    def concat(parts: list[Any], order: list[int]) -> Any:
        """Return the rows of several such caches as one; `order[i]` is where the i-th of their rows belongs."""
        ...

    def crop_attention(self, tokens: int) -> None:
        """Let attention forget all but each row's last `tokens` tokens."""
        ...


def tree_zip(function: Callable[[list[Tensor]], Tensor], values: list[Any]) -> Any:
    """Return one value made of several of one shape: `function` of the tensors that stand at one place in all of them,
    which carries are levelled for first (see `carry`); what is no tensor is the first value's."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(values)
    if is_dataclass(first) and not isinstance(first, type):
        if (levelled := LEVELS.get(type(first))) is not None:
            values = levelled(values)
        joined = {f.name: tree_zip(function, [getattr(v, f.name) for v in values]) for f in fields(first)}
        return type(first)(**joined)
    if isinstance(first, list):
        return [tree_zip(function, list(group)) for group in zip(*values)]
    return first
