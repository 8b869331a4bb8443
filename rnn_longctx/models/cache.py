"""What a model hands on from one stretch of a stream to the next: one `Carry` a layer, and nothing on the module."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.carry import ScanCarry, WindowCarry, tree_map
from rnn_longctx.recurrence.ssd.window import level


@dataclass
class Carry:
    """One layer's: the last d_conv - 1 inputs of its convolution (B, channels, d_conv - 1), and its scan."""

    conv: Tensor
    scan: ScanCarry


@dataclass
class Cache:
    """A model's carries, in layer order, with what a restarting reader needs.

    Attributes:
        layers: one Carry a layer; empty before the first token.
        position: (B,) int64 on the CPU, tokens each row has read.
        tail: (B, <= overlap) the last token ids, kept only under a control that reads them again.
    """

    layers: list[Carry] = field(default_factory=list)
    position: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu"))
    tail: Tensor | None = None

    def clone(self) -> Cache:
        return tree_map(torch.clone, self)

    def rows(self, index: Tensor | list[int]) -> Cache:
        """The cache of some rows, in that order (beam search, ragged batches)."""
        index = torch.as_tensor(index, device=getattr(index, "device", "cpu"))
        return tree_map(lambda t: t[index.to(t.device)], self)

    def to(self, device: torch.device | str) -> Cache:
        """Moved; positions stay on the CPU."""
        moved = tree_map(lambda t: t.to(device), self)
        moved.position = self.position
        for new, old in zip(moved.layers, self.layers):
            new.scan.position = old.scan.position
        return moved

    def restore(self, other: Cache) -> None:
        """Become what another cache is, in place; the other is given up, since both share its tensors and lists."""
        vars(self).update(vars(other))

    @staticmethod
    def concat(parts: list[Cache], order: list[int]) -> Cache:
        """Row groups put together again; `order[i]` is the row at which the i-th of their rows belongs."""
        back = torch.tensor(order, device="cpu").argsort()
        parts = [Cache(list(p.layers), p.position, tail) for p, tail in zip(parts, level_tails(parts))]
        for i, layer in enumerate(parts[0].layers):
            if layer.scan.window is not None:
                for p, w in zip(parts, level([p.layers[i].scan.window for p in parts])):  # type: ignore[misc]
                    conv, scan = p.layers[i].conv, p.layers[i].scan
                    p.layers[i] = Carry(conv, ScanCarry(w.block, scan.position, scan.log_decay, w))
        return _zip_map(lambda ts: torch.cat(ts)[back.to(ts[0].device)], parts)

    def save(self, path: str | Path, extra: dict[str, Tensor] | None = None, note: Any = None) -> None:
        """Write to one safetensors file by atomic rename; `extra` tensors and a JSON `note` travel with it."""
        tensors: dict[str, Tensor] = {f"extra.{k}": v.contiguous() for k, v in (extra or {}).items()}
        shape = _flatten(self, "cache", tensors)
        path = home_path(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        save_file(tensors, temporary, {"cache": json.dumps(shape), "note": json.dumps(note)})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Cache:
        return cls.load_with(path, device)[0]

    @classmethod
    def load_with(cls, path: str | Path, device: torch.device | str = "cpu") -> tuple[Cache, dict[str, Tensor], Any]:
        """The cache, the extra tensors and the note of `save`. Raises InputError if the file is not one."""
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
    """The tails of caches, as long as the longest: padded at the left, with ids that are never read again in time."""
    width = max((p.tail.shape[1] for p in parts if p.tail is not None), default=0)
    return [p.tail if p.tail is None else F.pad(p.tail, (width - p.tail.shape[1], 0)) for p in parts]


_TYPES = {cls.__name__: cls for cls in (Cache, Carry, ScanCarry, WindowCarry)}


def _flatten(value: Any, name: str, out: dict[str, Tensor]) -> Any:
    """Tensors into `out`; what is left is JSON that `_unflatten` rebuilds the value from."""
    if isinstance(value, Tensor):
        out[name] = value.clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if is_dataclass(value):
        inside = {f.name: _flatten(getattr(value, f.name), f"{name}.{f.name}", out) for f in fields(value)}
        return {"type": type(value).__name__, "fields": inside}
    if isinstance(value, list):
        return [_flatten(v, f"{name}.{i}", out) for i, v in enumerate(value)]
    return {"value": value}


def _unflatten(shape: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(shape, list):
        return [_unflatten(s, name, tensors) for s in shape]
    if "tensor" in shape:
        return tensors[shape["tensor"]]
    if "type" in shape:
        return _TYPES[shape["type"]](**{k: _unflatten(v, name, tensors) for k, v in shape["fields"].items()})
    return shape["value"]


def _zip_map(function: Any, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return function(values)
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: _zip_map(function, [getattr(v, f.name) for v in values]) for f in fields(first)})
    if isinstance(first, list):
        return [_zip_map(function, list(group)) for group in zip(*values)]
    return first
