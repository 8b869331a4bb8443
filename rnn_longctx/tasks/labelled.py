"""Texts with labels from a file: classification, such as the tasks of Long Range Arena (arXiv 2011.04006).

The file is a table, tab-separated where its name ends in .tsv and else comma-separated, whose first line names the
columns: `text` and `label`, or `Source` and `Target` as LRA's own files of ListOps have it. An example is a row that is
drawn: a text, then "Label:", then its label. Of a text that is too long the first tokens are read, as in LRA; newlines
stand before one that is too short. Train on one file, and measure on another.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from rnn_longctx.config import home_path
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.tasks.base import TASKS, Example, Task, TooShort
from rnn_longctx.tasks.prompts import piece, reply_to

QUESTION = "\nLabel:"
COLUMNS = {"text": "text", "source": "text", "label": "label", "target": "label"}


@TASKS.register
@dataclass(frozen=True)
class Labelled(Task):
    """file: a table of texts and labels."""

    name = "labelled"
    examples = (f"labelled:file={Path(__file__).with_name('labelled.tsv')}",)

    file: str

    def __post_init__(self) -> None:
        self.table  # noqa: B018 (is read when made)

    @property
    def table(self) -> Table:
        path = home_path(self.file)
        try:
            return _read(path, path.stat().st_mtime_ns)
        except OSError as error:
            raise InputError(f"{self.name}: cannot read {self.file}: {error.strerror or error}") from None

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        table = self.table
        row = int(rng.integers(len(table.texts)))
        question = piece(tokenizer, table.texts[row][-20:], QUESTION)
        reply = reply_to(tokenizer, QUESTION, table.labels[row])
        room = length - len(question) - len(reply)
        if room < 1:
            raise TooShort(f"a text of {self.file} with its label", length - room + 1, length)
        text = tokenizer.encode(table.texts[row])[:room]
        before = np.resize(tokenizer.encode("\n"), room - len(text))
        answers = np.arange(length) >= length - len(reply)
        return Example(np.concatenate([before, text, question, reply]), answers, about={"tokens": len(text)})

    @property
    def chance(self) -> float:
        return 1 / len({*self.table.labels})

    @property
    def label(self) -> str:
        return f"{self.name}-{Path(self.file).stem}"

    @property
    def text(self) -> str:
        return f"{Path(self.file).stem} {self.table.digest}"


@dataclass(frozen=True)
class Table:
    """What a file holds; digest: of its bytes, shortened."""

    texts: list[str]
    labels: list[str]
    digest: str


@lru_cache(16)
def _read(path: Path, changed: int) -> Table:
    """Read a table; `changed` makes one that has changed another."""
    import pandas as pd

    data = path.read_bytes()
    try:
        separator = "\t" if path.suffix == ".tsv" else ","
        frame = pd.read_csv(io.BytesIO(data), sep=separator, dtype=str, keep_default_na=False)
    except ValueError as error:  # of pandas's parser and of bytes that are no UTF-8 alike
        raise InputError(f"{path.name} is no table: {one_line(error)}") from None
    names = {COLUMNS[name.lower()]: name for name in map(str, frame.columns) if name.lower() in COLUMNS}
    if set(names) != {"text", "label"}:
        raise InputError(f"{path.name}: expected columns text and label, got {', '.join(map(str, frame.columns)):.80}")
    labels = [label.strip() for label in frame[names["label"]]]
    if not labels or not all(labels):
        raise InputError(f"{path.name}: expected rows that all have a label")
    return Table(frame[names["text"]].tolist(), labels, hashlib.sha256(data).hexdigest()[:16])
