"""Documents as tokens on disk, each ended by the tokenizer's end of document: written once, then read at any place.

A text of any size takes the memory of a mebibyte of documents, or of the longest, and a run reads it as it reads an
array: the batch of a step needs no reader's state. A store stands in $XDG_CACHE_HOME/rnn-longctx/tokens (~/.cache
without one) and may be deleted at any time. Its index.json is rewritten after every shard, so that a build that was
stopped goes on at the shard it was in, after a bad one is mended, too. tokens.part becomes tokens.bin when all of it is
there, by a rename: a run that maps the old one keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from rnn_longctx.data.sources import Shard, Source
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.files import write_atomic
from rnn_longctx.progress import Say, silent

SAY_EVERY = 30.0  # seconds
GROUP = 2**20  # bytes of documents encoded at once


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a text's documents.

    Attributes:
        tokens: mapped from disk, uint8 for bytes and int32 otherwise.
        documents, bytes: how many there are of each.
        hash: of the documents, shard by shard.
    """

    tokens: np.ndarray
    documents: int
    bytes: int
    hash: str


def stored(
    source: Source, tokenizer: Tokenizer, min_document: int = 0, most: int | None = None, say: Say = silent
) -> TokenStore:
    """Return the store of a source's documents, which is written where it is not there yet.

    Of several processes one writes, and the others wait for it.

    Args:
        min_document: tokens; shorter documents are left out.
        most: tokens; as many documents of the source's beginning are taken as reach it. None: all.
    Raises:
        InputError: a shard that cannot be read, no document left, no place to write.
    """
    return _Build(source, tokenizer, min_document, most, say).store()


@dataclass
class _Build:
    """A store and how it is written; the arguments are those of `stored`."""

    source: Source
    tokenizer: Tokenizer
    min_document: int
    most: int | None
    say: Say

    def __post_init__(self) -> None:
        key = [self.source.where, self.tokenizer.name, self.tokenizer.eos_id, self.min_document, self.most]
        self.folder = _root() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.final, self.part = self.folder / "tokens.bin", self.folder / "tokens.part"
        self.index = self.folder / "index.json"
        self.dtype = np.dtype(np.uint8 if self.tokenizer.name == "bytes" else np.int32)
        self.shards: list[dict[str, Any]] = []  # the rows of the index: one for every shard that is written

    def store(self) -> TokenStore:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock"):
                file = self.part if self.part.exists() else self.final
                self.shards = self._unchanged(_read(self.index), file)
                if file == self.part or not self._complete():
                    if file == self.final:
                        self.shards = []
                    self._write()
                    os.replace(self.part, self.final)  # every shard of it is on the disk, see `_append`
                tokens = np.memmap(self.final, self.dtype, "c") if self._sum("tokens") else None
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot keep the tokens of {self.source.name} in {self.folder}: {reason}") from None
        if tokens is None:
            length = f" of documents of {self.min_document} tokens or more" if self.min_document else ""
            raise InputError(f"text {self.source.name} is empty{length}")
        digest = hashlib.sha256("".join(row["hash"] for row in self.shards).encode()).hexdigest()[:16]
        return TokenStore(tokens, self._sum("documents"), self._sum("bytes"), digest)

    def _sum(self, column: str) -> int:
        return sum(row[column] for row in self.shards)

    def _unchanged(self, index: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
        """Return the first rows of the index whose shards are still the source's, as far as the file holds them."""
        room = file.stat().st_size // self.dtype.itemsize if file.exists() else 0
        unchanged = []
        for row, shard in zip(index, self.source.shards):
            room -= row["tokens"]
            if row["identity"] != shard.identity or room < 0:
                break
            unchanged.append(row)
        return unchanged

    def _complete(self) -> bool:
        all_shards = len(self.shards) == len(self.source.shards)
        return all_shards or (self.most is not None and self._sum("tokens") >= self.most)

    def _write(self) -> None:
        """Append the shards that are not written yet to the file, and to the index."""
        last_said = time.monotonic()
        with self.part.open("r+b" if self.part.exists() else "w+b") as file:
            file.truncate(self._sum("tokens") * self.dtype.itemsize)  # what a shard that failed has left
            file.seek(0, os.SEEK_END)
            while not self._complete():
                self.shards.append(self._append(self.source.shards[len(self.shards)], file))
                write_atomic(self.index, json.dumps(self.shards, indent=1).encode())
                if time.monotonic() - last_said > SAY_EVERY:
                    last_said = time.monotonic()
                    tokens, written = self._sum("tokens"), len(self.shards)
                    shards = f"{written} of {len(self.source.shards)} shards"
                    self.say(f"text: {self.source.name}: {tokens:,} tokens of {shards}")

    def _append(self, shard: Shard, file: BinaryIO) -> dict[str, Any]:
        """Append the documents of a shard to the file, which reaches the disk, and return the shard's row."""
        documents = tokens = size = 0
        digest = hashlib.sha256()
        room = None if self.most is None else self.most - self._sum("tokens")
        for document, ids in _encoded(self.tokenizer, shard.read()):
            if len(ids) - (self.tokenizer.eos_id is not None) < self.min_document:
                continue
            file.write(ids.astype(self.dtype, copy=False).tobytes())
            digest.update(document + b"\0")
            documents, tokens, size = documents + 1, tokens + len(ids), size + len(document)
            if room is not None and tokens >= room:
                break
        file.flush()
        os.fsync(file.fileno())
        row = {"identity": shard.identity, "documents": documents, "tokens": tokens, "bytes": size}
        return row | {"hash": digest.hexdigest()}


def _root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rnn-longctx" / "tokens"


def _read(index: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(index.read_text())
    except (OSError, ValueError):  # none yet
        return []


def _encoded(tokenizer: Tokenizer, documents: Iterator[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yield each document with its tokens; a mebibyte is encoded at once, which a tokenizer does in parallel."""
    group: list[bytes] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= GROUP:
            yield from zip(group, _encode(tokenizer, group), strict=True)
            group, size = [], 0
    yield from zip(group, _encode(tokenizer, group), strict=True)


def _encode(tokenizer: Tokenizer, documents: list[bytes]) -> list[np.ndarray]:
    """Return the tokens of each document and its end, if the tokenizer has one."""
    if tokenizer.eos_id is None or not documents:
        return [tokenizer.encode(document) for document in documents]
    joined = b"\0".join(documents) + b"\0"
    ids = np.frombuffer(joined, np.uint8) if tokenizer.name == "bytes" else tokenizer.encode(joined)
    return np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]
