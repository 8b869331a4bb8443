"""Text that arrives in a directory, each byte of it read once: files appear, and those that are there may grow.

Files are read in the order of their names, from where reading of each stopped. JSON Lines (.jsonl, .ndjson) are
documents of the field `text`, a line read once it has ended; any other file is UTF-8 text, one document. A file that
may grow cannot be unpacked: one that is packed is skipped, as what is no text is. Hidden files are not looked at, so
that one may be written aside and renamed.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rnn_longctx.config import counted
from rnn_longctx.data.content import HEAD, encoding_of, looks_like, packing_of
from rnn_longctx.data.sources import JSONL, _document, _field, walk
from rnn_longctx.data.text import BLOCK, _whole
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError

STOP = "STOP"  # a file of this name says that no more will come


@dataclass(frozen=True)
class Arrival:
    """Text that has arrived.

    Attributes:
        ids: (tokens,) int64, documents apart by the end of document if there is one.
        spans: of each file its name, the first byte and the one after the last.
    """

    ids: np.ndarray
    spans: list[tuple[str, int, int]]


class Arrivals:
    """A directory and how far it was read.

    Attributes:
        read: the bytes of each file that were read, by its name.
        skipped: why a file cannot be read or is not text, by its name; it is not looked at again.
    Raises:
        InputError: there is no such directory.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = Path(folder).expanduser(), tokenizer
        self.read: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        self._check()

    @property
    def stopped(self) -> bool:
        return (self.folder / STOP).exists()

    def take(self, tokens: int) -> Arrival | None:
        """Return the next `tokens` tokens, or a few more: characters and records are not cut. None while there are
        fewer. Nothing counts as read before `done`. Raises InputError where the directory is gone."""
        self._check()
        end = [] if self.tokenizer.eos_id is None else [np.array([self.tokenizer.eos_id])]
        pieces: list[np.ndarray] = []
        spans: list[tuple[str, int, int]] = []
        total = 0
        for name in walk(self.folder):
            if name == STOP or name in self.skipped:
                continue
            start = self.read.get(name, 0)
            try:
                ids, stop = self._rest(name, start, tokens - total)
            except FileNotFoundError:  # it was there a moment ago
                continue
            except (InputError, OSError) as error:
                self.skipped[name] = getattr(error, "strerror", None) or str(error)
                continue
            if stop > start:
                spans.append((name, start, stop))
            if len(ids):
                apart = end if pieces and pieces[-1][-1] != self.tokenizer.eos_id else []
                pieces += [*apart, ids]
                total += len(apart) + len(ids)
            if total >= tokens:
                return Arrival(np.concatenate(pieces), spans)
        return None

    def done(self, arrival: Arrival) -> None:
        self.read |= {name: stop for name, _, stop in arrival.spans}

    def _check(self) -> None:
        if not self.folder.is_dir():
            raise InputError(f"stream: no directory at {self.folder}")

    def _rest(self, name: str, start: int, most: int) -> tuple[np.ndarray, int]:
        """Return the tokens of a file from byte `start` on, about `most` at most, and the byte after them."""
        path = self.folder / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError("not a regular file")
        if status.st_size < start:
            raise InputError(f"{counted(status.st_size, 'byte')}, fewer than the {start} that were read of it")
        if status.st_size == start:
            return np.zeros(0, np.int64), start
        with path.open("rb") as file:
            begin = start or _beginning(file.read(HEAD))
            file.seek(begin)
            return (self._records if name.endswith(JSONL) else self._text)(file, begin, most)

    def _text(self, file: BinaryIO, start: int, most: int) -> tuple[np.ndarray, int]:
        pieces, total, stop = [np.zeros(0, np.int64)], 0, start
        while total < most:
            raw = file.read(BLOCK)
            data = raw[: _whole(raw, len(raw))]  # the rest of a character may still come
            if not data:
                break
            try:
                bad = data.decode("utf-8").encode().find(b"\0")
            except UnicodeDecodeError as error:
                bad = error.start
            if bad >= 0:
                raise InputError(f"not UTF-8 text at byte {stop + bad}")
            ids, sizes = self.tokenizer.encode_with_bytes(data)
            if total + len(ids) > most:
                ends = np.cumsum(sizes)
                cut = int(ends[most - total - 1])
                while cut < len(data) and data[cut] & 0xC0 == 0x80:  # not inside a character
                    cut += 1
                ids, data = ids[: np.searchsorted(ends, cut, "right")], data[:cut]
            pieces.append(ids)
            total, stop = total + len(ids), stop + len(data)
            file.seek(stop)
        return np.concatenate(pieces), stop

    def _records(self, file: BinaryIO, start: int, most: int) -> tuple[np.ndarray, int]:
        end = np.array([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id], dtype=np.int64)
        pieces, total, stop = [np.zeros(0, np.int64)], 0, start
        while total < most:
            line = file.readline()
            if not line.endswith(b"\n"):  # still being written
                break
            try:
                text = _field(json.loads(line), "text") if line.strip() else None
            except InputError as error:
                raise InputError(f"at byte {stop}: {error}") from None
            except (ValueError, RecursionError):
                raise InputError(f"at byte {stop}: not a line of JSON in UTF-8") from None
            if text:
                pieces += [self.tokenizer.encode(_document(text)), end]
                total += len(pieces[-2]) + len(end)
            stop += len(line)
        return np.concatenate(pieces), stop


def _beginning(head: bytes) -> int:
    """Return the byte at which the text of a file begins: after UTF-8's mark, if there is one. Raises InputError for
    what is no text."""
    if packing := packing_of(head):
        raise InputError(f"packed by {packing}, and a file that may grow is read as it is: unpack it")
    encoding = encoding_of(head)
    if encoding in ("utf-16", "utf-32"):
        raise InputError(f"{encoding.upper()}, not UTF-8 text: convert it")
    if reason := looks_like(head):
        raise InputError(reason)
    return 3 if encoding else 0
