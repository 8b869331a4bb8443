"""What a model hands on from one stretch of a stream to the next: one carry a layer, and nothing on the module.

A carry is any dataclass of tensors, rows first, that is registered with `carry`:

    @carry
    @dataclass
    class Averages:
        total: Tensor  # (B, channels)

A cache copies, moves, reorders, joins, saves and loads carries without knowing their fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.files import replacing
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.recurrence.carry import ON_CPU, ScanCarry, WindowCarry, tree_map
from rnn_longctx.recurrence.ssd.window import level

C = TypeVar("C", bound=type)
Level = Callable[[list[Any]], list[Any]]

_TYPES: dict[str, type] = {}  # by name, which is what a saved file says
_LEVELS: dict[type, Level] = {}


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
        other = _TYPES.get(cls.__name__)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"two carries are called {cls.__name__!r}, in {other.__module__} and in {cls.__module__}")
        _TYPES[cls.__name__] = cls
        if level is not None:
            _LEVELS[cls] = level
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


@carry
@dataclass
class Cache:
    """A model's carries, in layer order, with what a restarting reader needs.

    Attributes:
        layers: one carry a layer, of the kind that its mixer makes; empty before the first token.
        position: (B,) int64 on the CPU, tokens each row has read.
        tail: (B, <= overlap) the last token ids, kept only under a control that reads them again.
    """

    layers: list[Any] = field(default_factory=list)
    position: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu"), metadata=ON_CPU)
    tail: Tensor | None = None

    def clone(self) -> Cache:
        return tree_map(torch.clone, self)

    def detach(self) -> Cache:
        """Return the cache without the gradients that lead to it; its tensors share their numbers with these."""
        return tree_map(torch.detach, self)

    def leaves(self) -> list[Tensor]:
        """Return every tensor, in the order of the fields."""
        tensors: list[Tensor] = []
        tree_map(tensors.append, self)
        return tensors

    def rows(self, index: Tensor | list[int]) -> Cache:
        """Return the cache of some rows, in that order (beam search, ragged batches)."""
        index = torch.as_tensor(index, device=getattr(index, "device", "cpu"))
        return tree_map(lambda t: t[index.to(t.device)], self)

    def to(self, device: torch.device | str) -> Cache:
        """Return the cache moved to a device; positions stay on the CPU."""
        return tree_map(lambda t: t.to(device), self, on_cpu=lambda t: t)

    def crop_attention(self, tokens: int) -> None:
        """Let attention forget all but each row's last `tokens` tokens: the layers whose carries have a method
        `cropped(tokens)`, which returns such a carry."""
        self.layers = [c.cropped(tokens) if hasattr(c, "cropped") else c for c in self.layers]

    def restore(self, other: Cache) -> None:
        """Become what another cache is, in place; the other is given up, since both share its tensors and lists."""
        vars(self).update(vars(other))

    @staticmethod
    def concat(parts: list[Cache], order: list[int]) -> Cache:
        """Return row groups put together again; `order[i]` is the row at which the i-th of their rows belongs."""
        back = torch.tensor(order, device="cpu").argsort()
        parts = [replace(part, tail=tail) for part, tail in zip(parts, level_tails(parts))]
        return tree_zip(lambda ts: torch.cat(ts)[back.to(ts[0].device)], parts)

    def save(self, path: str | Path, extra: dict[str, Tensor] | None = None, note: Any = None) -> None:
        """Write to one safetensors file by atomic rename; `extra` tensors and a JSON `note` travel with it.

        Raises:
            InputError: a carry that is not registered, or a file that cannot be written.
        """
        tensors: dict[str, Tensor] = {f"extra.{k}": v.contiguous() for k, v in (extra or {}).items()}
        shape = _flatten(self, "cache", tensors)
        with replacing(home_path(path)) as aside:
            save_file(tensors, aside, {"cache": json.dumps(shape), "note": json.dumps(note)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Cache:
        return cls.load_with(path, device)[0]

    @classmethod
    def load_with(cls, path: str | Path, device: torch.device | str = "cpu") -> tuple[Cache, dict[str, Tensor], Any]:
        """Return the cache, the extra tensors and the note of `save`. Raises InputError if the file is not one."""
        try:
            with safe_open(home_path(path), "pt") as file:
                header = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            cache = _unflatten(json.loads(header["cache"]), "cache", tensors)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            why = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None)
            why = f" ({why})" if why else ""  # what the file's reader says of another kind of file helps nobody
            raise InputError(f"{path} is no state that generate --save-state wrote{why}") from None
        extra = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
        return cache.to(device), extra, json.loads(header["note"])


def level_tails(parts: list[Any]) -> list[Any]:
    """Return the tails of caches as long as the longest: padded at the left, with ids that are never read again in
    time."""
    width = max((p.tail.shape[1] for p in parts if p.tail is not None), default=0)
    return [p.tail if p.tail is None else F.pad(p.tail, (width - p.tail.shape[1], 0)) for p in parts]


def tree_zip(function: Callable[[list[Tensor]], Tensor], values: list[Any]) -> Any:
    """Return one value made of several of one shape: `function` of the tensors that stand at one place in all of them,
    which carries are levelled for first (see `carry`); what is no tensor is the first value's."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(values)
    if is_dataclass(first) and not isinstance(first, type):
        if (levelled := _LEVELS.get(type(first))) is not None:
            values = levelled(values)
        joined = {f.name: tree_zip(function, [getattr(v, f.name) for v in values]) for f in fields(first)}
        return type(first)(**joined)
    if isinstance(first, list):
        return [tree_zip(function, list(group)) for group in zip(*values)]
    return first


def _flatten(value: Any, name: str, out: dict[str, Tensor]) -> Any:
    """Put tensors into `out`; return JSON that `_unflatten` rebuilds the value from."""
    if isinstance(value, Tensor):
        out[name] = value.clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if is_dataclass(value):
        kind = type(value).__name__
        if _TYPES.get(kind) is not type(value):
            raise InputError(f"a {kind} is not registered with rnn_longctx.models.cache.carry, so it cannot be saved")
        inside = {f.name: _flatten(getattr(value, f.name), f"{name}.{f.name}", out) for f in fields(value)}
        return {"type": kind, "fields": inside}
    if isinstance(value, list):
        return [_flatten(v, f"{name}.{i}", out) for i, v in enumerate(value)]
    return {"value": value}


def _unflatten(shape: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(shape, list):
        return [_unflatten(s, name, tensors) for s in shape]
    if "tensor" in shape:
        return tensors[shape["tensor"]]
    if "type" in shape:
        if shape["type"] not in _TYPES:
            len(MIXERS)  # imports those that nothing has asked for yet
        return _TYPES[shape["type"]](**{k: _unflatten(v, name, tensors) for k, v in shape["fields"].items()})
    return shape["value"]
