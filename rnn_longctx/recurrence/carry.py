"""What one layer's scan hands on from one call to the next.

Every update makes new tensors, so a carry may be kept, cloned or handed to another stream at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


# The mark of a field whose tensor stays on the CPU wherever its carry is moved: what Python looks at between calls.
ON_CPU = {"cpu": True}
# The mark of a running sum that policies and observers alone read: training by segments begins it anew in each.
TALLY = {"tally": True}


def tree_map(function: Any, value: T, on_cpu: Any = None) -> T:
    """Return the value with `function` applied to every tensor inside nested dataclasses, lists, tuples and None; and
    `on_cpu`, where there is one, to those of fields that are marked `ON_CPU`."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        mapped = {}
        for f in fields(value):
            how = on_cpu if on_cpu is not None and f.metadata.get("cpu") else function
            mapped[f.name] = tree_map(how, getattr(value, f.name), on_cpu)
        return replace(value, **mapped)
    if isinstance(value, list | tuple):
        return type(value)(tree_map(function, v, on_cpu) for v in value)
    return value


@dataclass
class WindowCarry:
    """The delay line of a sliding window of r tokens. The stream is cut into blocks of r tokens; a position at
    offset o of its block sees the block up to o, and the block before from offset o + 1 on.

    Shapes: r tokens a block, o tokens of the current one read so far, K chunks a block.
    """

    size: int  # r
    block: Tensor  # (B, H, P, N) state of the current block alone, started from zero
    head: Tensor  # (B, H[, N]) sum of log-decay over the current block so far
    x: Tensor  # (B, o, H, P) inputs of the current block, times their input scale
    B: Tensor  # (B, o, G, N)
    log_decay: Tensor  # (B, o, H[, N])
    x_before: Tensor  # (B, r, H, P) the block before, each token decayed to that block's end (unless per channel)
    B_before: Tensor  # (B, r, G or H, N)
    after: Tensor  # (B, K, H, P, N): [:, i] is the state at that block's end made by its chunks i + 1 .. K - 1


@dataclass
class ScanCarry:
    """State of one layer's scan between two calls.

    Attributes:
        state: (B, H, P, N), float32 (float64 for float64 inputs) unless `scan` was given a `state_dtype`. With a
            window: see `recurrence.ssd.window`.
        position: (B,) int64 on the CPU; tokens a row has read since it began (padding not counted).
        log_decay: (B, H) or (B, H, N) float64; total log-decay since the row began, in nats. exp of it is what
            is left of the first token.
        window: the delay line, with a windowed policy.
    """

    state: Tensor
    position: Tensor = field(metadata=ON_CPU)
    log_decay: Tensor = field(metadata=TALLY)
    window: WindowCarry | None = None

    @classmethod
    def start(
        cls,
        batch: int,
        heads: int,
        headdim: int,
        d_state: int,
        *,
        per_channel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ScanCarry:
        state = torch.zeros(batch, heads, headdim, d_state, dtype=dtype, device=device)
        shape = (batch, heads, d_state) if per_channel else (batch, heads)
        return cls(
            state=state,
            position=torch.zeros(batch, dtype=torch.int64, device="cpu"),
            log_decay=torch.zeros(shape, dtype=torch.float64, device=device),
        )

    def kept_in(self, dtype: torch.dtype) -> ScanCarry:
        """The state rounded to a type, and with a window its delay line; sums of log-decays stay as they are."""
        if self.state.dtype == dtype:
            return self
        w = self.window
        if w is not None:
            inputs = {n: getattr(w, n).to(dtype) for n in ("block", "x", "B", "x_before", "B_before", "after")}
            w = replace(w, **inputs)
        return ScanCarry(self.state.to(dtype) if w is None else w.block, self.position, self.log_decay, w)
