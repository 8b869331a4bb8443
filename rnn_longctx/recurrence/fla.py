"""What all that is read by flash-linear-attention's kernels (fla) has in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import Call, Reading


@lru_cache
def missing() -> str | None:
    """Return why fla's kernels cannot run on this machine, or None if they can."""
    try:
        installed = version("fla-core")
    except PackageNotFoundError:
        return "needs flash-linear-attention 0.6, which is not installed"
    if not installed.startswith("0.6."):
        return f"needs flash-linear-attention 0.6, {installed} is installed"
    return triton.missing()


def unreadable(call: Call) -> str | None:
    """Return why its kernels read no such tensors, or None."""
    if call.device.type != "cuda" and not triton.interpreted():
        return f"runs on a GPU, not on {call.device.type}"
    if call.dtype not in (torch.bfloat16, torch.float16) and not triton.interpreted():
        return f"reads bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    return None


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Rows:
    """The stretches of tokens that are read by themselves: R of them in the tokens of all rows, one after another.

    Attributes:
        states: (R, H, P, N) float32, that they begin with.
        edges: (R + 1) where they begin and end, or None where every row is one.
        last: the last stretch of each row.
    """

    states: Tensor
    edges: Tensor | None
    last: list[int]

    @classmethod
    def of(cls, reading: Reading) -> Rows:
        state, drop = reading.carry.state.float(), reading.drop
        batch, length = reading.inputs.x.shape[:2]
        if drop is None:
            return cls(state.contiguous(), None, list(range(batch)))
        start = reading.policy.start_state(state)
        begins = drop.clone()
        begins[:, 0] = True
        at = begins.flatten().nonzero().flatten()
        dropped, rows = drop.flatten()[at].to(state.device), (at // length).to(state.device)
        states = torch.where(dropped[:, None, None, None], start[rows], state[rows])
        edges = torch.cat([at, at.new_tensor([batch * length])]).to(state.device)
        return cls(states.contiguous(), edges, (begins.sum(1).cumsum(0) - 1).tolist())

    def flat(self, *tensors: Tensor | None) -> Any:
        """Return tensors (B, T, ...), contiguous, as (1, B * T, ...) where stretches are marked in them."""
        whole = [t.contiguous() for t in tensors if t is not None]
        return whole if self.edges is None else [t.flatten(0, 1)[None] for t in whole]
