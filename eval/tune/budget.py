"""How much time and memory a search may take, and how much memory a process has taken."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from rnn_longctx.errors import InputError

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_BYTES = {"m": 1024**2, "g": 1024**3}


@dataclass(frozen=True)
class Budget:
    """What a search may take.

    Attributes:
        seconds: of the search and of the comparison after it, those of runs before that were killed included.
        memory: bytes of a trial's process at their peak; on a GPU those of its tensors there. None: any.
    """

    seconds: float
    memory: int | None = None


def parse_time(text: str) -> float:
    """Return the seconds of "90s", "20m" or "2h". Raises InputError for anything else, or none above 0."""
    return _parse(text, _SECONDS, "--budget is a time such as 90s, 20m or 2h")


def parse_memory(text: str) -> int:
    """Return the bytes of "512m" or "8g" (m = 1024**2). Raises InputError for anything else, or none above 0."""
    return int(_parse(text, _BYTES, "--memory is a size such as 512m or 8g"))


def _parse(text: str, units: dict[str, int], expected: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z])", text.strip().lower(), re.ASCII)
    if not found or found[2] not in units or not float(found[1]):
        raise InputError(f"{expected}, not {text!r:.40}")
    return float(found[1]) * units[found[2]]


def time_text(seconds: float) -> str:
    """Return seconds as a person reads them: 45 -> "45 s", 150 -> "2.5 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def memory_text(size: float) -> str:
    """Return bytes as a person reads them, in units of 1024: 300 * 1024**2 -> "300 MB"."""
    return f"{size / 1024**2:.0f} MB" if size < 1024**3 else f"{size / 1024**3:.2f} GB"


def peak_of(process: int | str = "self") -> int | None:
    """Return the most bytes that a process has had resident at once, or None where the system does not say so of
    another process. (`getrusage` of a process on Linux holds what its parent had when it was begun.)"""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        status = ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
        return int(found[1]) * 1024
    if process != "self":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def own_peak(device: torch.device) -> int:
    """Return the most bytes that this process has held at once: on a GPU of its tensors there, else in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_of() or 0
