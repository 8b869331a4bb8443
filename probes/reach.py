"""The reach of LongNet's layers: from which tokens information may have come to a query token, layer by layer.

It follows from the patterns alone (`rnn_longctx.models.mixers.dilated`), and no weight: nothing is read. Which token a
layer reads is traced back from the query through that layer and all below it. A layer of another kind may bring
information from any token, and is taken to do so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.mixers.longnet import LongNet
from rnn_longctx.probes.links import mixers_of


def longnet_layers(model: LanguageModel) -> dict[int, LongNet]:
    """Return LongNet's layers, by their places among all layers, from 0 on."""
    return {i: mixer for i, mixer in enumerate(mixers_of(model)) if isinstance(mixer, LongNet)}


def reached(model: Any, query: int) -> Iterator[tuple[int, Tensor]]:
    """Yield LongNet's layers, and of each the tokens (query + 1) bool from which information may be in what the query
    token is after it. Raises InputError: no such layer, a position below 0."""
    lm: LanguageModel = as_language_model(model)
    layers = longnet_layers(lm)
    if not layers:
        raise InputError(f"{lm.name} has no layer of LongNet, whose reach there would be")
    if query < 0:
        raise InputError(f"query tokens: expected positions from 0 on, got {query}")
    for layer in layers:
        tokens = torch.arange(query + 1, device="cpu") == query
        for i in range(layer, -1, -1):
            tokens = layers[i].config.read_by(tokens) if i in layers else torch.ones_like(tokens)
        yield layer, tokens


def reach(model: Any, at: Iterable[int], sources: Mapping[int, Sequence[int]] | None = None) -> pd.DataFrame:
    """Return how far back information may come from, at query tokens.

    Args: at: their positions in a document, from 0 on; sources: of a query, tokens that say what to answer.
    Returns: a row a layer and query: reach (tokens back to the first one reached), tokens (how many are reached, the
        query itself among them), and with sources within, whether any of the query's is reached.
    Raises: InputError: as `reached` does.
    """
    rows = []
    for query in at:
        for layer, tokens in reached(model, query):
            row = {"layer": layer, "query": query, "reach": query - int(tokens.byte().argmax())}
            row["tokens"] = int(tokens.sum())
            if sources is not None:
                row["within"] = any(bool(tokens[token]) for token in sources.get(query, ()))
            rows.append(row)
    return pd.DataFrame(rows).sort_values(["layer", "query"], ignore_index=True)
