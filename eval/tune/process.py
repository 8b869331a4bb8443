"""A trial's process: run to its end, or ended when whoever looks at it says so."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rnn_longctx.eval.tune.budget import peak_of

WAIT = 0.2  # seconds between two looks


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        how: "done", "failed", or what the look at it that ended it said.
        peak: the most bytes that were seen resident at once; 0 where the system does not say.
    """

    how: str
    peak: int


def run(command: Sequence[str], log: Path, look: Callable[[float, int], str]) -> Ended:
    """Run a process, which ends with this one (`rnn_longctx.eval.pool.end_with_parent`).

    Args:
        log: gets what it prints, at its end.
        look: is called again and again, once at least after the end, with the seconds that it runs and its peak; what
            is no empty text ends it.
    """
    began, peak = time.monotonic(), 0
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file)
    try:
        while True:
            running = process.poll() is None
            peak = max(peak, (running and peak_of(process.pid)) or 0)
            if how := look(time.monotonic() - began, peak):
                return Ended(how, peak)
            if not running:
                return Ended("done" if process.returncode == 0 else "failed", peak)
            time.sleep(WAIT)
    finally:
        process.kill()
        process.wait()
