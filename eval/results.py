"""Results are tables: one row a cell, one small file a cell, gathered into results.parquet and results.csv.

A cell's file appears by atomic rename, as soon as its value is known, and carries a checksum: a run that is
killed starts again where it stopped, and a file that is torn or was edited by hand is never taken for a
result, only recomputed. Layout of a results directory:

    cells/<sha256 of the key>.json      one row each
    snapshots/<name>                    carries of an unfinished stream, to resume it
    claims/<name>                       what one of several ranks measures now, or tried in vain (`eval.claims`)
    results.parquet, results.csv        what plots and reports read
    runs.jsonl                          a line a command that measured something: itself, versions, device
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rnn_longctx.config import counted, home_path
from rnn_longctx.errors import InputError
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text, plain, unguarded

# What makes two cells different. `length` in tokens; `depth` a fraction, None for all depths together; `state_dtype`
# what the recurrent state is rounded to between calls, None for the scan's own float32 (float64 under float64);
# `plugins` a hash of the source of all plugins that were loaded, None for none.
KEY = (
    *("model", "weights_hash", "mitigation", "calibration", "task", "text", "text_hash", "tokenizer"),
    *("length", "depth", "metric", "batch", "dtype", "backend", "device", "seed", "state_dtype", "plugins"),
)
# Columns that older tables lack: None in their rows, and no part of a key where they are None.
_LATER = {"state_dtype", "tokens_read", "plugins", "chance"}
# What was measured. `samples`: one float per slice or prompt, in the order of the slices, so that two rows on
# the same text pair by position. Times in seconds, `train_length` in tokens, and so `tokens_read`: of each slice or
# prompt, the mean over them, whatever of it a remedy or control reads again or leaves out. `chance`: what a guess
# would score.
VALUE = (
    *("value", "stderr", "n", "samples", "train_length", "seconds", "tokens_per_second"),
    *("first_token_seconds", "next_token_seconds", "peak_bytes", "version", "tokens_read", "chance"),
)
COLUMNS = KEY + VALUE
_INTS = {"length", "batch", "seed", "n", "train_length", "peak_bytes", "tokens_read"}
_FLOATS = {"depth", *VALUE} - _INTS - {"samples", "version"}
RUNS = "runs.jsonl"
_STALE = 3600.0  # seconds after which a temporary file can only be a killed run's

Row = dict[str, Any]


class Results:
    """The rows of one results directory. Two processes may write to the same one."""

    def __init__(self, directory: str | Path) -> None:
        """Create `directory`. InputError at once, and not after an hour, if no file can be written there."""
        self.directory = home_path(directory)
        self._cells = self.directory / "cells"
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
            for folder in (self.directory, self._cells):
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(b"probe")
                    probe.flush()
                    os.fsync(probe.fileno())
        except OSError as error:
            raise InputError(f"cannot write results to {directory}: {error.strerror or error}") from None
        for left in [p for folder in (".", "cells", "snapshots") for p in (self.directory / folder).glob(".*.tmp")]:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()

    def get(self, key: Mapping[str, Any]) -> Row | None:
        """The whole row (every column, None where unknown), or None if it is missing, torn or edited. Key columns that
        are not given count as None."""
        return _read_cell(self._path(key))

    def put(self, row: Mapping[str, Any]) -> None:
        """Store a row at once; one with the same key is replaced. ValueError: no such column, wrong kind. InputError:
        it cannot be written."""
        clean = _clean(row)
        stored = {"checksum": _checksum(clean), "row": clean}
        write_atomic(self._path(row), json.dumps(stored).encode())

    def rows(self) -> list[Row]:
        """All sound rows, in the order of their keys (None first)."""
        rows = []
        for path in self._cells.glob("[!.]*.json"):
            row = _read_cell(path)
            if row is None:
                logging.getLogger(__name__).warning("%s is torn or was edited; it is not used", path)
            else:
                rows.append(row)
        return sorted(rows, key=_order)

    def frame(self) -> pd.DataFrame:
        """All sound rows as a table with the columns of COLUMNS, sorted by key."""
        return to_frame(self.rows())

    def gather(self) -> pd.DataFrame:
        """Write results.parquet and results.csv (there `samples` is JSON text); return the table."""
        frame = self.frame()
        parquet = io.BytesIO()
        frame.to_parquet(parquet, index=False)
        write_atomic(self.directory / "results.parquet", parquet.getvalue())
        texts = frame["samples"].map(lambda s: None if s is None else json.dumps(s))
        csv = csv_text(frame.assign(samples=texts))
        write_atomic(self.directory / "results.csv", csv.encode())
        return frame

    def note_run(self, about: Mapping[str, str]) -> None:
        """Append to runs.jsonl what a command was, and under which versions it ran; a repetition once."""
        line = json.dumps(dict(about)) + "\n"
        path = self.directory / RUNS
        before = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if line not in before:
            write_atomic(path, "".join([*before, line]).encode())

    def snapshot_path(self, name: str) -> Path:
        """Where the carries of an unfinished stream are kept; the folder exists after the call."""
        folder = self.directory / "snapshots"
        folder.mkdir(exist_ok=True)
        return folder / name

    def forget_snapshots(self, prefix: str) -> None:
        """Remove the snapshots whose names begin so: their stream is finished."""
        for path in (self.directory / "snapshots").glob(f"{prefix}*"):
            path.unlink(missing_ok=True)

    def relabel(self, model: str, weights_hash: str, train_length: int | None, before: str) -> None:
        """Give a model's stored rows its training length, and its name where an older version called it `before`: what
        was measured depends on the length through a calibration alone, which is in the key with the length that it is
        of, and not on the name."""
        model, before, renamed = plain(model), plain(before), 0
        for row in self.rows():
            if row["weights_hash"] != weights_hash or row["model"] not in (model, before):
                continue
            new = row | {"model": model, "train_length": train_length}
            if row["model"] == model and row != new:
                self.put(new)
            elif row["model"] == before != model and self.get(new) is None:
                self.put(new)
                self._path(row).unlink(missing_ok=True)
                renamed += 1
        if renamed:
            cells = counted(renamed, "cell")
            logging.getLogger(__name__).warning(
                "%s: %s of this model are now filed under its name, %s; they were under %s",
                *(self.directory, cells, model, before),
            )

    @staticmethod
    def read(directory: str | Path) -> pd.DataFrame:
        """The gathered table alone: results.parquet, else results.csv. InputError if neither can be read."""
        directory = home_path(directory)
        parquet, csv = directory / "results.parquet", directory / "results.csv"
        path = parquet if parquet.exists() else csv
        try:
            if path == parquet:
                records = pd.read_parquet(path).to_dict("records")
            else:
                records = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
                records = [{c: _parse(str(c), v) for c, v in record.items()} for record in records]
            return to_frame(_clean({str(c): v for c, v in record.items()}) for record in records)
        except FileNotFoundError:
            none = "there is no folder" if not directory.is_dir() else "no results.parquet or results.csv in"
            raise InputError(f"{none} {directory}; evaluate first") from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self._cells / f"{_cell_id(_clean(key))}.json"


def canonical_key(key: Mapping[str, Any]) -> str:
    """The key columns as JSON text; equal for equal keys alone (a depth of 0 is 0.0, one of NaN is None)."""
    clean = _clean(key)
    return json.dumps([clean[c] for c in KEY if c not in _LATER or clean[c] is not None])


def _cell_id(clean: Row) -> str:
    return hashlib.sha256(canonical_key(clean).encode()).hexdigest()[:32]


def _checksum(clean: Row) -> str:
    # Over the content and not the file's bytes: floats survive JSON exactly, so reformatting is harmless.
    return hashlib.sha256(json.dumps(clean, sort_keys=True).encode()).hexdigest()


def _read_cell(path: Path) -> Row | None:
    try:
        stored = json.loads(path.read_bytes())
        row = stored["row"]
        sound = stored["checksum"] == _checksum(row) and set(row) | _LATER == set(COLUMNS)
        row = dict.fromkeys(COLUMNS) | row
        return row if sound and path.stem == _cell_id(row) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _clean(row: Mapping[str, Any]) -> Row:
    """All columns with plain Python values. ValueError: an unknown column, or a value of the wrong kind."""
    unknown = set(row) - set(COLUMNS)
    if unknown:
        raise ValueError(f"no such column: {', '.join(sorted(unknown))} (columns: {', '.join(COLUMNS)})")
    return {column: _value(column, row.get(column)) for column in COLUMNS}


def _value(column: str, value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    if column == "samples":
        if isinstance(value, float):
            return None
        return [math.nan if v is None else float(v) for v in value]  # Parquet has null for NaN where no list has more
    if column in _FLOATS:
        # A measured NaN is a result (the model blew up); a depth of NaN is how pandas spells "no depth".
        number = float(value)
        return None if column == "depth" and number != number else number + 0.0  # and -0.0 is 0.0
    if isinstance(value, float) and value != value:
        return None
    if column in _INTS:
        if int(value) != value:
            raise ValueError(f"{column} is a whole number, got {value!r}")
        return int(value)
    if not isinstance(value, str):
        raise ValueError(f"{column} is text, got {value!r}")
    return plain(value)  # so that no table holds what steers a terminal


def _parse(column: str, text: str) -> Any:
    """A CSV field, read as text so that floats come back exactly."""
    text = unguarded(text)
    if text == "":
        return None
    if column == "samples":
        return json.loads(text)
    return float(text) if column in _FLOATS else int(text) if column in _INTS else text


def _order(row: Row) -> list[tuple[bool, Any]]:
    return [(row[c] is not None, row[c]) for c in KEY]


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a DataFrame whose types do not depend on where the rows came from, nor on which are there."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS), dtype=object)
    for column in COLUMNS:
        if column in _INTS:
            frame[column] = frame[column].astype("Int64")
        elif column in _FLOATS:
            frame[column] = frame[column].astype("float64")
    return frame
