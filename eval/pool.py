"""Processes side by side that end with the one that started them: the cells of a study, each killable by itself."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_WAIT = 0.2  # seconds between two looks at the processes


class Ended(NamedTuple):
    """A process that has ended: its name, its exit code and how many seconds it took."""

    name: str
    code: int
    seconds: float


class Pool:
    """At most `parallel` processes, by name. Leaving the `with` block ends those that still run.

    Each writes what it prints to the end of a log, and gets an even share of the processors. One of Python calls
    `end_with_parent` first, so that a parent that was killed leaves none behind.

    Attributes:
        gpus: as CUDA_VISIBLE_DEVICES names them. A process sees one alone, which fewest others do; where none is named
            it sees what this one does.
    """

    def __init__(self, parallel: int, gpus: Sequence[str] = ()):
        self.parallel, self.gpus = parallel, gpus
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._gpu: dict[str, str] = {}  # of a process that runs

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for process, _ in self._running.values():  # interrupted: each goes on from its snapshot when it is run again
            process.terminate()
        for process, _ in self._running.values():
            process.wait()

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, name: object) -> bool:
        return name in self._running

    @property
    def free(self) -> int:
        """How many more processes may be started."""
        return self.parallel - len(self)

    def start(self, name: str, command: Sequence[str], log: Path) -> None:
        """Start a process; the folder of its log is created."""
        log.parent.mkdir(parents=True, exist_ok=True)
        settings = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.parallel))}
        if self.gpus:
            taken = list(self._gpu.values())
            self._gpu[name] = settings["CUDA_VISIBLE_DEVICES"] = min(self.gpus, key=taken.count)
        with log.open("ab") as file:
            # the pipe ends with this process, and the other process with the pipe
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=os.environ | settings
            )
        self._running[name] = (process, time.monotonic())

    def ended(self) -> Iterator[Ended]:
        """Wait until a process ends; yield all that have."""
        while all(process.poll() is None for process, _ in self._running.values()):
            time.sleep(_WAIT)
        for name, (process, began) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[name]
                self._gpu.pop(name, None)
                yield Ended(name, process.returncode, time.monotonic() - began)


def python(module: str, *words: str) -> list[str]:
    """Return the command that runs a module of this library. (Its package has imported it by then, about which Python
    warns.)"""
    return [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", module, *words]


def end_with_parent() -> None:
    """End this process when the pool that started it is gone, which holds the other end of its standard input."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
