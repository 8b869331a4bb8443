"""Texts: one run of bytes with a name and a hash, made of documents joined by NUL, and fixed slices of it.

Python's standard library is text to *evaluate* on; the installed packages, without the files that copy the
standard library, are text to *train* on. Both are on every machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import site
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np

from rnn_longctx.config import counted, home_path
from rnn_longctx.data.content import read_text
from rnn_longctx.data.pieces import encode_after
from rnn_longctx.data.sources import Shard, Source, identity, open_source, walk
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError

GOLDEN = 0.6180339887498949
BLOCK = 1 << 16
HELD = 2**30  # bytes: to train on, the documents of a larger directory are streamed
GROUP = 2**26  # bytes of such a directory that are one shard
SOURCES = (
    "stdlib, site-packages, builtin, a file, a directory, jsonl:PATH[:field], parquet:PATH[:column] "
    "or hf:dataset[:split[:column]]"
)
_TESTS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Text:
    """Documents joined by NUL bytes, under a canonical name (``stdlib``, ``file:moby-dick.txt``: never a
    path)."""

    name: str
    data: bytes

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def hash(self) -> str:
        """Return the first 16 hex digits of the SHA-256 of the data: the name's claim, checked."""
        return hashlib.sha256(self.data).hexdigest()[:16]

    def documents(self) -> Iterator[bytes]:
        start = 0
        while start <= len(self.data):
            stop = self.data.find(b"\0", start)
            stop = len(self.data) if stop < 0 else stop
            yield self.data[start:stop]
            start = stop + 1

    def start(self, i: int) -> int:
        """Return the byte at which slice `i` starts: a golden-ratio sequence (evenly spread for every number of
        slices), moved forward to the start of a UTF-8 character."""
        at = int(len(self.data) * ((0.5 + i * GOLDEN) % 1.0))
        for step in range(4):  # a UTF-8 character has at most three continuation bytes
            if at + step == len(self.data) or self.data[at + step] & 0xC0 != 0x80:
                return at + step
        return at

    def distinct(self, nbytes: int, most: int) -> int:
        """Return how many of the first `most` slices of `nbytes` lie apart from one another; at least 1."""
        n = 1
        while n < most and min(n * GOLDEN % 1.0, -n * GOLDEN % 1.0) * len(self.data) >= nbytes + 4:
            n += 1  # (two slices lie as far apart as their numbers say; 4: a start is moved to that of a character)
        return n

    def slice(self, i: int, nbytes: int) -> bytes:
        """Return the i-th fixed slice, `nbytes` long.

        Reading is circular (NUL between the end and the beginning), so that where a slice starts depends on `i` and the
        text alone. Raises InputError where it is longer than the text.
        """
        if nbytes > len(self.data):
            raise InputError(
                f"text {self.name} has {counted(len(self.data), 'byte')}; a slice of {nbytes} was asked for"
            )
        start = self.start(i)
        head = self.data[start : start + nbytes]
        return head if len(head) == nbytes else (head + b"\0" + self.data[: nbytes - len(head)])[:nbytes]


def tokens(text: Text, tokenizer: Tokenizer, i: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `n` tokens of slice `i` and the bytes each stands for: two int64 arrays of shape (n,).

    The text is encoded in blocks cut at fixed places, so asking for more tokens never changes the earlier
    ones. Raises InputError, saying how many tokens there are, when the text is too short.
    """
    if tokenizer.name == "bytes":
        return tokenizer.encode_with_bytes(text.slice(i, n))
    ring = text.slice(i, len(text))
    ring = ring[: _whole(ring, len(ring))]
    ids: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    total = position = 0
    while total < n and position < len(ring):
        stop = _cut(ring, position)
        before = ring[max(0, position - 4) : position].decode("utf-8", "ignore")[-1:].strip("\0")  # a document's end
        new_ids, new_sizes = encode_after(tokenizer, before, ring[position:stop])
        ids.append(new_ids)
        sizes.append(new_sizes)
        total, position = total + len(new_ids), stop
    if total < n:
        raise InputError(
            f"text {text.name} has {counted(total, 'token')} ({tokenizer.name}) in slice {i}; {n} were asked for"
        )
    return np.concatenate(ids)[:n], np.concatenate(sizes)[:n]


def load_text(spec: str | Path | Text) -> Text:
    """Return a text by its name, held whole; a Text as it is.

    stdlib         the standard library's .py files, without tests; to evaluate on
    site-packages  installed packages' .py files, less copies of stdlib code and this package; to train on
    builtin        81 files of Python that come with the package, 621,021 bytes, the same in every version and
                   installation; to calibrate on where nothing is named
    file           its text, one document but for NUL bytes (file:PATH, where the name ends like one of records)
    directory      its text files, recursively, sorted, less hidden files and those with NUL bytes; what else is left
                   out, because it is no text or cannot be read, is counted in a warning
    records        ``jsonl:PATH[:field]``, ``parquet:PATH[:column]``, ``hf:dataset[/config][:split[:column]]``, or a
                   file by its suffix (.jsonl, .jsonl.gz, .jsonl.zst, .parquet): a document each; see
                   `rnn_longctx.data.sources`

    What a file holds is told by its bytes: packed ones are unpacked, UTF-16 and UTF-32 become UTF-8
    (`rnn_longctx.data.content`).

    Raises InputError when it is missing or empty, or no text at all.
    """
    if isinstance(spec, Text):
        return spec
    if not isinstance(spec, str | Path):
        raise InputError(f"a text is {SOURCES}, or a Text; got {type(spec).__name__} {spec!r:.60}")
    name = str(spec)
    records = open_source(name)
    if name == "stdlib":
        text = Text(name, b"\0".join(_stdlib()))
    elif name == "site-packages":
        text = Text(name, b"\0".join(_site_packages()))
    elif name == "builtin":
        text = Text(name, lzma.decompress(resources.files("rnn_longctx.data").joinpath("builtin.txt.xz").read_bytes()))
    elif records is not None:
        text = Text(records.name, b"\0".join(records.documents()))
    else:
        path = home_path(name.removeprefix("file:").removeprefix("dir:"))
        if path.is_dir():
            _not_a_model(path)
            label = f"dir:{path.resolve().name}"
            text = Text(label, b"\0".join(_texts([path / p for p in walk(path)], label)))
        elif path.is_file():
            text = Text(f"file:{path.name}", read_text(path))
            if not name.startswith("file:") and _json_lines(text.data):
                logging.getLogger(__name__).warning(
                    "%s is read as plain text, but holds JSON Lines: jsonl:%s[:field] reads a field of each", path, path
                )
        else:
            raise InputError(f"no text at {name}; expected {SOURCES}")
    if not text.data:
        raise InputError(f"text {text.name} is empty")
    return text


def open_streamed(spec: str) -> Source | None:
    """Return a text that is streamed and not held: files of records, directories of more than a gibibyte. None: any
    other, which `load_text` holds."""
    path = home_path(spec.removeprefix("dir:"))
    if (records := open_source(spec)) is not None or not path.is_dir():
        return records
    files = [f for f in (path / name for name in walk(path)) if f.is_file()]
    sizes = [f.stat().st_size for f in files]
    if sum(sizes) <= HELD:
        return None
    name = f"dir:{path.resolve().name}"
    groups: dict[int, list[Path]] = {}
    before = 0
    for file, size in zip(files, sizes):
        groups.setdefault(before // GROUP, []).append(file)
        before += size
    shards = [Shard(identity(group), lambda group=group: _texts(group, name)) for group in groups.values()]  # type: ignore[misc]
    return Source(name, f"dir:{path.resolve()}", shards)


def _texts(paths: list[Path], label: str) -> Iterator[bytes]:
    """Yield the texts of files, in order, read by threads: there may be tens of thousands. What is left out is counted
    in a warning."""

    def read(path: Path) -> bytes | str:
        if not path.is_file():
            return f"{path.name} cannot be read"  # a broken link, a pipe
        try:
            data = read_text(path)
        except InputError as error:
            return str(error).replace(str(path), path.name, 1)
        return f"{path.name} holds NUL bytes" if b"\0" in data else data

    left_out = []
    with ThreadPoolExecutor(16) as pool:
        for text in pool.map(read, paths, chunksize=64):
            if isinstance(text, str):
                left_out.append(text)
            elif text:
                yield text
    if left_out:
        reasons = "; ".join(left_out[:3]) + (f"; and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        logging.getLogger(__name__).warning(
            "%s: %d of %d files are left out: %s", label, len(left_out), len(paths), reasons
        )


def _not_a_model(folder: Path) -> None:
    weights = [f.name for pattern in ("*.safetensors", "pytorch_model*.bin") for f in folder.glob(pattern)]
    if (folder / "config.json").is_file() and weights:
        raise InputError(f"{folder} is a model (config.json, {sorted(weights)[0]}), not text; expected {SOURCES}")


def _json_lines(data: bytes) -> bool:
    """Return whether a text begins with two lines of JSON, each an object."""
    try:
        two = [json.loads(line) for line in data[: 2 * BLOCK].split(b"\n", 2)[:2]]
    except (ValueError, RecursionError):
        return False
    return len(two) == 2 and all(isinstance(line, dict) for line in two)


def _cut(data: bytes, position: int) -> int:
    """Return the end of the block from `position`: after the first newline at least 64 KiB on, else about there."""
    if position + BLOCK >= len(data):
        return len(data)
    newline = data.find(b"\n", position + BLOCK, position + 2 * BLOCK)
    return newline + 1 if newline >= 0 else _whole(data, position + BLOCK)


def _whole(data: bytes, stop: int) -> int:
    """Return `stop`, or the start of the UTF-8 character that a cut there would split."""
    for back in range(1, min(3, stop) + 1):
        lead = data[stop - back]
        if lead & 0xC0 != 0x80:
            size = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
            return stop - back if size > back else stop
    return stop


def _stdlib() -> list[bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata holds this machine's paths and compiler flags: not source, and it would change the hash.
    names = [n for n in walk(root, ".py", _TESTS) if not n.startswith("_sysconfigdata")]
    return [d for d in _read_all([root / n for n in names]) if d and _is_source(d)]


def _site_packages() -> list[bytes]:
    """Return the files of site-packages, sorted by their path in it: those of 200 bytes to 1 MB, no two alike, of whose
    longer lines (24 characters and more, stripped) at most 20% are in the standard library, since what copies it would
    leak into training."""
    paths = sysconfig.get_paths()
    roots = {Path(p).resolve() for p in (paths["purelib"], paths["platlib"], *site.getsitepackages())}
    skip = {"__pycache__", "rnn_longctx"}
    files = sorted((name, str(root / name)) for root in roots if root.is_dir() for name in walk(root, ".py", skip))
    files = [(name, path) for name, path in files if not name.startswith("__editable__")]  # holds this machine's paths
    known = {line for d in _stdlib() for line in _long_lines(d)}
    documents: dict[bytes, bytes] = {}  # by digest, in order
    for data in _read_all([Path(p) for _, p in files], 200, 1_000_000):
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in documents or not _is_source(data):
            continue
        lines = _long_lines(data)
        if sum(line in known for line in lines) <= 0.2 * len(lines):
            documents[digest] = data
    return list(documents.values())


def _long_lines(data: bytes) -> list[bytes]:
    return [line for line in map(bytes.strip, data.split(b"\n")) if len(line) >= 24]


def _is_source(data: bytes) -> bool:
    """Return whether it is UTF-8 without NUL: what every tokenizer can read."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def _read_all(paths: list[Path], smallest: int = 0, largest: int | None = None) -> Iterator[bytes]:
    """Yield the contents of files in order, of those with a size in range, read by threads: there may be tens of
    thousands of small ones."""

    def read(path: Path) -> bytes | None:
        try:
            size = path.stat().st_size
            if not path.is_file() or size < smallest or (largest is not None and size > largest):
                return None
            return path.read_bytes()
        except OSError:  # a broken link, a file without permission
            return None

    with ThreadPoolExecutor(16) as pool:
        for data in pool.map(read, paths, chunksize=64):
            if data is not None:
                yield data
