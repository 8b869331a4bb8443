"""A progress bar over the tokens that an evaluation reads."""

from __future__ import annotations

from typing import Any

from rnn_longctx.progress import to_stderr


class Progress:
    """A rich progress bar, or, where the output is no terminal, a line a task on stderr; or nothing."""

    def __init__(self, shown: bool):
        self.bar: Any = None
        self.lines, self.read, self.tokens = False, 0, 1
        if shown:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
            self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn())
            self.lines = not self.bar.console.is_terminal
            self.bar = None if self.lines else self.bar

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

    def say(self, text: str) -> None:
        """Say what is being measured."""
        if self.lines:
            to_stderr(f"{self.read / self.tokens:4.0%} {text}")
        if self.bar:
            self.bar.update(self.task, description=text)

    def advance(self, tokens: int) -> None:
        """Count tokens that have been read."""
        self.read += tokens
        if self.bar:
            self.bar.advance(self.task, tokens)
