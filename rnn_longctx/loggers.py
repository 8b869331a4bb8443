"""Numbers over steps or tokens, to TensorBoard or Weights & Biases as well, where those are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rnn_longctx.errors import InputError, nearest

KINDS = ("tensorboard", "wandb")
Write = Callable[[dict[str, float], int], None]  # names and values, at a step


@contextmanager
def scalars(kinds: Sequence[str], directory: str | Path, name: str) -> Iterator[Write]:
    """Give a function that writes to each kind, inside the block.

    TensorBoard's files go under `directory`; Weights & Biases gets a run called `name` (its project, mode and key come
    from its own environment variables).

    Raises:
        InputError: an unknown kind, or one that is not installed.
    """
    with ExitStack() as stack:
        writes = [stack.enter_context(_open(kind, Path(directory), name)) for kind in kinds]

        def write(values: dict[str, float], step: int) -> None:
            for one in writes:
                one(values, step)

        yield write


def library(kind: str) -> Any:
    """Return the module that a kind is written by. Raises InputError, as `scalars` does."""
    if kind not in KINDS:
        raise InputError(f"unknown log {kind!r}{nearest(kind, KINDS)}")
    try:
        return importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError:
        raise InputError(f"{kind} is not installed: pip install {kind}") from None


@contextmanager
def _open(kind: str, directory: Path, name: str) -> Iterator[Write]:
    module = library(kind)
    if kind == "wandb":
        with module.init(name=name, dir=str(directory)) as run:
            yield lambda values, step: run.log(values, step=step)
        return
    with module.SummaryWriter(str(directory)) as writer:

        def write(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        yield write
