"""Which tokens a head still holds: what each earlier token adds to the head's output at a query position T.

    y_T = sum over s <= T of  exp(sum of log_decay over (s, T]) * input_scale_s * (C_T . B_s) * x_s      (+ D * x_T)

is the recurrence of `recurrence.ssd` written out (Mamba-2, arXiv 2405.21060, section 3: the layer as a matrix of the
sequence). A token's contribution is the size of its term, times the sign of C_T . B_s: a number a head, in the units of
the head's output. Where every channel of the state decays by itself, the decays stand inside the product of C_T and
B_s. Token s stands for what the layer is given at s: its convolution mixes in the d_conv - 1 tokens before, and the
layers below may have brought anything there.

A context is read in segments, twice where it takes more than one: first for C_T and for the log-decay up to T, then for
the terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.segments import SEGMENT
from rnn_longctx.probes.terms import Terms, read_terms, refuse


@dataclass(frozen=True)
class Attribution:
    """Contributions of the tokens before some query positions.

    Shapes: L layers, Q queries, H heads, T tokens (up to the last query), K tokens kept a head (all, or the top).

    Attributes:
        queries: positions of the query tokens, counted from 0.
        tokens, values: (L, Q, H, K), positions s and their contributions, largest size first where only the top is
            kept. Tokens after the query are there with 0.
        sums: (L, Q, H), the sizes of all contributions to a head added up, kept or not.
        totals: (L, Q, T), the sizes of a token's contributions added up over the heads.
    """

    queries: tuple[int, ...]
    tokens: Tensor
    values: Tensor
    sums: Tensor
    totals: Tensor

    def table(self, layer: int | None = None) -> pd.DataFrame:
        """Columns layer, query, head, token, contribution (signed) and share (its size out of those of all tokens, so
        that a head's shares sum to 1 where all are kept; 0 in a head without any). InputError: no such layer."""
        _, queries, heads, columns = self.values.shape
        share = self.values.abs() / self.sums.clamp(min=torch.finfo(self.sums.dtype).tiny)[..., None]
        frames = [
            pd.DataFrame(
                {
                    "layer": i,
                    "query": np.repeat(self.queries, heads * columns),
                    "head": np.tile(np.repeat(np.arange(heads), columns), queries),
                    "token": self.tokens[i].flatten().numpy(),
                    "contribution": self.values[i].flatten().numpy(),
                    "share": share[i].flatten().numpy(),
                }
            )
            for i in self._layers(layer)
        ]
        return _until_the_query(pd.concat(frames))

    def per_token(self, layer: int | None = None) -> pd.DataFrame:
        """Columns layer, query, token, total (sizes added up over the heads) and share of the layer's. InputError: no
        such layer."""
        _, queries, length = self.totals.shape
        share = self.totals / self.totals.sum(-1, keepdim=True).clamp(min=torch.finfo(self.totals.dtype).tiny)
        frames = [
            pd.DataFrame(
                {
                    "layer": i,
                    "query": np.repeat(self.queries, length),
                    "token": np.tile(np.arange(length), queries),
                    "total": self.totals[i].flatten().numpy(),
                    "share": share[i].flatten().numpy(),
                }
            )
            for i in self._layers(layer)
        ]
        return _until_the_query(pd.concat(frames))

    def _layers(self, layer: int | None) -> Iterable[int]:
        count = len(self.values)
        if layer is not None and not 0 <= layer < count:
            raise InputError(
                f"layer {layer} is not there: the model has {counted(count, 'recurrent layer')}, 0 to {count - 1}"
            )
        return range(count) if layer is None else [layer]


def _until_the_query(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["token"] <= table["query"]].reset_index(drop=True)


@torch.no_grad()
def attribute(
    model: Any, ids: Tensor, top: int | None = None, *, queries: Iterable[int] | None = None, segment: int = SEGMENT
) -> Attribution:
    """Return what every token contributes to every head's output at the queries, under the model's present policies.

    Takes the memory of a segment and of (Q, H, T) numbers a layer, or (Q, H, top) and (Q, T).

    Args:
        ids: (1, T) int64.
        top: keep the tokens of largest contribution only, so many a head; None keeps all.
        queries: positions counted from 0; None is the last token.
        segment: tokens read at once.
    Returns: tensors on the CPU, float32 (float64 for a float64 model).
    Raises:
        InputError: a model that is adopted, a recurrence that erases (the delta rule) or a policy that does more than
            change the gates (a cap, window, reset or start): the output is then no such sum; a control or reader, ids
            of another shape, numbers out of range.
    """
    lm: LanguageModel = as_language_model(model)
    refuse(lm, ids, segment)
    positions = _positions(queries, ids.shape[1])
    if top is not None and (not isinstance(top, Integral) or top < 1):
        raise InputError(f"top: expected a whole number, at least 1 token, got {top!r:.40}")
    ids = ids[:, : positions[-1] + 1]  # what comes after does not matter
    length = ids.shape[1]
    once = list(read_terms(lm, ids, segment)) if length <= segment else None
    layers = _queried(once or read_terms(lm, ids, segment), positions)
    tables = [_Table(query, length, None if top is None else int(top)) for query in layers]
    for terms in once or read_terms(lm, ids, segment):
        for table, some in zip(tables, terms, strict=True):
            table.add(some)
    return Attribution(
        tuple(positions),
        torch.stack([table.tokens for table in tables]),
        torch.stack([table.values for table in tables]),
        torch.stack([table.sums for table in tables]),
        torch.stack([table.totals for table in tables]),
    )


@dataclass(frozen=True)
class _Query:
    """What one layer asks at the query positions: C (Q, G, N), and the log-decay (Q, H) or (Q, H, N), float64, from the
    first token to them; at: the positions (Q,), on the CPU."""

    at: Tensor
    C: Tensor
    log_decay: Tensor


class _Table:
    """The contributions to one layer's heads, segment after segment, on the CPU (see `Attribution`).

    Args:
        length: tokens in all.
        top: how many are kept a head; None keeps all.
    """

    def __init__(self, query: _Query, length: int, top: int | None):
        self.query, self.top = query, top
        queries, self.heads = query.log_decay.shape[:2]
        self.dtype, columns = query.C.dtype, length if top is None else 0
        zeros = partial(torch.zeros, dtype=self.dtype, device="cpu")
        self.values = zeros(queries, self.heads, columns)
        self.tokens = torch.arange(columns, device="cpu").expand(queries, self.heads, columns)
        self.sums, self.totals = zeros(queries, self.heads), zeros(queries, length)
        self._log_decay = torch.zeros_like(query.log_decay[0])  # up to the next segment

    def add(self, terms: Terms) -> None:
        """Add the contributions of the tokens of one segment."""
        start, stop = terms.start, terms.start + len(terms.scale)
        here = torch.arange(start, stop, device="cpu")
        values = self._values(terms, here).transpose(1, 2).cpu()  # (Q, H, t)
        self.sums += values.abs().sum(-1)
        self.totals[:, start:stop] = values.abs().sum(1)
        if self.top is None:
            self.values[..., start:stop] = values
            return
        self.values = torch.cat([self.values, values], -1)
        self.tokens = torch.cat([self.tokens, here.expand_as(values)], -1)
        best = self.values.abs().topk(min(self.top, self.values.shape[-1]), -1).indices
        self.values, self.tokens = self.values.gather(-1, best), self.tokens.gather(-1, best)

    def _values(self, terms: Terms, here: Tensor) -> Tensor:
        """(Q, t, H): the contributions of the tokens `here` at the queries, 0 after those."""
        until = self._log_decay + terms.log_decay.double().cumsum(0)  # (t, H) or (t, H, N)
        self._log_decay = until[-1]
        left = self.query.log_decay[:, None] - until  # log of what is left of a token at a query
        after = (here > self.query.at[:, None]).to(left.device)  # (Q, t)
        left = left.masked_fill(after.reshape(*after.shape, *[1] * (left.ndim - 2)), -math.inf).exp().to(self.dtype)
        each = self.heads // terms.B.shape[1]  # heads that share a group
        if left.ndim == 3:
            alike = torch.einsum("qgn,tgn->qtg", self.query.C, terms.B).repeat_interleave(each, -1)
            return left * terms.scale * alike * terms.size
        B, C = (v.repeat_interleave(each, 1) for v in (terms.B, self.query.C))
        return torch.einsum("qhn,qthn,thn->qth", C, left, B) * terms.scale * terms.size


def _positions(queries: Iterable[int] | None, length: int) -> list[int]:
    positions = [length - 1] if queries is None else sorted({int(q) for q in queries})
    if not positions or not 0 <= positions[0] <= positions[-1] < length:
        raise InputError(f"queries: expected positions from 0 to {length - 1}, got {positions}")
    return positions


def _queried(reading: Iterable[list[Terms]], positions: list[int]) -> list[_Query]:
    """Of every layer, what it asks at the positions."""
    C: dict[int, list[Tensor]] = {}
    until: dict[int, list[Tensor]] = {}
    so_far: dict[int, Tensor] = {}
    for layers in reading:
        for i, terms in enumerate(layers):
            total = terms.log_decay.double().cumsum(0) + so_far.get(i, 0.0)
            so_far[i] = total[-1]
            here = [q - terms.start for q in positions if terms.start <= q < terms.start + len(total)]
            C.setdefault(i, []).append(terms.C[here])
            until.setdefault(i, []).append(total[here])
    at = torch.tensor(positions, device="cpu")
    return [_Query(at, torch.cat(C[i]), torch.cat(until[i])) for i in C]
