"""The energy that a device has taken, where it can be read: of a GPU by NVML's counter, which comes with the driver; of
CPUs by RAPL's, which most systems let only root read. A counter is of a whole device, whoever uses it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
LEAST_SECONDS = 0.5  # of what is measured: counters move in steps, some ten a second


class Meter:
    """Tells the joules that a device has taken since it was made."""

    def __init__(self, device: torch.device):
        self._counters = _of_gpu(device) if device.type == "cuda" else _of_cpus()
        self._began = [read() for read, _ in self._counters]

    def joules(self, seconds: float) -> float:
        """Return the joules since the meter was made, in `seconds` of time; NaN where nothing can be read, or where the
        time was too short for it."""
        if not self._counters or seconds < LEAST_SECONDS:
            return math.nan
        spent = [(read() - began, size) for (read, size), began in zip(self._counters, self._began, strict=True)]
        return sum(joules if joules >= 0 else joules + size for joules, size in spent)


Counter = tuple[Callable[[], float], float]  # joules so far, and what is counted up to before it begins again at 0


def _of_cpus() -> list[Counter]:
    """Return a counter for each CPU package of the machine; none where one of them cannot be read."""
    counters: list[Counter] = []
    for package in sorted(RAPL.glob("intel-rapl:?")):
        file = package / "energy_uj"
        try:
            _joules(file)
            counters.append((partial(_joules, file), _joules(package / "max_energy_range_uj")))
        except (OSError, ValueError):
            return []
    return counters


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _of_gpu(device: torch.device) -> list[Counter]:
    """Return the counter of a GPU, as millijoules; none of one that has none, or whose driver has no NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle, count = ctypes.c_void_p(), ctypes.c_ulonglong()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return []
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(count)):
            return []
    except (OSError, AttributeError):
        return []

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(count))
        return count.value / 1e3

    return [(read, 0.0)]
