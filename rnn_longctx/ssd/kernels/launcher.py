"""Launching a Triton kernel in less of the host's time.

Triton looks at every argument of every launch to find the compiled kernel: 40 microseconds for those here, which take
fifty arguments. Short scans would wait for Python. A launch like one before (the same numbers, types and alignments)
goes straight to the kernel that one used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rnn_longctx.ssd import fused

KNOWN = 4096  # launches remembered


class Launched:
    """`@Launched` above `@triton.jit`; constexpr parameters last, and given by name. Used as the kernel itself."""

    def __init__(self, jit: Any):
        self.jit = jit
        self.constants = [p.name for p in jit.params if p.is_constexpr] if hasattr(jit, "params") else []
        self.known: dict[tuple, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, **options: Any) -> None:
            if fused.interpreted():
                self.jit[grid](*args, **options)
                return
            key = (torch.cuda.current_device(), *options.values(), *map(_kind, args))
            kernel = self.known.get(key)
            if kernel is not None:
                kernel[grid + (1,) * (3 - len(grid))](*args, *[options[name] for name in self.constants])
                return
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known[key] = self.jit[grid](*args, **options)

        return launch


def _kind(value: Any) -> Any:
    """What Triton compiles for: a tensor's type and alignment, a number's value."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return value
