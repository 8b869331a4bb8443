"""Whether Triton's kernels can run here, and on what."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _unfit() -> str | None:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "needs Triton, which is not installed"
    fit = tuple(int(number) for number in installed.split(".")[:2]) >= (3, 4)
    return None if fit else f"needs Triton 3.4, {installed} is installed"


_UNFIT = _unfit()  # constants, so that torch.compile need not look
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted() -> bool:
    """Return whether Triton runs its kernels in Python, on the CPU (TRITON_INTERPRET=1, read when it is imported)."""
    return _INTERPRETED


def missing() -> str | None:
    """Return why the kernels cannot run on this machine, or None if they can."""
    if _UNFIT is not None or _INTERPRETED:
        return _UNFIT
    return None if torch.cuda.is_available() and not torch.version.hip else "needs a CUDA device"
