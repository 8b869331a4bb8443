"""Read what is appended to a file, line by line, and keep of it no more than a page can show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

FIRST = 64  # bytes by which a file is known again
CHUNK = 2**20  # bytes read at once
LONGEST = 2**20  # bytes of a line; a longer one is no line of a log, and is passed over
POINTS = 4000  # kept of a log, at most


class Follow:
    """A file that others write to.

    A last line without its end waits until it has one. Where another file takes the place of the one that is read (a
    rotation), what is left of the old one is read first, and the new one goes on from there. A file that was cut short
    or written anew is read from its beginning. One that is not there yet is waited for.

    Attributes:
        path: of the file.
        era: how often it was cut short.
    """

    def __init__(self, path: Path):
        self.path, self.era = path, 0
        self._file: BinaryIO | None = None
        self._rest, self._passing = b"", False
        self._first = b""  # its first bytes: a file that was written anew, and is as long again, has others

    def lines(self) -> Iterator[str]:
        """Yield the lines that were ended since the last call."""
        if self._file is not None:
            self._restart_if_cut()
            yield from self._rest_of(self._file)
        try:
            file = self.path.open("rb")
        except OSError:  # between two files of a rotation there is none
            return
        if self._file is not None and os.path.sameopenfile(file.fileno(), self._file.fileno()):
            file.close()
            return
        if self._file is not None:
            yield from self._rest_of(self._file)  # that came since
            self._file.close()
        self._file, self._first, self._rest, self._passing = file, b"", b"", False
        yield from self._rest_of(file)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _restart_if_cut(self) -> None:
        assert self._file is not None
        offset = self._file.tell()
        first = os.pread(self._file.fileno(), FIRST, 0)
        if os.fstat(self._file.fileno()).st_size < offset or not first.startswith(self._first):
            self.era += 1
            self._file.seek(0)
            self._rest, self._passing, self._first = b"", False, b""

    def _rest_of(self, file: BinaryIO) -> Iterator[str]:
        while data := file.read(CHUNK):
            if len(self._first) < FIRST:
                self._first = os.pread(file.fileno(), FIRST, 0)
            yield from self._split(data)

    def _split(self, data: bytes) -> Iterator[str]:
        *ended, rest = (self._rest + data).split(b"\n")
        self._rest = rest
        for line in ended:
            if self._passing:
                self._passing = False
            elif len(line) <= LONGEST:
                yield line.decode("utf-8", "replace")
        if len(self._rest) > LONGEST:
            self._rest, self._passing = b"", True


class Point(NamedTuple):
    """A row of numbers at a place x; `number` counts from 1 on."""

    number: int
    x: float
    values: tuple[float | None, ...]


@dataclass
class Points:
    """The newest rows as they are, older ones ever thinner: never more than POINTS.

    Attributes:
        count: rows seen.
    """

    count: int = 0
    kept: list[Point] = field(default_factory=list)

    def add(self, x: float, values: tuple[float | None, ...]) -> None:
        self.count += 1
        self.kept.append(Point(self.count, x, values))
        if len(self.kept) > POINTS:
            half = POINTS // 2
            old = [pair for start in range(0, half, 4) for pair in _extremes(self.kept[start : start + 4])]
            self.kept = [*old, *self.kept[half:]]

    def since(self, number: int) -> list[Point]:
        """Return the rows after a number that are still kept."""
        low, high = 0, len(self.kept)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.kept[middle].number <= number else (low, middle)
        return self.kept[low:]


def _extremes(points: list[Point]) -> list[Point]:
    """Return, of points that follow each other, the ones of the least and of the largest first value, in order."""
    known = [p for p in points if p.values and p.values[0] is not None]
    if not known:
        return points[:1]
    ends = {min(known, key=_first), max(known, key=_first)}
    return sorted(ends)


def _first(point: Point) -> float:
    value = point.values[0]
    assert value is not None
    return value
