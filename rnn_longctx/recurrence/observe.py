"""Show an observer the states of a stream: the stream is cut where the observer looks, unless a backend can look from
inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.statistics import Observer, Statistics


@dataclass
class Looks:
    """The statistics every `every` tokens, which a backend that can look from inside a scan leaves in `seen`."""

    every: int
    seen: list[Statistics] = field(default_factory=list)


# Reads the tokens from start up to and without stop after a carry, and leaves the statistics in the looks, if any.
Read = Callable[[int, int, ScanCarry, Looks | None], tuple[Tensor, ScanCarry]]


def observed(
    read: Read, length: int, carry: ScanCarry, observer: Observer, inside: bool, state: Callable[[ScanCarry], Tensor]
) -> tuple[Tensor, ScanCarry]:
    """Read `length` tokens and show `observer` the statistics at the positions that `observer.every` divides.

    Args:
        inside: whether `read` can look every k tokens from inside, for tokens that begin where the observer looks.
        state: finds the state (B, H, P, N) of a carry.
    Raises:
        InputError: rows that stand at different positions.
    """
    position, k = 0, observer.every
    if len(carry.position):
        position = int(carry.position[0])
        if bool((carry.position != position).any()):
            raise InputError(f"an observer follows rows that stand at one position, not {carry.position.tolist()}")
    outputs: list[Tensor] = []
    seen: list[Statistics] = []
    t = 0
    while t < length:
        lead = -(position + t) % k  # tokens until the observer looks
        whole = (length - t) // k * k
        u = length if inside and not lead and whole else min(length, t + (lead or k))
        looks = Looks(k) if u - t > k or (inside and u - t == k and not lead) else None
        y, carry = read(t, u, carry, looks)
        outputs.append(y)
        if looks is not None:
            seen += looks.seen
        elif (position + u) % k == 0:
            seen.append(Statistics.of(state(carry), carry.position[0], carry.log_decay, observer.whole))
        t = u
    if seen:
        observer(Statistics.join(seen))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), carry
