"""What a model's state is made of, counted, one line a model: models.csv stands beside results.csv and is joined to it
by the model's name and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import bound
from rnn_longctx.files import write_atomic
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.plain import csv_text, unguarded

_SHAPE = ("d_model", "n_layer", "d_state", "headdim", "expand")
# Sizes in numbers (not bytes) of one stream; `state_elements` is both parts together. `train_tokens`: read in training;
# `task`: text, or a synthetic one. `most_pairs`: of `bound`.
COLUMNS = (
    *("model", "weights_hash", "shape", "task", "train_length", "train_seed", "train_tokens", "parameters"),
    *("scan_state_elements", "conv_state_elements", "state_elements"),
    *_SHAPE,
    bound.COLUMN,
)
_LATER = {bound.COLUMN}  # older tables lack it
_WORDS = {"model", "weights_hash", "shape", "task"}


def describe(model: LanguageModel, **more: Any) -> dict[str, Any]:
    """The line of a model; a hybrid's attention keys and values are no part of its state. More columns: `more`."""
    fixed = model.state_size().fixed
    scan, conv = fixed.get("scan", 0), fixed.get("conv", 0)
    line = dict.fromkeys(COLUMNS) | {
        "model": model.name,
        "weights_hash": model.weights_hash,
        "shape": model.name,
        "task": "text",
        "train_length": model.train_length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "scan_state_elements": scan,
        "conv_state_elements": conv,
        "state_elements": scan + conv,
        bound.COLUMN: bound.of_model(model, more.get("task", "text")),
    }
    return line | {c: getattr(model.config, c, None) for c in _SHAPE} | more if hasattr(model, "config") else line


def put(directory: Path, line: Mapping[str, Any]) -> None:
    """Keep a model's line. A cell of a study has one, whatever its weights; checkpoints of one name have one each."""
    name = str(line["model"]).replace("/", "-")
    name = f"{name}@{line['weights_hash']}" if line["train_seed"] is None else name
    folder = directory / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "about.json", json.dumps(line).encode())


def shape_of(directory: Path, model: LanguageModel) -> str:
    """What the line of a checkpoint calls its shape: its name, with its weights where another of that name has a line,
    so that the two are not taken for seeds of one."""
    known = [json.loads(path.read_text()) for path in (directory / "models").glob("*/about.json")]
    others = {line["weights_hash"] for line in known if line["shape"] == model.name}
    return model.name if others <= {model.weights_hash} else f"{model.name}@{model.weights_hash[:6]}"


def gather(directory: Path) -> pd.DataFrame:
    """Write models.csv; return it."""
    lines = [json.loads(path.read_text()) for path in sorted((directory / "models").glob("*/about.json"))]
    frame = pd.DataFrame(lines, columns=list(COLUMNS)).sort_values(["state_elements", "model"], ignore_index=True)
    write_atomic(directory / "models.csv", csv_text(frame).encode())
    return read(directory)


def read(directory: Path) -> pd.DataFrame:
    """models.csv. Raises InputError: it is missing or not such a table."""
    path = directory / "models.csv"
    try:
        frame = pd.read_csv(
            path,
            dtype={c: "str" if c in _WORDS else "Int64" for c in COLUMNS},
            keep_default_na=False,
            na_values={c: "" for c in COLUMNS if c not in _WORDS},
        )
    except FileNotFoundError:
        raise InputError(f"no models.csv in {directory}; measure first (rnn-longctx capacity)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    for column in _WORDS & set(frame):
        frame[column] = frame[column].map(unguarded, na_action="ignore")
    for column in _LATER - set(frame):
        frame[column] = pd.array([pd.NA] * len(frame), dtype="Int64")
    missing = [c for c in COLUMNS if c not in frame]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}")
    return frame
