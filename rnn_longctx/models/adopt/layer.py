"""What a policy keeps in a layer of a library's cache, beside the state."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.recurrence.carry import WindowCarry, tree_map


@dataclass
class Beside:
    """What a carry holds beside the state. `era`: since when the mixer counts without a gap."""

    era: int
    position: Tensor  # (B,) int64 on the CPU
    log_decay: Tensor | None  # (B, H), not a number where the beginning was not counted
    window: WindowCarry | None


@functools.cache
def following(base: Any) -> Any:
    """The class of a cache's layer, with a `beside` that moves with its rows. (Made from one base, since an object
    can change its class only to one of the same layout.)"""

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
