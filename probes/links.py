"""Which links a sparse model kept: what each head of a layer reads for a query token, and whether that holds the token
that says the answer.

A layer that chooses what it reads (`rnn_longctx.models.sparse`: block-sparse, two-stage) says so itself, for one token:
the context is read in segments, a query token in a call of its own, and the layer is asked as it is called. Results are
what they are without that, and the memory is that of a segment, of the model's cache and of the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.ids import rows_of
from rnn_longctx.models.interface import LanguageModel, Mixer
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.segments import SEGMENT
from rnn_longctx.models.sparse import SparseAttention

KINDS = ("sink", "chosen", "window")
COLUMNS = ["layer", "head", "query", "kind", "start", "stop", "score"]


def mixers_of(model: LanguageModel) -> list[Mixer]:
    """Return the mixers of all layers of this library's own model, in order; of an adopted one none."""
    return [layer.mixer for layer in getattr(model, "layers", [])]


def sparse_layers(model: LanguageModel) -> dict[int, SparseAttention]:
    """Return the layers that choose what they read, by their places among all layers, from 0 on; of a retrofitted
    decoder what took over heads of its layers."""
    mixers: list[tuple[int, Any]] = list(enumerate(mixers_of(model)))
    mixers += [
        (attention.layer_idx, part) for attention in getattr(model, "retrofitted", ()) for part in attention.parts
    ]
    return {i: mixer for i, mixer in mixers if isinstance(mixer, SparseAttention)}


@torch.no_grad()
@in_evaluation
def links(model: Any, ids: Tensor, at: Iterable[int] | None = None, *, segment: int = SEGMENT) -> pd.DataFrame:
    """Return what every head of the sparse layers reads for query tokens.

    Args:
        ids: (1, T) or (T).
        at: positions of the query tokens, counted from 0; None is the last.
        segment: tokens read at once, between queries.
    Returns: a row a stretch of tokens that is read, [start, stop): columns layer (of all layers, from 0 on), head,
        query, kind ("sink", "chosen", "window"), start, stop and score (of chosen blocks, the best first).
    Raises: InputError: a model without such layers or with a control or reader on, ids or positions out of range.
    """
    lm: LanguageModel = as_language_model(model)
    if not sparse_layers(lm):
        raise InputError(f"{lm.name} has no layer that chooses what it reads (block-sparse or two-stage)")
    if lm.restart is not None or lm.reader is not None:
        raise InputError("links are those of tokens read one after the other: take the control or reader off")
    ids = rows_of(ids)
    if len(ids) != 1:
        raise InputError(f"links are those of one row of ids (1, T), got shape {tuple(ids.shape)}")
    queries = positions(at, ids.shape[1])
    if segment < 1:
        raise InputError(f"segment: expected at least 1 token, got {segment}")
    return links_of_rows(lm, ids, queries, segment)


def links_of_rows(lm: LanguageModel, inputs: Tensor, queries: list[int], segment: int = SEGMENT) -> pd.DataFrame:
    """Return what `links` does, of what the layers read whatever it is: inputs (1, T, ...), token ids or rows of
    numbers. queries: positions in order."""
    layers, rows = sparse_layers(lm), list[tuple]()
    cache, at_queries = lm.new_cache(), set(queries)
    cuts = sorted({*range(0, queries[-1], segment), *queries, *(query + 1 for query in queries)})
    for start, stop in pairwise(cuts):
        with ExitStack() as looking:
            if start in at_queries:
                for layer, mixer in layers.items():
                    looking.enter_context(_looking(mixer, layer, start, rows))
            lm(inputs[:, start:stop].to(lm.device), cache)
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["layer", "head", "query"], kind="stable", ignore_index=True)


def positions(at: Iterable[int] | None, length: int) -> list[int]:
    """Return query positions in order, the last token where there are none. Raises InputError for others."""
    queries = [length - 1] if at is None else sorted({int(query) for query in at})
    if not queries or not 0 <= queries[0] <= queries[-1] < length:
        raise InputError(f"query tokens: expected positions from 0 to {length - 1}, got {queries}")
    return queries


@contextmanager
def _looking(mixer: SparseAttention, layer: int, query: int, rows: list[tuple]) -> Iterator[None]:
    """Add to rows what the mixer reads for the one token that it is called with inside the block."""

    def look(module: torch.nn.Module, call: tuple[Any, ...]) -> None:
        kept = mixer.kept(*call)
        size, window = mixer.config.block, mixer.config.window
        near = max(0, (query // size - window // size + 1) * size)
        blocks, scores = (x[0, :, 0].tolist() for x in (kept.blocks, kept.scores))
        for head, numbers, values in zip(mixer.head_numbers, blocks, scores):
            for n, score in zip(numbers, values):
                if n >= 0:
                    kind, score = ("sink", float("nan")) if n < mixer.sinks else ("chosen", score)
                    rows.append((layer, head, query, kind, n * size, (n + 1) * size, score))
            rows.append((layer, head, query, "window", near, query + 1, float("nan")))

    handle = mixer.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def held(table: pd.DataFrame, sources: Mapping[int, Sequence[int]]) -> pd.DataFrame:
    """Return whether what a head reads for a query holds a source.

    Args: table: of `links`; sources: of each query, the tokens that say what to answer, any of which will do.
    Returns: a row a layer, head and query of `sources`: held, and chance, the share of the places up to the query at
        which sources as far apart would be held. Of one source that is the share of the tokens that are read.
    """
    rows = []
    for query, tokens in sources.items():
        for (layer, head), read in table[table["query"] == query].groupby(["layer", "head"]):
            stretches = list(zip(read["start"].tolist(), read["stop"].tolist()))
            holds = any(start <= token < stop for start, stop in stretches for token in tokens)
            rows.append((layer, head, query, holds, _chance(stretches, tokens, query)))
    return pd.DataFrame(rows, columns=["layer", "head", "query", "held", "chance"])


def _chance(stretches: list[tuple[int, int]], sources: Sequence[int], query: int) -> float:
    """Return in which share of the places that sources may be moved to, all by as much, a stretch holds one of them."""
    first, last = -min(sources), query - max(sources)  # how far they may be moved
    moves = sorted((start - token, stop - 1 - token) for start, stop in stretches for token in sources)
    count, after = 0, first
    for low, high in moves:
        low, high = max(low, after), min(high, last)
        if low <= high:
            count, after = count + high - low + 1, high + 1
    return count / (last - first + 1)
