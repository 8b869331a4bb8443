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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from rnn_longctx.data.sources import Shard, Source
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError

SAY_EVERY = 30.0  # seconds
GROUP = 2**20  # bytes of documents encoded at once


@dataclass(frozen=True)
class Stored:
    """`tokens` is mapped from disk: uint8 for bytes and int32 otherwise. `hash` is of the documents, shard by shard."""

    tokens: np.ndarray
    documents: int
    bytes: int
    hash: str


def stored(source: Source, tokenizer: Tokenizer, min_document: int = 0, most: int | None = None,
           say: Callable[[str], object] = print) -> Stored:  # fmt: skip
    """The documents of at least `min_document` tokens; where `most` is given, of the source's beginning, as many as
    bring it to that many tokens. Of several processes one writes, and the others wait for it.

    Raises:
        InputError: a shard that cannot be read, no document left, no place to write.
    """
    key = [source.where, tokenizer.name, tokenizer.eos_id, min_document, most]
    folder = _root() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    final, part, index = folder / "tokens.bin", folder / "tokens.part", folder / "index.json"
    dtype = np.dtype(np.uint8 if tokenizer.name == "bytes" else np.int32)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            done = _same(_read(index), source.shards, final if not part.exists() else part, dtype.itemsize)
            if part.exists() or not _enough(done, source, most):
                if not part.exists():
                    done = []
                _write(source, tokenizer, min_document, most, done, part, index, dtype, say)
                os.replace(part, final)
            found = np.memmap(final, dtype, "c") if sum(s["tokens"] for s in done) else None
    except OSError as error:
        raise InputError(f"cannot keep the tokens of {source.name} in {folder}: {error.strerror or error}") from None
    if found is None:
        long = f" of documents of {min_document} tokens or more" if min_document else ""
        raise InputError(f"text {source.name} is empty{long}")
    digest = hashlib.sha256("".join(s["hash"] for s in done).encode()).hexdigest()[:16]
    return Stored(found, sum(s["documents"] for s in done), sum(s["bytes"] for s in done), digest)


def _root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rnn-longctx" / "tokens"


def _read(index: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(index.read_text())
    except (OSError, ValueError):  # none yet
        return []


def _same(done: list[dict[str, Any]], shards: list[Shard], file: Path, itemsize: int) -> list[dict[str, Any]]:
    """Those of the shards done that are still the source's, as far as the file holds them."""
    room = file.stat().st_size // itemsize if file.exists() else 0
    same = []
    for row, shard in zip(done, shards):
        room -= row["tokens"]
        if row["identity"] != shard.identity or room < 0:
            break
        same.append(row)
    return same


def _enough(done: list[dict[str, Any]], source: Source, most: int | None) -> bool:
    return len(done) == len(source.shards) or (most is not None and sum(s["tokens"] for s in done) >= most)


def _write(source: Source, tokenizer: Tokenizer, min_document: int, most: int | None, done: list[dict[str, Any]],
           part: Path, index: Path, dtype: np.dtype, say: Callable[[str], object]) -> None:  # fmt: skip
    """Append the shards that are not done to `part` and to `done`."""
    said = time.monotonic()
    with part.open("r+b" if part.exists() else "w+b") as file:
        total = sum(s["tokens"] for s in done)
        file.truncate(total * dtype.itemsize)  # what a shard that failed has left
        file.seek(0, os.SEEK_END)
        while not _enough(done, source, most):
            shard = source.shards[len(done)]
            row = _append(shard, tokenizer, min_document, None if most is None else most - total, file, dtype)
            file.flush()
            os.fsync(file.fileno())
            done.append(row)
            total += row["tokens"]
            aside = index.with_suffix(".tmp")
            aside.write_text(json.dumps(done, indent=1))
            os.replace(aside, index)
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                say(f"text: {source.name}: {total:,} tokens of {len(done)} of {len(source.shards)} shards")


def _append(shard: Shard, tokenizer: Tokenizer, min_document: int, most: int | None, file: BinaryIO,
            dtype: np.dtype) -> dict[str, Any]:  # fmt: skip
    documents = tokens = size = 0
    digest = hashlib.sha256()
    for document, ids in _encoded(tokenizer, shard.read()):
        if len(ids) - (tokenizer.eos_id is not None) < min_document:
            continue
        file.write(ids.astype(dtype, copy=False).tobytes())
        digest.update(document + b"\0")
        documents, tokens, size = documents + 1, tokens + len(ids), size + len(document)
        if most is not None and tokens >= most:
            break
    return {"identity": shard.identity, "documents": documents, "tokens": tokens, "bytes": size,
            "hash": digest.hexdigest()}  # fmt: skip


def _encoded(tokenizer: Tokenizer, documents: Iterator[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Each document with its tokens; a mebibyte of them is encoded at once, which a tokenizer does in parallel."""
    some: list[bytes] = []
    size = 0
    for document in documents:
        some.append(document)
        size += len(document)
        if size >= GROUP:
            yield from zip(some, _encode(tokenizer, some), strict=True)
            some, size = [], 0
    yield from zip(some, _encode(tokenizer, some), strict=True)


def _encode(tokenizer: Tokenizer, documents: list[bytes]) -> list[np.ndarray]:
    """The tokens of each and its end, if the tokenizer has one."""
    if tokenizer.eos_id is None or not documents:
        return [tokenizer.encode(document) for document in documents]
    joined = b"\0".join(documents) + b"\0"
    ids = np.frombuffer(joined, np.uint8) if tokenizer.name == "bytes" else tokenizer.encode(joined)
    return np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]
