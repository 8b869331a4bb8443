"""Files that are either what they were or all of what they become, whenever the run is killed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rnn_longctx.errors import InputError, one_line


def write_atomic(path: Path, data: bytes, sync: bool = True) -> None:
    """Write `data` so that `path` holds what it held before or all of `data`. Raises InputError: see `replacing`."""
    with replacing(path, sync) as aside:
        aside.write_bytes(data)


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Give the path of a new file beside `path`, which takes its place when the block ends without an error.

    What is written reaches the disk (fsync) before the rename, so that no crash leaves a file cut short. The new file
    lies in the same directory, since a rename must not cross disks; its name begins with a dot and ends in `.tmp`.

    Args:
        sync: False does not wait for the disk: for a file that is soon rewritten and may be lost in a crash.
    Raises:
        InputError: it cannot be written (no room, no permission); `path` is then what it was.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield aside
        if sync:
            to_disk(aside)
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None and type(error) is not RuntimeError and type(error).__name__ != "SafetensorError":
            raise
        reason = one_line(error) if cause is None else cause.strerror or cause
        raise InputError(f"cannot write {path}: {reason}; what was there before is untouched") from None


def to_disk(path: Path) -> None:
    """Wait until what a file holds is on the disk. Raises OSError where it cannot be written there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _os_error(error: BaseException) -> OSError | None:
    """Return the failure of the disk behind an error, or None: torch.save and safetensors wrap one, or say it in words
    alone."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause
