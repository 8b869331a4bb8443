"""Where the answers of a task come from in a sparse model: whether each head keeps the tokens that say them, and
whether they are within LongNet's reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.files import write_atomic
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.plain import csv_text
from rnn_longctx.probes.links import held, links, positions, sparse_layers
from rnn_longctx.probes.reach import longnet_layers, reach
from rnn_longctx.tasks.base import Example, Task

NEITHER = "has no layer whose links could be shown (block-sparse, two-stage or longnet): it reads all, or keeps a state"


@dataclass(frozen=True)
class Explained:
    """What query tokens read. Of a text there is one example, 0.

    Attributes:
        links: of `rnn_longctx.probes.links.links`, with a column example before it, and of a task source behind it,
            whether the stretch holds one; None where no layer is sparse.
        held: of `rnn_longctx.probes.links.held`, too; None of a text.
        reach: of `rnn_longctx.probes.reach.reach`, too; None where no layer is LongNet's.
        drawn: queries of example 0 to draw: of a text all, of a task the first that has sources.
        sources: of that one, the tokens that say what to answer; () of a text.
    """

    links: pd.DataFrame | None
    held: pd.DataFrame | None
    reach: pd.DataFrame | None
    drawn: tuple[int, ...]
    sources: tuple[int, ...] = ()

    @property
    def shares(self) -> pd.DataFrame | None:
        """A row a layer and head: held, the share of the queries for which a source is read, chance, and queries."""
        if self.held is None:
            return None
        groups = self.held.groupby(["layer", "head"])
        return groups.agg(held=("held", "mean"), chance=("chance", "mean"), queries=("held", "size")).reset_index()

    @property
    def reaches(self) -> pd.DataFrame | None:
        """A row a layer of LongNet: reach and tokens, means over the queries; of a task within, the share of them for
        which a source is reached; queries."""
        if self.reach is None:
            return None
        means = {name: (name, "mean") for name in ("reach", "tokens", "within") if name in self.reach}
        return self.reach.groupby("layer").agg(**means, queries=("reach", "size")).reset_index()

    def save(self, directory: str | Path) -> list[Path]:
        """Write links.csv, held.csv, shares.csv and reach.csv, those that there are; return their paths."""
        out = home_path(directory)
        out.mkdir(parents=True, exist_ok=True)
        tables = {"links": self.links, "held": self.held, "shares": self.shares, "reach": self.reach}
        there = {out / f"{name}.csv": table for name, table in tables.items() if table is not None}
        for path, table in there.items():
            write_atomic(path, csv_text(table).encode())
        return list(there)


def explain_text(model: LanguageModel, ids: np.ndarray, at: list[int] | None = None) -> Explained:
    """Return what query tokens of ids (T) read; at: their positions, None for the last. Raises InputError: a model with
    no layer to explain, positions out of range."""
    queries = positions(at, len(ids))
    sparse, longnet = _kinds(model)
    table = _of(0, links(model, torch.from_numpy(ids), queries)) if sparse else None
    return Explained(table, None, _of(0, reach(model, queries)) if longnet else None, tuple(queries))


def explain_task(model: LanguageModel, task: Task, length: int, n: int = 20, seed: int = 0) -> Explained:
    """Return what the tokens before the answers of `n` examples read, after the true answers before them.

    Raises InputError: a model with no layer to explain, a task that names no sources or has more ids than the model,
        a length that it does not fit into.
    """
    sparse, longnet = _kinds(model)
    if n < 1:
        raise InputError(f"expected at least 1 example, got n = {n}")
    if task.vocab_size is not None and task.vocab_size > model.vocab_size:
        ids = f"{task.vocab_size} ids, more than the vocabulary of {model.name}, {model.vocab_size}"
        raise InputError(f"{task.name} has {ids}")
    tables: dict[str, list[pd.DataFrame]] = {"links": [], "held": [], "reach": []}
    first: dict[int, tuple[int, ...]] = {}
    for i in range(n):
        example = task.example(length, i, n, task.generator(seed, length, i), model.tokenizer)
        sources = sources_of(task, example)
        first = first or sources
        if sparse:
            table = links(model, torch.from_numpy(example.ids), sources)
            stretches = zip(table["query"], table["start"], table["stop"])
            table["source"] = [any(start <= t < stop for t in sources[query]) for query, start, stop in stretches]
            tables["links"].append(_of(i, table))
            tables["held"].append(_of(i, held(table, sources)))
        if longnet:
            tables["reach"].append(_of(i, reach(model, sources, sources)))
    joined = {name: pd.concat(some, ignore_index=True) if some else None for name, some in tables.items()}
    query = min(first)
    return Explained(**joined, drawn=(query,), sources=first[query])


def sources_of(task: Task, example: Example) -> dict[int, tuple[int, ...]]:
    """Return, of each token before an answer, the tokens that say the answer, where there are any. Raises InputError
    where the task names none."""
    queries = (np.flatnonzero(example.answers) - 1).tolist()
    if sources := {query: tokens for query, tokens in zip(queries, example.sources) if tokens}:
        return sources
    raise InputError(f"{task.name} does not say which tokens its answers come from (`Example.sources`)")


def _kinds(model: LanguageModel) -> tuple[bool, bool]:
    kinds = bool(sparse_layers(model)), bool(longnet_layers(model))
    if not any(kinds):
        raise InputError(f"{model.name} {NEITHER}")
    return kinds


def _of(example: int, table: pd.DataFrame) -> pd.DataFrame:
    table.insert(0, "example", example)
    return table
