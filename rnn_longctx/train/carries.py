"""What training by segments needs of a model's carries, whatever dataclasses its mixers make them of.

Of the tensors in a cache, those of floating numbers are its state: gradients go through them, and a start is zero
there. Integers (positions) go on without gradients. Running sums that only policies and observers ask for (fields
with `tally` in their metadata) begin anew in every segment: a model in training has neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rnn_longctx.recurrence.carry import tree_map

T = TypeVar("T")


def state_map(
    function: Callable[[Tensor], Tensor], value: T, tally: Callable[[Tensor], Tensor] = torch.zeros_like
) -> T:
    """Return a copy of nested dataclasses and lists with `function` of every state tensor, `tally` of every running
    sum, and the rest as it is."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        changed: dict[str, Any] = {}
        for f in fields(value):
            inner = getattr(value, f.name)
            marked = f.metadata.get("tally") and inner is not None
            changed[f.name] = tally(inner) if marked else state_map(function, inner, tally)
        return replace(value, **changed)
    if isinstance(value, list | tuple):
        return type(value)(state_map(function, item, tally) for item in value)
    return value


def leaves(value: Any) -> list[Tensor]:
    """Return the state tensors of a cache, in a fixed order."""
    listed: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        listed.append(tensor)
        return tensor

    state_map(note, value, lambda tally: tally)
    return listed


def with_leaves(value: T, others: Iterable[Tensor], tally: Callable[[Tensor], Tensor] = torch.zeros_like) -> T:
    """Return the cache with other state tensors, in the order of `leaves`."""
    following = iter(others)
    return state_map(lambda _: next(following), value, tally)


def tensors(value: Any, chosen: Callable[[Tensor], bool] = lambda _: True) -> list[Tensor]:
    """Return all tensors of a cache that are `chosen`, in a fixed order."""
    listed: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if chosen(tensor):
            listed.append(tensor)
        return tensor

    tree_map(note, value)
    return listed


def with_tensors(value: T, others: Iterable[Tensor], chosen: Callable[[Tensor], bool] = lambda _: True) -> T:
    """Return the cache with others in the place of its `chosen` tensors, in the order of `tensors`."""
    following = iter(others)
    return tree_map(lambda tensor: next(following) if chosen(tensor) else tensor, value)


def is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()


def detached(value: T) -> T:
    """Return the cache without the graph that made it."""
    return tree_map(torch.Tensor.detach, value)


def rows_of(value: T, rows: slice) -> T:
    """Return the cache of some rows."""
    return tree_map(lambda tensor: tensor[rows], value)


def joined(caches: list[T]) -> T:
    """Return the cache of several groups of rows, one after the other."""
    if len(caches) == 1:
        return caches[0]
    return with_tensors(caches[0], map(torch.cat, zip(*map(tensors, caches), strict=True)))
