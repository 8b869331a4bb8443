"""The cells of a study: each trains a model and measures it, in a process of its own, side by side on the GPUs there
are, or on the one that is named.

Everything known of a study is on disk, so that one that is killed goes on where it stopped, and one that is finished
runs nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from rnn_longctx.config import counted
from rnn_longctx.data import load_text, open_streamed
from rnn_longctx.errors import InputError
from rnn_longctx.eval.pool import Pool, last_line
from rnn_longctx.files import write_atomic
from rnn_longctx.progress import Say
from rnn_longctx.train.config import MixedText


class CellsFailed(InputError):
    """Some cells of a study failed; the others have run."""


class Cells(Protocol):
    """A study, whose cells go by their names."""

    def due(self) -> list[str]:
        """Return the cells that may be run now, by what is known so far, the first to be run first."""

    def command(self, name: str) -> list[str]:
        """Return the command that runs a cell, or goes on with it."""

    def folder(self, name: str) -> Path:
        """Return where a cell keeps its files, its log among them."""

    def is_done(self, name: str) -> bool:
        """Whether a cell that has run is what it was to be."""

    def gather(self) -> object:
        """Write what is known so far, so that a study can be looked at before it ends."""


def run_cells(cells: Cells, parallel: int, device: torch.device, say: Say) -> None:
    """Run all cells that are due, and those that then become due, `parallel` at a time.

    A device of "cuda" without a number stands for all GPUs there are: each cell sees one of them.

    Raises:
        CellsFailed: names them, with the last line that the first of them said.
    """
    failed: dict[str, str] = {}
    again: set[str] = set()  # ended well, and are due for what only others that ended beside them decided
    done = 0
    with Pool(parallel, _gpus(device)) as pool:
        while True:
            waiting = [name for name in cells.due() if name not in failed and name not in pool]
            for name in waiting[: pool.free]:
                pool.start(name, cells.command(name), _log(cells, name))
            if not len(pool):
                break
            for name, code, seconds in pool.ended():
                if code == 0 and cells.is_done(name):
                    done += 1
                    cells.gather()
                    say(f"{name}: done in {seconds:.0f} s")
                elif code == 0 and name not in again and name in cells.due():
                    again.add(name)
                else:
                    failed[name] = last_line(_log(cells, name)) or f"exit {code}"
                    say(f"{name}: failed: {failed[name]}")
    say(f"{counted(done, 'cell')} run")
    cells.gather()
    if failed:
        (name, why), *others = failed.items()
        more = f"; then {', '.join(name for name, _ in others)}" if others else ""
        raise CellsFailed(
            f"{counted(len(failed), 'cell')} failed, the first of them {name}: {why}{more}; run again to try again"
        )


def _gpus(device: torch.device) -> list[str]:
    """Return the GPUs that cells are shared out among, as CUDA_VISIBLE_DEVICES names them; none where there is nothing
    to choose from."""
    count = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
    if count < 2:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def _log(cells: Cells, name: str) -> Path:
    return cells.folder(name) / "log.txt"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process runs the cell of this folder: it waits, and is let in however this one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def texts_for_cells(texts: Sequence[str | MixedText], folder: Path) -> list[str | MixedText]:
    """Return what is trained on, the installed packages gathered into `folder` once, and not by every cell.

    Raises:
        InputError: there is no such text, which every cell would find out by itself.
    """
    gathered: list[str | MixedText] = []
    for spec in texts:
        mixed = spec if isinstance(spec, MixedText) else MixedText(spec)
        if mixed.source == "site-packages":
            file = folder / "site-packages.txt"
            if not file.exists():
                write_atomic(file, load_text("site-packages").data)
            mixed = replace(mixed, source=str(file))
        elif open_streamed(mixed.source) is None:
            load_text(mixed.source)
        gathered.append(mixed if isinstance(spec, MixedText) else mixed.source)
    return gathered
