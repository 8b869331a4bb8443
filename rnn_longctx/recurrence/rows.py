"""Where the rows of a batch stand in their streams."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.errors import InputError


class LeftPaddingError(InputError):
    """A mask says that padding stands elsewhere than before a row's first token."""


def row_counts(
    position: Tensor, length: int, *, mask: Tensor | None = None, reset: Tensor | None = None, every: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Where each row stands. position (B,) tokens read before; on the CPU.

    Returns: counts (B, T), tokens of its row read up to and with each token, and drop (B, T) bool, True where the
    state is dropped before the token (a new row, or every `every` tokens), or None if nowhere.
    """
    real = torch.ones(len(position), length, dtype=torch.int64, device="cpu") if mask is None else mask.cpu().long()
    counts = position[:, None] + real.cumsum(1)
    drop = None
    if reset is not None and bool(reset.any()):
        drop = reset.cpu().bool() & (real > 0)
        base = torch.where(drop, counts - real, 0).cummax(1).values  # tokens before the latest reset
        counts = counts - base
    if every is not None:
        due = (real > 0) & (counts > 1) & ((counts - 1) % every == 0)
        drop = due if drop is None else drop | due
    return counts, drop if drop is not None and bool(drop.any()) else None


def left_padding(mask: Tensor, position: Tensor) -> Tensor | None:
    mask = mask.bool()
    if bool(mask.all()):
        return None
    real = mask.cpu()
    if bool((real[:, :-1] & ~real[:, 1:]).any()) or bool((~real[:, 0] & (position > 0)).any()):
        raise LeftPaddingError("padding may stand only before a row's first token (left padding)")
    return mask
