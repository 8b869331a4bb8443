"""Memory and disk: what there is, and what a million tokens of the demo take.

Nothing is as long as the context but its text: a model reads segment after segment, and what it holds between two of
them is its state. So what a million tokens take follows from one segment that is read, and from the numbers that are
kept for a token.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from rnn_longctx.eval.doctor.tries import NotHere

TOKENS = 2**20
# Bytes of memory for a token of the text: ids (int64), the sums of bytes up to it (int64) and the text itself; and as
# much again while they are made.
PER_TOKEN = 2 * (8 + 8 + 1)


def memory() -> str:
    """Read one segment with the demo, and say what a million tokens take and what there is.

    Raises:
        MemoryError: there is less. NotHere: what there is cannot be seen on this system.
    """
    import torch

    from rnn_longctx.models.load import load
    from rnn_longctx.models.segments import SEGMENTS

    model: Any = load("demo", device="cpu")
    ids = torch.zeros(1, SEGMENTS["cpu"], dtype=torch.long, device="cpu")
    with torch.inference_mode():
        model.losses(model(ids, model.new_cache()), ids).sum()
    need = held() + TOKENS * PER_TOKEN
    free = available_memory()
    if free is None:
        raise NotHere(f"a million tokens take {need / 2**30:.1f} GiB; what is free cannot be seen on {sys.platform}")
    if free + held() < need:  # what this process holds already counts among what there is
        raise MemoryError(f"a million tokens take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    return f"a million tokens take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def disk() -> str:
    """Say what results and the snapshot of an unfinished pass over a million tokens take, and what is free here.

    Raises:
        OSError: there is less, or nothing can be written here.
    """
    import tempfile

    from rnn_longctx.models.load import load

    state = load("demo", device="cpu").state_size()
    need = 2 * 4 * sum(state.fixed.values()) + TOKENS  # two snapshots while one takes the other's place; and the text
    here = Path.cwd()
    with tempfile.TemporaryFile(dir=here) as file:
        file.write(b"doctor")
    free = shutil.disk_usage(here).free
    if free < need:
        raise OSError(f"a million tokens take {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free in {here}")
    return f"a million tokens take {need / 2**20:.1f} MiB, {free / 2**30:.0f} GiB are free in this folder"


def held() -> int:
    """Return the most bytes of memory that this process has held so far."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _given_up(stat: Path) -> int:
    """Return the bytes that a container holds of files it has read, which it gives up when memory is wanted."""
    try:
        return int(dict(line.split() for line in stat.read_text().splitlines())["inactive_file"])
    except (OSError, KeyError, ValueError):
        return 0


def available_memory(proc: Path = Path("/proc/meminfo"), limits: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes of memory that can still be had, or None where the system does not say.

    Args:
        proc: where Linux says what is free.
        limits: where it says what a container may hold, which counts where it is less.
    """
    try:
        lines = dict(line.split(":", 1) for line in proc.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        room = int((limits / "memory.max").read_text()) - int((limits / "memory.current").read_text())
        room += _given_up(limits / "memory.stat")
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return max(0, min(free, room))
