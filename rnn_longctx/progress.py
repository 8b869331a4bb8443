"""The one way in which long work speaks of its progress: it calls `say` with a line, and whoever called it chooses."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rnn_longctx.plain import plain

Say = Callable[[str], object]


def silent(line: str) -> None:
    """Say nothing: what a function of the library does unless it is given another `say`."""


def to_stdout(line: str) -> None:
    """Write a line at once where a program's output goes: what training says is its output."""
    print(plain(line), flush=True)


def to_stderr(line: str) -> None:
    """Write a line at once, beside the output that a program hands on."""
    print(plain(line), file=sys.stderr, flush=True)
