"""A progress bar over the tokens that an evaluation reads."""

from __future__ import annotations

import sys
import time
from typing import Any

from rnn_longctx.plain import plain
from rnn_longctx.progress import to_stderr

EVERY = 60.0  # seconds between two lines about one task in a log


class Progress:
    """A rich progress bar on stderr, or, where that is no terminal (a log, a notebook), a line a task, and one now and
    then while it lasts; or nothing. Lines end, and nothing is written over: no carriage returns."""

    def __init__(self, shown: bool):
        self.bar: Any = None
        self.lines = shown and not sys.stderr.isatty()
        self.read, self.tokens, self.task_text, self.said = 0, 1, "", time.monotonic()
        if shown and not self.lines:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
            console = Console(stderr=True, markup=False)
            self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("calibrating", total=None)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.stop()

    def total(self, tokens: int) -> None:
        """Say how many tokens will be read."""
        self.tokens = max(1, tokens)
        if self.bar:
            self.bar.update(self.task, total=tokens)

    def note(self, line: str) -> None:
        """Say a line that stays."""
        if self.lines:
            to_stderr(line)
        if self.bar:
            self.bar.console.print(plain(line), highlight=False)

    def say(self, text: str) -> None:
        """Say what is being measured."""
        self.task_text = plain(text)
        self._line()
        if self.bar:
            self.bar.update(self.task, description=self.task_text)

    def advance(self, tokens: int) -> None:
        """Count tokens that have been read."""
        self.read += tokens
        if self.bar:
            self.bar.advance(self.task, tokens)
        if time.monotonic() - self.said > EVERY:
            self._line()

    def _line(self) -> None:
        self.said = time.monotonic()
        if self.lines:
            to_stderr(f"{self.read / self.tokens:4.0%} {self.task_text}")
