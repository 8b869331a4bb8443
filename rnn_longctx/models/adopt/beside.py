"""What a policy keeps in a layer of a library's cache, beside the state.

A row may have begun before a policy was there to count its tokens. Such a row is counted from `UNCOUNTED` on: the scan
takes a row at position 0 for one that begins, and this one must never look like that. Saved states hold these numbers;
`tokens_counted` gives those that a person understands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.models.carries import tree_zip
from rnn_longctx.recurrence.carry import WindowCarry, tree_map
from rnn_longctx.recurrence.ssd.window import level

UNCOUNTED = -(2**30)  # below 0 for a long time


@dataclass
class Beside:
    """The parts of a carry that the library's cache has no place for.

    Attributes:
        era: since when the mixer counts without a gap.
        position: (B,) int64 on the CPU, where the rows stand for the scan (see above).
        log_decay: (B, H), not a number where the beginning was not counted; None where nothing was.
        window: the delay line of a windowed policy.
    """

    era: int
    position: Tensor
    log_decay: Tensor | None = None
    window: WindowCarry | None = None

    @classmethod
    def uncounted(cls, era: int, rows: int) -> Beside:
        """Return what lies beside the states of rows that have read tokens which nobody counted."""
        return cls(era, torch.full((rows,), UNCOUNTED, dtype=torch.int64, device="cpu"))

    @property
    def from_start(self) -> Tensor:
        """(B,) bool: whether a row's tokens were counted from its first one on."""
        return self.position >= 0


def tokens_counted(position: Tensor) -> Tensor:
    """Return how many tokens were counted of rows that stand at these positions for the scan: all, or those since a
    policy came."""
    return torch.where(position < 0, position - UNCOUNTED, position)


def joined(besides: list[Beside], cat: Callable) -> Beside:
    """Return what lies beside one layer's states, of all rows. cat: puts their tensors together."""
    if windows := [b.window for b in besides if b.window is not None]:
        besides = [replace(b, window=w) for b, w in zip(besides, level(windows))]
    return tree_zip(cat, besides)


@functools.cache
def following(base: Any) -> Any:
    """Return the class of a cache's layer, with a `beside` that moves with its rows. (Made from one base, since an
    object can change its class only to one of the same layout.)"""

    class Following(base):
        is_compileable = False
        beside: Beside | None = None

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._select(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            rows = torch.arange(len(self.recurrent_states[0]), device="cpu").repeat_interleave(repeats)
            self._move("batch_repeat_interleave", repeats, rows)

        def batch_select_indices(self, indices: Tensor) -> None:
            rows = torch.arange(len(self.recurrent_states[0]), device="cpu")[indices.cpu()]  # (indices may be bool)
            self._move("batch_select_indices", indices, rows)

        def reset(self) -> None:
            super().reset()
            self.beside = None

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _rebuild, (base,), self.__dict__

        def _move(self, how: str, argument: Any, rows: Tensor) -> None:
            """The library moves keys and values, and leaves the states of a recurrent layer where they are."""
            from transformers.cache_utils import LinearAttentionLayer

            before = self.recurrent_states[0]
            if method := getattr(super(), how, None):
                method(argument)
            if self.recurrent_states[0] is before:
                LinearAttentionLayer.reorder_cache(self, rows)  # type: ignore[arg-type]
            self._select(rows)

        def _select(self, rows: Tensor) -> None:
            if self.beside is not None:
                self.beside = tree_map(lambda t: t[rows.to(t.device)], self.beside)

    Following.__name__ = Following.__qualname__ = base.__name__
    return Following


def _rebuild(base: type) -> Any:
    return object.__new__(following(base))
