"""What a model hands on from one stretch of a stream to the next: one carry a layer, and nothing on the module.

A cache copies, moves, reorders, joins, saves and loads carries (`rnn_longctx.models.carries`) without knowing their
fields.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.files import replacing
from rnn_longctx.models.carries import TYPES, carry, tree_zip
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.recurrence.carry import ON_CPU, tree_map


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

    def snapshot(self) -> Cache:
        """Return the cache as it is now; it shares the tensors, whose numbers never change."""
        return copy.copy(self)

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
        """Return the cache, the extra tensors and the note of `save`. Raises InputError if there is no such file, it is
        none of these, or a carry in it is of a type that no mixer here has."""
        try:
            with safe_open(home_path(path), "pt") as file:
                header = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            cache = _unflatten(json.loads(header["cache"]), "cache", tensors)
        except OtherCarry as error:
            raise InputError(
                f"{path} was written by another version, whose {error.name} kept other things: read the prompt again"
            ) from None
        except UnknownCarry as error:
            raise InputError(
                f"{path} holds a {error.name}, the carry of a mixer that is not here: give the file that has it with "
                "--plugin"
            ) from None
        except OSError as error:
            kind = "a folder, not a saved state" if home_path(path).is_dir() else one_line(error)
            why = "no such file" if isinstance(error, FileNotFoundError) else kind
            raise InputError(f"{path}: {why}") from None
        except (SafetensorError, KeyError, ValueError, TypeError):
            # what the file's reader says of another kind of file helps nobody
            raise InputError(f"{path} is not a state that generate --save-state wrote, or it is damaged") from None
        extra = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
        return cache.to(device), extra, json.loads(header["note"])


class UnknownCarry(Exception):
    """A saved state holds a carry of a type that nobody has registered."""

    def __init__(self, name: str):
        self.name = name


class OtherCarry(UnknownCarry):
    """A saved state holds a carry of a type that has other fields now."""


def level_tails(parts: list[Any]) -> list[Any]:
    """Return the tails of caches as long as the longest: padded at the left, with ids that are never read again in
    time."""
    width = max((p.tail.shape[1] for p in parts if p.tail is not None), default=0)
    return [p.tail if p.tail is None else F.pad(p.tail, (width - p.tail.shape[1], 0)) for p in parts]


def _flatten(value: Any, name: str, out: dict[str, Tensor]) -> Any:
    """Put tensors into `out`; return JSON that `_unflatten` rebuilds the value from."""
    if isinstance(value, Tensor):
        out[name] = value.clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if is_dataclass(value):
        kind = type(value).__name__
        if TYPES.get(kind) is not type(value):
            raise InputError(f"a {kind} is not registered with rnn_longctx.models.carries.carry, so it cannot be saved")
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
        if shape["type"] not in TYPES:
            len(MIXERS)  # imports those that nothing has asked for yet
        if shape["type"] not in TYPES:
            raise UnknownCarry(shape["type"])
        held = {k: _unflatten(v, name, tensors) for k, v in shape["fields"].items()}
        try:
            return TYPES[shape["type"]](**held)
        except TypeError:
            raise OtherCarry(shape["type"]) from None
    return shape["value"]
