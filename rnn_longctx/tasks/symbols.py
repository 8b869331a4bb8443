"""What tasks in symbols share: ids of their own, which stand for nothing but themselves.

Id 0 is never one of them, for it ends a document in bytes: text that comes before an example ends with it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from rnn_longctx.errors import InputError
from rnn_longctx.tasks.base import Task


@dataclass(frozen=True)
class SymbolTask(Task):
    """Base of the tasks in symbols: a field `vocab_size` says how many ids a task has, 0 among them. One with other
    parameters than the usual ones is called by them."""

    @property
    def label(self) -> str:
        others = [(f.name, value) for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return "-".join([self.name, *(f"{name}{value:g}" for name, value in others)])


def at_least(task: Task, **numbers: tuple[int, int]) -> None:
    """Raise InputError where a number is below the least that it may be; numbers: (the number, the least)."""
    for name, (number, least) in numbers.items():
        if number < least:
            raise InputError(f"{task.name}: {name} is at least {least}, got {number}")
