"""Snapshots of a run that survive ``kill -9``: written aside, renamed when complete (`rnn_longctx.files`), the newest
two kept.

A run folder belongs to one config. ``log.csv`` is cut back to the snapshot that a run resumes from.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from rnn_longctx.errors import InputError
from rnn_longctx.files import replacing, write_atomic
from rnn_longctx.plain import guarded
from rnn_longctx.progress import Say, to_stdout

COLUMNS = [
    "step",
    "tokens",
    "loss",
    "passkey_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "seconds",
    "length",
    "state_norm",
    "state_norm_max",
]
KEEP = 2
csv.field_size_limit(2**31 - 1)  # a row of online.csv names all of an update's files


def save_snapshot(folder: Path, step: int, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"step-{step:08d}.pt") as aside, aside.open("wb") as file:
        torch.save(state, file)  # by Python's own writing, whose errors say why
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()


def newest_snapshot(folder: Path, device: torch.device | str = "cpu", say: Say = to_stdout) -> dict[str, Any] | None:
    """The newest snapshot that can be read; None without one. A damaged file (a full disk, say) is passed
    over."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch.load raises many kinds on a damaged file
            say(f"{path} cannot be read ({type(error).__name__}); trying an older one")
    return None


def claim_folder(out: Path, config: dict[str, Any], begun: Sequence[str] = ("log.csv", "online.csv")) -> None:
    """Record `config` in `out`, or check that it is the one recorded there. Another one: InputError, unless that run
    never began (no text was found, say): nothing of `begun` is in the folder."""
    file = out / "run.json"
    config = json.loads(json.dumps(config))
    if file.is_file() and any((out / name).exists() for name in begun):
        if difference := changed(json.loads(file.read_text()), config):
            raise InputError(f"{out} holds a run of another config ({difference}); set another out, or remove it")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot write to {out}: {error.strerror}") from None
    write_atomic(file, json.dumps(config, indent=1).encode())


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Inside, no other process trains in the folder: two would write one log, and remove each other's snapshots. What a
    killed one left half written, each time as large as the whole, is removed. Raises InputError where another is at
    work."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"out: another process trains in {out}; set another out, or wait for it") from None
    except (OSError, NotImplementedError):  # a file system that has no locks
        yield
        return
    try:
        for left in [p for folder in (out, out / "snapshots", out / "steps") for p in folder.glob(".*.tmp")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        lock.release()


class Log:
    """A CSV file by steps, its first column: rows up to `step` of an earlier process are kept, later ones (and a torn
    last line) dropped.

    `missing`: values of columns that an older version did not write. Accuracies that it wrote as `passkey` go on as
    `passkey_accuracy`.
    """

    def __init__(self, path: Path, step: int, columns: Sequence[str] = COLUMNS, **missing: object):
        self.columns, rows_before = columns, []
        if path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                head, *rows = [*csv.reader(file)] or [[]]
            head = [re.sub(r"^passkey(?=$|_\d+$)", "passkey_accuracy", name) for name in head]
            records = [dict(zip(head, row)) for row in rows if len(row) == len(head) and row[0].isdigit()]
            records = [record for record in records if int(record[columns[0]]) <= step]
            rows_before = [[str((missing | record)[c]) for c in columns] for record in records]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows_before])
        write_atomic(path, text.getvalue().encode())
        self._path, self._file = path, path.open("a", newline="", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Raises InputError where there is no room, say; a torn row is dropped by whoever goes on."""
        try:
            csv.writer(self._file, lineterminator="\n").writerow([_short(row[c]) for c in self.columns])
            self._file.flush()
        except OSError as error:
            why = f"{error.strerror}; what was there before is untouched"
            raise InputError(f"cannot write {self._path}: {why}") from None

    def close(self) -> None:
        with suppress(OSError):  # the last row once more, which could not be written
            self._file.close()


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else guarded(str(value)) if isinstance(value, str) else str(value)


def changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the first setting that differs between two configs, in words, or nothing. What an older version did not
    write is what is off now: False, 0, null or empty."""
    old, new = _flat(before), _flat(now)
    for key in sorted({*old, *new}):
        was, is_ = old.get(key), new.get(key)
        if was != is_ if key in old and key in new else was or is_:
            return f"{key} was {was}, is {is_}"
    return ""


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings by their dotted names; a list of settings is counted through, any other is one value."""
    if isinstance(tree, list) and tree and all(isinstance(child, dict) for child in tree):
        entries = {str(i): child for i, child in enumerate(tree)}
        return {prefix: f"a list of {len(tree)}"} | _flat(entries, prefix)
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, child in tree.items() for k, v in _flat(child, f"{prefix}.{name}".strip(".")).items()}
