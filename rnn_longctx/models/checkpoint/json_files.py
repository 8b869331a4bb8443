"""JSON as a checkpoint's files hold it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rnn_longctx.errors import InputError, one_line


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as JSON: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def write_json(path: Path, data: dict[str, Any], indent: int | None = 1) -> None:
    """Write strict JSON: see `plain`."""
    path.write_text(json.dumps(plain(data), indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a value fit for strict JSON, which has no infinity and no NaN: they become strings, and so do paths."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
