"""The delta rule token after token, for all rows and heads at once: single tokens, and caps that apply too often to be
found between chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.ssd.caps import clip_factor


def walk(
    inputs: ScanInputs, gates: DeltaGates, state: Tensor, caps: Tensor | None, drop: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Read T tokens with their gates worked out.

    Args: caps (B, T, H), infinity where none applies, or None; drop (B, T) bool, True where the state becomes `start`
        (B, H, P, N) before the token, or None.
    Returns: y (B, T, H, P) without D's part, and the state after them.
    """
    x, B, C = inputs.x, inputs.B, inputs.C
    heads, length = x.shape[2], x.shape[1]
    assert gates.erase is not None
    key, query = by_head(B, heads), by_head(C, heads)
    read = key if gates.read is None else by_head(gates.read, heads)
    along = key if gates.along is None else by_head(gates.along, heads)
    decay = gates.log_decay.exp()
    decay = decay[..., None, :] if gates.per_channel else decay[..., None, None]  # (B, T, H, 1, N or 1)
    values = x * gates.input_scale[..., None]
    outputs = []
    for t in range(length):
        if drop is not None and start is not None:
            state = torch.where(drop[:, t].to(state.device)[:, None, None, None], start, state)
        decayed = state * decay[:, t]
        held = (decayed if gates.decay_first else state) @ read[:, t, ..., None]  # (B, H, P, 1)
        state = decayed - (gates.erase[:, t, :, None, None] * held) * along[:, t, :, None]
        state = state + values[:, t, ..., None] * key[:, t, :, None]
        if caps is not None:
            state = state * clip_factor(state, caps[:, t])[..., None, None]
        outputs.append((state @ query[:, t, ..., None])[..., 0])
    return torch.stack(outputs, 1), state


def by_head(t: Tensor, heads: int) -> Tensor:
    """Return (B, T, H, ·) of (B, T, G, ·): what heads share, for each of them."""
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], 2)
