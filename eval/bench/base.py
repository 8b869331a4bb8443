"""What a bench is: a function in a file of this folder that yields rows, found there by `rnn-longctx bench`.

    @bench("decode")
    def decode(*, tokens: Annotated[int, "Tokens that are generated."] = 500) -> Iterator[Row]:
        \"\"\"Tokens per second of a model of 370M parameters on a GPU.\"\"\"

Its parameters are text and whole numbers above 0, with a word about each; those after the star are options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError
from rnn_longctx.registry import Registry

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A name, and a function that measures: it yields rows as they are measured, or returns a text."""

    name: str
    run: Callable[..., Iterator[Row] | str]


BENCHES: Registry[Bench] = Registry("bench", "rnn_longctx.eval.bench")


def bench(name: str) -> Callable[[Any], Any]:
    """Register a function as `rnn-longctx bench NAME`."""

    def register(run: Any) -> Any:
        BENCHES.register(Bench(name, run))
        return run

    return register


def sizes(what: str, text: str) -> list[tuple[int, int]]:
    """Return the batches and lengths of "8x8k,1x128k". Raises InputError for anything else."""
    pairs = [word.split("x") for word in text.split(",") if word]
    if any(len(pair) != 2 or not pair[0].isdigit() for pair in pairs):
        raise InputError(f"{what}: expected batch x tokens, such as 8x8k, got {text!r}")
    return [(int(batch), parse_length(length)) for batch, length in pairs]


def environment() -> dict[str, str]:
    """Return what a figure depends on beside the code."""
    named = ("torch", "triton", "transformers", "mamba_ssm", "fla-core")
    versions = "; ".join(f"{p} {v}" for p in named if (v := _version(p)))
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "versions": versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
