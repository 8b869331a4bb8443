"""Texts: one run of bytes with a name and a hash, made of documents joined by NUL, and fixed slices of it.

Python's standard library is text to *evaluate* on; the installed packages, without the files that copy the
standard library, are text to *train* on. Both are on every machine.
"""

from __future__ import annotations

import hashlib
import os
import site
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError

GOLDEN = 0.6180339887498949
BLOCK = 1 << 16
SOURCES = 'stdlib, site-packages, builtin, a file, a directory, or "hf:dataset[:split[:column]]"'
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
        """The first 16 hex digits of the SHA-256 of the data: the name's claim, checked."""
        return hashlib.sha256(self.data).hexdigest()[:16]

    def documents(self) -> Iterator[bytes]:
        start = 0
        while start <= len(self.data):
            stop = self.data.find(b"\0", start)
            stop = len(self.data) if stop < 0 else stop
            yield self.data[start:stop]
            start = stop + 1

    def start(self, i: int) -> int:
        """Where slice `i` starts: a golden-ratio sequence (evenly spread for every number of slices), moved
        forward to the start of a UTF-8 character."""
        at = int(len(self.data) * ((0.5 + i * GOLDEN) % 1.0))
        for step in range(4):  # a UTF-8 character has at most three continuation bytes
            if at + step == len(self.data) or self.data[at + step] & 0xC0 != 0x80:
                return at + step
        return at

    def slice(self, i: int, nbytes: int) -> bytes:
        """The i-th fixed slice, `nbytes` long. Reading is circular (NUL between the end and the beginning),
        so that where a slice starts depends on `i` and the text alone. More than there is: InputError."""
        if nbytes > len(self.data):
            raise InputError(f"text {self.name} has {len(self.data)} bytes; a slice of {nbytes} was asked for")
        start = self.start(i)
        head = self.data[start : start + nbytes]
        return head if len(head) == nbytes else (head + b"\0" + self.data[: nbytes - len(head)])[:nbytes]


def tokens(text: Text, tokenizer: Tokenizer, i: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `n` tokens of slice `i` and the bytes each stands for: two int64 arrays of shape (n,).

    The text is encoded in blocks cut at fixed places, so asking for more tokens never changes the earlier
    ones. Raises InputError, saying how many tokens there are, when the text is too short.
    """
    if tokenizer.name == "bytes":
        return tokenizer.encode_with_bytes(text.slice(i, n))
    ring = text.slice(i, len(text))
    ring = ring[: _whole(ring, len(ring))]
    ids: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    have = position = 0
    while have < n and position < len(ring):
        stop = _cut(ring, position)
        new_ids, new_sizes = tokenizer.encode_with_bytes(ring[position:stop])
        ids.append(new_ids)
        sizes.append(new_sizes)
        have, position = have + len(new_ids), stop
    if have < n:
        raise InputError(f"text {text.name} has {have} tokens ({tokenizer.name}) in slice {i}; {n} were asked for")
    return np.concatenate(ids)[:n], np.concatenate(sizes)[:n]


def load_text(spec: str | Path) -> Text:
    """A text by name: ``stdlib``, ``site-packages``, ``builtin``, a file, a directory,
    ``hf:dataset[:split[:column]]``.

    stdlib         the standard library's .py files, without tests; to evaluate on
    site-packages  installed packages' .py files, less copies of stdlib code and this package; to train on
    builtin        this package's own source, on every machine; to calibrate on where nothing is named
    file           its bytes as they are, one document
    directory      its regular text files, recursively, sorted, less hidden files and those with NUL bytes
    hf:            rows of a Hugging Face data set (the `datasets` package; a local directory works too)

    Raises InputError when it is missing or empty.
    """
    name = str(spec)
    if name == "stdlib":
        text = Text(name, b"\0".join(_stdlib()))
    elif name == "site-packages":
        text = Text(name, b"\0".join(_site_packages()))
    elif name == "builtin":
        root = Path(__file__).parents[1]
        text = Text(name, b"\0".join(_read_all([root / n for n in _walk(root, ".py", _TESTS)])))
    elif name.startswith("hf:"):
        text = _load_hf(name)
    else:
        path = Path(name.removeprefix("file:").removeprefix("dir:")).expanduser()
        if path.is_dir():
            documents = [d for d in _read_all([path / p for p in _walk(path)]) if d and b"\0" not in d]
            text = Text(f"dir:{path.resolve().name}", b"\0".join(documents))
        elif path.is_file():
            text = Text(f"file:{path.name}", _read(path))
        else:
            raise InputError(f"no text at {name}; expected {SOURCES}")
    if not text.data:
        raise InputError(f"text {text.name} is empty")
    return text


def _cut(data: bytes, position: int) -> int:
    """End of the block from `position`: after the first newline at least 64 KiB on, else about there."""
    if position + BLOCK >= len(data):
        return len(data)
    newline = data.find(b"\n", position + BLOCK, position + 2 * BLOCK)
    return newline + 1 if newline >= 0 else _whole(data, position + BLOCK)


def _whole(data: bytes, stop: int) -> int:
    """`stop`, or the start of the UTF-8 character that a cut there would split."""
    for back in range(1, min(3, stop) + 1):
        lead = data[stop - back]
        if lead & 0xC0 != 0x80:
            size = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
            return stop - back if size > back else stop
    return stop


def _stdlib() -> list[bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata holds this machine's paths and compiler flags: not source, and it would change the hash.
    names = [n for n in _walk(root, ".py", _TESTS) if not n.startswith("_sysconfigdata")]
    return [d for d in _read_all([root / n for n in names]) if d and _is_source(d)]


def _site_packages() -> list[bytes]:
    """Sorted by path inside site-packages; files of 200 bytes to 1 MB, no two alike, at most 20% of their
    longer lines (24 characters and more, stripped) found in the standard library: what copies it would leak
    into training."""
    paths = sysconfig.get_paths()
    roots = {Path(p).resolve() for p in (paths["purelib"], paths["platlib"], *site.getsitepackages())}
    skip = {"__pycache__", "rnn_longctx"}
    found = sorted((name, str(root / name)) for root in roots if root.is_dir() for name in _walk(root, ".py", skip))
    found = [(name, path) for name, path in found if not name.startswith("__editable__")]  # holds this machine's paths
    known = {line for d in _stdlib() for line in _long_lines(d)}
    documents: dict[bytes, bytes] = {}  # by digest, in order
    for data in _read_all([Path(p) for _, p in found], 200, 1_000_000):
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
    """UTF-8 without NUL: what every tokenizer can read."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def _walk(root: Path, suffix: str = "", skip: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """Names of the regular files below `root`, relative to it, with "/", sorted; hidden ones left out."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        inside = Path(folder).relative_to(root)
        names += [(inside / f).as_posix() for f in files if f.endswith(suffix) and not f.startswith(".")]
    return sorted(names)


def _read_all(paths: list[Path], smallest: int = 0, largest: int | None = None) -> Iterator[bytes]:
    """File contents in order, of those with a size in range, read by threads: tens of thousands of small
    files."""

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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read text {path}: {error.strerror}") from None


def _load_hf(spec: str) -> Text:
    """``hf:dataset[:split[:column]]``, split train and column text when not given."""
    dataset, split, column = [*spec.split(":")[1:], "", "", ""][:3]
    split, column = split or "train", column or "text"
    try:
        import datasets
    except ImportError:
        raise InputError(f"text {spec} needs the datasets package: pip install rnn-longctx[train]") from None
    try:
        rows = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # datasets and its hub client raise many kinds
        raise InputError(f"cannot load text {spec}: {' '.join(str(error).split())[:200]}") from None
    if column not in rows.column_names:
        raise InputError(f"text {spec}: no column {column!r} (columns: {', '.join(rows.column_names)})")
    name = Path(dataset).resolve().name if Path(dataset).exists() else dataset
    documents = (str(row).encode().replace(b"\0", b"") for row in rows[column])
    return Text(f"hf:{name}:{split}:{column}", b"\0".join(d for d in documents if d))
