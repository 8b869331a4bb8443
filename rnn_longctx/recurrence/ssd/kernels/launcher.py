"""Launching a Triton kernel in less of the host's time.

Triton looks at every argument of every launch to find the compiled kernel: 40 microseconds for those here, which take
fifty arguments. Short scans would wait for Python. A launch like one before (the same numbers, types and alignments)
goes straight to the kernel that one used. And what a function launches for the first time can be compiled side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rnn_longctx.recurrence import triton

KNOWN = 4096  # launches remembered
_here = local()  # of a thread: `compiling`, a pool of threads and what they were given


@contextmanager
def compiling_only() -> Iterator[None]:
    """Inside, launches of this thread compile, in other threads, and launch nothing. It ends when all are compiled.
    PyTorch's own operations still run.

    Raises: what the first compilation that failed did.
    """
    begun: dict[tuple, Future] = {}
    with ThreadPoolExecutor() as pool:
        _here.compiling = pool, begun
        try:
            yield
        finally:
            _here.compiling = None
        for future in begun.values():
            future.result()


class Launched:
    """`@Launched` above `@triton.jit`; constexpr parameters last, and given by name. Used as the kernel itself."""

    def __init__(self, jit: Any):
        self.jit = jit
        self.names = list(jit.arg_names)
        self.known: dict[tuple, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, **options: Any) -> None:
            if triton.interpreted():
                self.jit[grid](*args, **options)
                return
            kinds = [a if (c := a.__class__) is int or c is float else _kind(a) for a in args]  # most are numbers
            key = (torch.cuda.current_device(), *options.items(), *kinds)
            if (compiling := getattr(_here, "compiling", None)) is not None:
                pool, begun = compiling
                if (self, *key) not in begun:
                    begun[self, *key] = pool.submit(self._compile, key[0], grid, args, options)
                return
            kernel = self.known.get(key)
            if kernel is not None:
                kernel[grid + (1,) * (3 - len(grid))](*args, *[options[name] for name in self.names[len(args) :]])
                return
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known[key] = self.jit[grid](*args, **options)

        return launch

    def _compile(self, device: int, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
        torch.cuda.set_device(device)  # of this thread
        self.jit.warmup(*args, grid=grid, **options)


def _kind(value: Any) -> Any:
    """What Triton compiles for: a tensor's type and alignment, a number's value."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return value
