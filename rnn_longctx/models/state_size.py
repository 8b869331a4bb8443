"""How many numbers a row keeps between two tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

Key = TypeVar("Key")


@dataclass(frozen=True)
class StateSize:
    """How many numbers a row keeps between two tokens.

    Attributes:
        fixed: by what they are of ("scan", "conv"), whatever the length.
        per_token: more for every token that was read (attention's keys and values).
        windows: more for each of the first so many tokens, and none after them: {255: 512} is 512 numbers for every
            token up to the 255th (a window of attention, which begins empty).
        chunks: more whenever so many tokens have been read: {64: 512} is 512 numbers for every 64 tokens.
    """

    fixed: dict[str, int] = field(default_factory=dict)
    per_token: int = 0
    windows: dict[int, int] = field(default_factory=dict)
    chunks: dict[int, int] = field(default_factory=dict)

    def __add__(self, other: StateSize) -> StateSize:
        return StateSize(
            _sums(self.fixed, other.fixed),
            self.per_token + other.per_token,
            _sums(self.windows, other.windows),
            _sums(self.chunks, other.chunks),
        )

    @property
    def grows(self) -> bool:
        """Whether it grows with the length without end."""
        return bool(self.per_token or self.chunks)

    def total(self, length: int = 0) -> int:
        """Numbers a row keeps after `length` tokens."""
        in_windows = sum(min(length, longest) * numbers for longest, numbers in self.windows.items())
        of_chunks = sum(length // tokens * numbers for tokens, numbers in self.chunks.items())
        return sum(self.fixed.values()) + length * self.per_token + in_windows + of_chunks


def _sums(a: dict[Key, int], b: dict[Key, int]) -> dict[Key, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in [*a, *(key for key in b if key not in a)]}
