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

from rnn_longctx.models.cache import Cache
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


def states(value: Any) -> list[Tensor]:
    """Return the state tensors of a cache, or of a layer's carry, in a fixed order."""
    listed: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        listed.append(tensor)
        return tensor

    state_map(note, value, lambda tally: tally)
    return listed


def with_states(cache: Cache, others: Iterable[Tensor], tally: Callable[[Tensor], Tensor] = torch.zeros_like) -> Cache:
    """Return the cache with other state tensors, in the order of `states`."""
    following = iter(others)
    return state_map(lambda _: next(following), cache, tally)


def integers(cache: Cache) -> list[Tensor]:
    """Return the tensors of a cache that hold integers, in a fixed order."""
    return [tensor for tensor in cache.leaves() if not tensor.is_floating_point()]


def with_integers(cache: Cache, others: Iterable[Tensor]) -> Cache:
    """Return the cache with other integers, in the order of `integers`."""
    following = iter(others)
    return tree_map(lambda tensor: tensor if tensor.is_floating_point() else next(following), cache)


def rows_of(cache: Cache, rows: slice) -> Cache:
    """Return the cache of rows that follow one another, which shares its numbers (`Cache.rows` copies them)."""
    return tree_map(lambda tensor: tensor[rows], cache)
