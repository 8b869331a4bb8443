"""What grows by a token at a time, keys and values: written in place into a tensor that has room for more.

`extended` gives what `torch.cat` gives, as a view of such a tensor, and notes on the view where it stands. The next
tokens of the newest view are written behind it. An older view, which has been gone on from before, is copied first, so
that each keeps its own tokens: carries stay values. What PyTorch makes of a view (a clone, some rows, a slice, one
moved or loaded) bears no such note, and is copied when it grows. To write a carry to a file, clone its tensors:
`torch.save` would write the note too.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

_CLAIM = Lock()  # of the room behind a view: two threads may go on from one snapshot
STEP = 1024  # tokens of room that are added at most; below, as much room again as is used


@dataclass(eq=False)
class Room:
    """A tensor with room for more tokens.

    Attributes:
        tensor: (B, R, ...).
        filled: how many tokens are written, or about to be; what stands behind them is not read.
    """

    tensor: Tensor
    filled: int

    @classmethod
    def of(cls, held: Tensor, like: Tensor, tokens: int) -> Room:
        """Return a room of `tokens` tokens and some more, of the type of `like`, with what is held copied into it."""
        tensor = like.new_empty(len(held), tokens + min(tokens, STEP), *held.shape[2:])
        tensor[:, : held.shape[1]] = held
        return cls(tensor, tokens)

    def claimed(self, end: int, new: Tensor) -> bool:
        """Return whether new tokens can be written behind a view that ends at `end`, and nobody else may any more."""
        written = self.tensor.is_inference() <= torch.is_inference_mode_enabled()  # (PyTorch's rule for such tensors)
        fits = end + new.shape[1] <= self.tensor.shape[1] and self.tensor.dtype == new.dtype
        with _CLAIM:
            free = written and fits and self.filled == end and self.tensor.device == new.device
            if free:
                self.filled = end + new.shape[1]
        return free

    def view(self, begin: int, end: int) -> Tensor:
        view = self.tensor[:, begin:end]
        view.room = self, end  # type: ignore[attr-defined]
        return view


def extended(held: Tensor, new: Tensor) -> Tensor:
    """Return (B, S + T, ...), the tokens held (B, S, ...) and the new ones (B, T, ...), of the type of these. Without
    gradients nothing is copied but the new ones, most of the time; with them, which need every tensor as it was,
    everything is. Raises ValueError: of another shape but for the tokens."""
    if held[:, :0].shape != new[:, :0].shape:
        raise ValueError(f"cannot add tokens of {tuple(new.shape)} to {tuple(held.shape)}")
    if torch.is_grad_enabled():
        return torch.cat([held.to(new.dtype), new], 1)
    room, end = getattr(held, "room", (None, 0))
    if room is None or not room.claimed(end, new):
        end = held.shape[1]
        room = Room.of(held, new, end + new.shape[1])
    room.tensor[:, end : end + new.shape[1]] = new
    return room.view(end - held.shape[1], end + new.shape[1])


def newest(x: Tensor, tokens: int) -> Tensor:
    """Return the last `tokens` tokens of what `extended` has given, or all where they are fewer. They are copied out of
    what is much larger, which would stay in memory."""
    tokens = min(tokens, x.shape[1])
    room, end = getattr(x, "room", (None, 0))
    if room is not None and room.tensor.shape[1] <= 2 * tokens + STEP:
        return room.view(end - tokens, end)
    return x[:, x.shape[1] - tokens :].clone() if tokens < x.shape[1] else x.contiguous()
