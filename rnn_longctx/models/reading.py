"""A hook around a model's reading, for what has to cut a stream where it looks, or to read tokens again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

# (read, ids (B, T), cache, and mask and reset where the model's `read` takes them) to the hidden states (B, T, d_model)
ReadingHook = Callable[..., Tensor]


class Hooked:
    """A model whose `forward` reads with `hooked_read()`, which is its `read`, or a hook around it."""

    read: Callable[..., Tensor]
    reading_hook: ReadingHook | None = None

    @contextmanager
    def reading_with(self, hook: ReadingHook) -> Iterator[None]:
        """Read with a hook inside the block: `hook(read, ids, cache, ...)` in the place of `read(ids, cache, ...)`."""
        before = self.reading_hook
        vars(self)["reading_hook"] = hook
        try:
            yield
        finally:
            vars(self)["reading_hook"] = before

    def hooked_read(self) -> Callable[..., Any]:
        """Return the model's `read`, with the hook around it where there is one."""
        return self.read if self.reading_hook is None else partial(self.reading_hook, self.read)
