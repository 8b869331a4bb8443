"""Files of records as documents: JSON Lines (plain, .gz, .bz2, .xz, .zst, .lz4), Parquet, Hugging Face data sets.

A source is a list of shards, its files in order. One record is held at a time: a line, or a few rows of a Parquet file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnn_longctx.config import home_path
from rnn_longctx.data.content import DAMAGED, lines
from rnn_longctx.errors import InputError, one_line

JSONL = (".jsonl", ".ndjson")
PACKED = ("", ".gz", ".bz2", ".xz", ".zst", ".lz4")  # how files of records are named; what packed one its bytes say
SUFFIXES = {"jsonl": tuple(j + p for j in JSONL for p in PACKED), "parquet": (".parquet",)}
ROWS = 64  # of a Parquet file at once: they may be whole books


@dataclass(frozen=True)
class Shard:
    """A part of a source that is read as one.

    Attributes:
        identity: changes with the contents (size and time of the last change).
        read: yields its documents, without NUL, and raises InputError where they cannot be read.
    """

    identity: str
    read: Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Source:
    """Documents that are read as they are needed.

    Attributes:
        name: canonical.
        where: which of all that have the name it is (it may hold a path).
        shards: its files, or what stands for them, in order.
    """

    name: str
    where: str
    shards: list[Shard]

    def documents(self) -> Iterator[bytes]:
        for shard in self.shards:
            yield from shard.read()


def open_source(spec: str) -> Source | None:
    """Return the records that a text's name stands for, or None for a text that is none of records.

    Args:
        spec: ``jsonl:PATH[:field]``, ``parquet:PATH[:column]``, a path with such a suffix or to Parquet, or
            ``hf:dataset[/config][:split[:column]]`` (of the hub, or a local directory, also one of `save_to_disk`).
            Of a directory, its files of the kind are read, recursively, sorted. Field and column are `text` if not
            given.
    Raises:
        InputError: there is no such file, or a data set cannot be opened.
    """
    kind, colon, place = spec.partition(":")
    if kind == "hf" and colon:
        return _hugging_face(spec)
    if not colon or kind not in SUFFIXES:
        kinds = [k for k, suffixes in SUFFIXES.items() if spec.endswith(suffixes)]
        if not kinds and _is_parquet(home_path(spec)):
            kinds = ["parquet"]
        if not kinds or kind in ("file", "dir"):
            return None
        kind, place = kinds[0], spec
    path, field = home_path(place), "text"
    if not path.exists() and ":" in place:
        path, field = home_path(place.rpartition(":")[0]), place.rpartition(":")[2]
    files = [path] if path.is_file() else [path / n for n in walk(path) if n.endswith(SUFFIXES[kind])]
    if not files:
        raise InputError(f"no {kind} files at {path}")
    read = _jsonl if kind == "jsonl" else _parquet
    return Source(
        f"{kind}:{path.resolve().name}:{field}",
        f"{kind}:{path.resolve()}:{field}",
        [Shard(identity([f]), lambda f=f: read(f, field)) for f in files],  # type: ignore[misc]
    )


def walk(root: Path, suffix: str = "", skip: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """Return the names of the files below `root`, relative to it, with "/", sorted; hidden ones are left out."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        inside = Path(folder).relative_to(root)
        names += [(inside / f).as_posix() for f in files if f.endswith(suffix) and not f.startswith(".")]
    return sorted(names)


def identity(files: list[Path]) -> str:
    """Return a hash of the names, sizes and times of the last change of files."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from None
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _document(value: str) -> bytes:
    return value.encode("utf-8", "replace").replace(b"\0", b"")  # JSON may escape half a surrogate pair


def _jsonl(path: Path, field: str) -> Iterator[bytes]:
    number = 0
    try:
        for number, line in enumerate(lines(path), 1):
            if not line.strip():
                continue
            try:
                text = _field(json.loads(line), field)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
            except UnicodeDecodeError:
                raise InputError(f"{path}:{number}: not UTF-8 text") from None
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from None
            if text:
                yield _document(text)
    except (*DAMAGED, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read after line {number} ({one_line(error)})") from None


def _field(record: Any, field: str) -> str | None:
    """Return the text of a record, or None where it is null: no text."""
    if not isinstance(record, dict):
        raise InputError(f"expected an object with the field {field!r}, got {type(record).__name__}")
    if field not in record:
        raise InputError(f"no field {field!r} (fields: {', '.join(map(str, record))})")
    if not isinstance(record[field], str | None):
        raise InputError(f"field {field!r} is {type(record[field]).__name__}, not text")
    return record[field]


def _is_parquet(path: Path) -> bool:
    """Return whether a file begins and ends as Parquet does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1" and file.seek(-4, 2) > 0 and file.read() == b"PAR1"
    except (OSError, ValueError):  # (a name with NUL)
        return False


def _parquet(path: Path, column: str) -> Iterator[bytes]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise InputError(f"{path}: no column {column!r} (columns: {', '.join(schema.names)})")
            kind = schema.field(column).type
            value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind  # a category of pandas' or Polars'
            if str(value) not in ("string", "large_string", "string_view"):  # (the last is new in pyarrow 16)
                raise InputError(f"{path}: column {column!r} is {kind}, not text")
            for batch in file.iter_batches(ROWS, columns=[column]):
                yield from (_document(text) for text in batch.column(0).to_pylist() if text)
                row += len(batch)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read after row {row} ({one_line(error)})") from None


def _hugging_face(spec: str) -> Source:
    """Return a data set of the hub or of a local directory, whose rows come as they are read."""
    dataset, split, column = [*spec.split(":")[1:], "", "", ""][:3]
    split, column = split or "train", column or "text"
    try:
        import datasets
    except ImportError:
        raise InputError(f"text {spec} needs the datasets package: pip install rnn-longctx[train]") from None
    config: list[str] = []
    above, _, last = dataset.rpartition("/")
    # a README.md says which configurations a directory has; without one, owner/name is the hub's
    if not Path(dataset).exists() and (dataset.count("/") == 2 or (above and (Path(above) / "README.md").is_file())):
        dataset, config = above, [last]
    try:
        if _saved(Path(dataset)):
            rows = _from_disk(datasets, dataset, split)
        else:
            rows = datasets.load_dataset(dataset, *config, split=split, streaming=True)
        names = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # datasets and its hub client raise many kinds
        raise InputError(f"cannot load text {spec}: {one_line(error)}") from None
    if column not in names:
        raise InputError(f"text {spec}: no column {column!r} (columns: {', '.join(names)})")

    def read(i: int) -> Iterator[bytes]:
        good = 0
        try:
            for row in rows.shard(rows.num_shards, i):
                if text := _field(row, column):
                    yield _document(text)
                good += 1
        except Exception as error:
            where = f"text {spec}: shard {i + 1} of {rows.num_shards}"
            raise InputError(f"{where} cannot be read after row {good} ({one_line(error)})") from None

    local = Path(dataset).exists()
    name, where = (Path(dataset).resolve().name, str(Path(dataset).resolve())) if local else (dataset, dataset)
    name, where = "/".join([name, *config]), "/".join([where, *config])
    files = identity([Path(dataset) / n for n in walk(Path(dataset))]) if local else ""
    shards = [Shard(f"{files} {i + 1}/{rows.num_shards}", lambda i=i: read(i)) for i in range(rows.num_shards)]  # type: ignore[misc]
    return Source(f"hf:{name}:{split}:{column}", f"hf:{where}:{split}:{column}", shards)


def _saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder, which `load_dataset` does not read."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _from_disk(datasets: Any, folder: str, split: str) -> Any:
    """Return a split of what `save_to_disk` wrote, a shard a file. A split that was saved alone may have no name, and
    is then any."""
    saved = datasets.load_from_disk(folder)
    splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
    if split not in splits:
        raise InputError(f"no split {split!r} (splits: {', '.join(splits)})")
    rows = splits[split]
    return rows.to_iterable_dataset(num_shards=max(1, min(len(rows.cache_files), len(rows))))
