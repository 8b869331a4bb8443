"""The two controls that every remedy is judged against: drop the state now and then, and read the last tokens again.

    reset:every=T,overlap=k    every T tokens
    recompute:last=T           every T/2 tokens with the last T/2 read again, so that each position sees T/2 to T tokens

Both are one rule: before token n * every (counted from 0) of a row the whole cache is dropped and the row's last
`overlap` tokens are read again, silently. It holds in prefill and in generation alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import StreamCache

Read = Callable[..., Tensor]


@dataclass(frozen=True)
class Restart:
    """Before token n * every of a row its cache is dropped, and the row's last `overlap` tokens are read again."""

    every: int
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.overlap <= self.every:
            raise InputError(
                f"a restart needs every >= 1 and 0 <= overlap <= every, got every={self.every}, overlap={self.overlap}"
            )

    def __str__(self) -> str:
        return f"restart every {counted(self.every, 'token')}, {self.overlap} read again"

    def begin(self, read: Read, cache: StreamCache, last: Tensor) -> None:
        """Drop what the cache holds, and read the last tokens (B, <= overlap) again."""
        cache.layers = []
        if last.shape[1]:
            read(last, cache)

    def block_start(self, length: int) -> int:
        """Return the restart that the state after `length` tokens comes from: nothing before it matters but its
        overlap."""
        return max(0, (length - 1) // self.every * self.every)

    def skip_to(self, start: int, ids: Tensor, cache: StreamCache, device: torch.device) -> None:
        """Let `cache` go on at a restart of the stream ids (B, T) as if all before it had been read, of which the state
        after it keeps nothing."""
        cache.position = torch.full((len(ids),), start, dtype=torch.int64, device="cpu")
        cache.tail = ids[:, max(0, start - self.overlap) : start].to(device)


@dataclass(frozen=True)
class Crop(Restart):
    """Attention alone drops what is older than the last `overlap` tokens; nothing is read again, and the recurrence
    goes on."""

    def __str__(self) -> str:
        return f"attention cropped every {counted(self.every, 'token')}, {self.overlap} kept"

    def begin(self, read: Read, cache: StreamCache, last: Tensor) -> None:
        cache.crop_attention(last.shape[1])

    def block_start(self, length: int) -> int:
        return 0  # the recurrence needs them all


def read_restarting(read: Read, restart: Restart, ids: Tensor, cache: StreamCache, mask: Tensor | None) -> Tensor:
    """Read ids under a restart: move `cache` on in place and return the hidden states (B, T, d_model)."""
    batch = len(ids)
    if len(cache.position) == 0:
        cache.position = torch.zeros(batch, dtype=torch.int64, device="cpu")
    real = mask.sum(1).tolist() if mask is not None else [ids.shape[1]] * batch
    if len(set(zip(cache.position.tolist(), real))) <= 1 and mask is None:
        return _read_level(read, restart, ids, cache)

    # Rows that stand at different positions restart at different times: read each group of equals alone.
    groups: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(cache.position.tolist(), real)):
        groups.setdefault(key, []).append(row)
    caches, order, hidden = [], [], None
    for (_, count), rows in groups.items():
        group = cache.rows(rows)
        if count:
            out = _read_level(read, restart, ids[rows][:, ids.shape[1] - count :], group)
        else:  # rows that have not begun: padding alone makes the carry that they begin with
            if not group.layers:
                read(ids[rows][:, :1], group, torch.zeros(len(rows), 1, dtype=torch.bool, device=ids.device))
            out = read(ids[rows][:, :0], group)
            group.tail = ids[rows][:, :0] if group.tail is None else group.tail
        if hidden is None:
            hidden = out.new_zeros(batch, ids.shape[1], out.shape[2])
        hidden[rows, ids.shape[1] - count :] = out
        caches.append(group)
        order += rows
    cache.restore(type(cache).concat(caches, order))
    assert hidden is not None
    return hidden


def _read_level(read: Read, restart: Restart, ids: Tensor, cache: StreamCache) -> Tensor:
    """Read rows that all stand at one position."""
    position = int(cache.position[0])
    tail = cache.tail if cache.tail is not None else ids[:, :0]
    outputs, t = [], 0
    while t < ids.shape[1]:
        at = position + t
        if at % restart.every == 0 and at > 0:
            again = min(restart.overlap, at)
            seen = torch.cat([tail, ids[:, :t]], 1)[:, -again:] if again else ids[:, :0]
            restart.begin(read, cache, seen)
        u = min(ids.shape[1], t + restart.every - at % restart.every)
        outputs.append(read(ids[:, t:u], cache))
        t = u
    cache.position = torch.full((len(ids),), position + ids.shape[1], dtype=torch.int64, device="cpu")
    cache.tail = torch.cat([tail, ids], 1)[:, -restart.overlap :] if restart.overlap else ids[:, :0]
    return torch.cat(outputs, 1) if outputs else read(ids, cache)
