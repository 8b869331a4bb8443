"""The measurements of a sweep, shared out among processes that write to one results folder.

Who wants to measure something claims it: a file in `claims/` below the folder, which is locked for as long as the
process works on it. The system drops the locks of a process that ends, however it ends, so that what a dead one left is
free at once. Each line of the file is a try; the file goes away when the cells are there.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from rnn_longctx.config import counted, home_path
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.eval.cells import alone
from rnn_longctx.eval.plan import Measurement
from rnn_longctx.eval.progress import Progress
from rnn_longctx.progress import Say

TRIES = 2  # of a measurement in a run: one more, by whoever is free, where a process died of the first
WAIT = 0.2  # seconds between two looks at what others work on
NAMED = 3  # of what could not be measured, in the line about it
DIED = 3  # the exit code of a process that dies of an error nobody foresaw while it measures


class Claims:
    """What the ranks of a run have claimed.

    Attributes:
        rank: the number of this one.
        missing: a line of what could not be measured, and why, once all else is there; empty where nothing is.
    """

    def __init__(self, results: str | Path, rank: int, began: float, say: Say):
        """began: when the run did, in seconds since the epoch: earlier tries do not count. say: of what fails."""
        self.folder, self.rank, self.began, self.say = home_path(results) / "claims", rank, began, say
        self.missing = ""
        self.folder.mkdir(parents=True, exist_ok=True)

    def alone(self) -> AbstractContextManager[None]:
        """Return a context that one rank is in at a time."""
        return alone(self.folder)

    def share_out(self, measurements: list[Measurement], measure: Callable[[Measurement], None], bar: Progress) -> None:
        """Measure what no other rank does, the dearest first, until every cell is there or was tried in vain.

        Raises:
            InputError: the folder's file system has no locks.
        """
        due, waits = sorted(measurements, key=lambda m: -m.tokens), False
        while True:
            left = [m for m in due if m.missing()]
            bar.advance(sum(m.tokens for m in due) - sum(m.tokens for m in left))  # what others have measured
            measured, held = self._first_free(left, measure)
            due = [m for m in left if m is not measured]
            if measured is None and not held:
                break
            if measured is None:
                if not waits:
                    bar.say(f"waiting for other ranks, with {counted(len(due), 'measurement')} to go")
                waits = True
                time.sleep(WAIT)
        self.missing = self._line([(m, len(cells)) for m in due if (cells := m.missing())])

    def _line(self, in_vain: list[tuple[Measurement, int]]) -> str:
        """in_vain: measurements, and how many of their cells are not there."""
        if not in_vain:
            return ""
        reasons = [f"{m.name} ({next(filter(None, self._tries(m)), 'its process died')})" for m, _ in in_vain[:NAMED]]
        more = [f"{len(in_vain) - NAMED} more"] if len(in_vain) > NAMED else []
        count = sum(cells for _, cells in in_vain)
        return f"{counted(count, 'cell')} {'is' if count == 1 else 'are'} missing: {'; '.join(reasons + more)}"

    def _first_free(
        self, due: list[Measurement], measure: Callable[[Measurement], None]
    ) -> tuple[Measurement | None, bool]:
        """Measure the first that is free. Return it, if there is one, and whether others work on some."""
        held = False
        for m in sorted(due, key=lambda m: len(self._tries(m))):  # what a process died of last
            with self._claimed(m) as mine:
                if not mine:
                    held = True
                elif not m.missing():
                    self._path(m).unlink(missing_ok=True)
                elif self._hopeful(m) and self._measured(m, measure):
                    self._path(m).unlink(missing_ok=True)
                    return m, held
        return None, held

    def _measured(self, m: Measurement, measure: Callable[[Measurement], None]) -> bool:
        """Measure, and return whether it could be done; a message says why not."""
        self._note(m, "")
        try:
            measure(m)
            return True
        except (InputError, torch.cuda.OutOfMemoryError) as error:
            why = one_line(error)
        except (Exception, SystemExit):  # who knows what is left of the GPU
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(DIED)
        self._note(m, why)
        self.say(f"rank {self.rank}: {m.name}: {why}")
        return False

    @contextmanager
    def _claimed(self, m: Measurement) -> Iterator[bool]:
        """Give whether this rank alone works on it inside the block."""
        with self._path(m).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                no_locks = f"{self.folder}: several ranks share what they measure by locks, which its file system lacks"
                raise InputError(f"{no_locks} ({error.strerror}); set another --out") from None
            yield True

    def _hopeful(self, m: Measurement) -> bool:
        tries = self._tries(m)
        return len(tries) < TRIES and not any(tries)

    def _tries(self, m: Measurement) -> list[str]:
        """Return a text for each time that it was begun in this run, and one that says why it cannot be measured."""
        try:
            lines = [line.partition(" ") for line in self._path(m).read_text().splitlines()]
        except FileNotFoundError:
            return []
        return [why for when, _, why in lines if float(when or 0) >= self.began]

    def _note(self, m: Measurement, why: str) -> None:
        with self._path(m).open("a") as file:
            file.write(f"{time.time()!r} {why}\n")

    def _path(self, m: Measurement) -> Path:
        return self.folder / m.id
