"""Which tokens a head still holds: what each earlier token adds to the head's output at a query position T.

    y_T = sum over s <= T of  exp(sum of log_decay over (s, T]) * input_scale_s * (C_T . B_s) * x_s      (+ D * x_T)

is the recurrence of `recurrence.ssd` written out (Mamba-2, arXiv 2405.21060, section 3: the layer as a matrix of the
sequence). A token's contribution is the size of its term, times the sign of C_T . B_s: a number a head, in the units of
the head's output. Token s stands for what the layer is given at s: its convolution mixes in the d_conv - 1 tokens
before, and the layers below may have brought anything there.

A context is read in segments, twice where it takes more than one: first for C_T and for the log-decay up to T, then for
the terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.segments import SEGMENT
from rnn_longctx.probes.terms import Terms, read_terms, refuse

if TYPE_CHECKING:
    from rnn_longctx.models.lm import Mamba2LM


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
        _, queries, heads, kept = self.values.shape
        share = self.values.abs() / self.sums.clamp(min=torch.finfo(self.sums.dtype).tiny)[..., None]
        frames = [
            pd.DataFrame({
                "layer": i,
                "query": np.repeat(self.queries, heads * kept),
                "head": np.tile(np.repeat(np.arange(heads), kept), queries),
                "token": self.tokens[i].flatten().numpy(),
                "contribution": self.values[i].flatten().numpy(),
                "share": share[i].flatten().numpy(),
            })
            for i in self._layers(layer)
        ]  # fmt: skip
        found = pd.concat(frames)
        return found[found["token"] <= found["query"]].reset_index(drop=True)

    def per_token(self, layer: int | None = None) -> pd.DataFrame:
        """Columns layer, query, token, total (sizes added up over the heads) and share of the layer's. InputError: no
        such layer."""
        _, queries, length = self.totals.shape
        share = self.totals / self.totals.sum(-1, keepdim=True).clamp(min=torch.finfo(self.totals.dtype).tiny)
        frames = [
            pd.DataFrame({
                "layer": i, "query": np.repeat(self.queries, length), "token": np.tile(np.arange(length), queries),
                "total": self.totals[i].flatten().numpy(), "share": share[i].flatten().numpy(),
            })
            for i in self._layers(layer)
        ]  # fmt: skip
        found = pd.concat(frames)
        return found[found["token"] <= found["query"]].reset_index(drop=True)

    def _layers(self, layer: int | None) -> Iterable[int]:
        count = len(self.values)
        if layer is not None and not 0 <= layer < count:
            raise InputError(f"layer {layer} is not there: the model has {count} recurrent layers, 0 to {count - 1}")
        return range(count) if layer is None else [layer]


@torch.no_grad()
def attribute(model: Mamba2LM, ids: Tensor, top: int | None = None, *, queries: Iterable[int] | None = None,
              segment: int = SEGMENT) -> Attribution:  # fmt: skip
    """What every token contributes to every head's output at the queries, under the model's present policies.

    Takes the memory of a segment and of (Q, H, T) numbers a layer, or (Q, H, top) and (Q, T).

    Args:
        ids: (1, T) int64.
        top: keep the tokens of largest contribution only, so many a head; None keeps all.
        queries: positions counted from 0; None is the last token.
        segment: tokens read at once.
    Returns: tensors on the CPU, float32 (float64 for a float64 model).
    Raises:
        InputError: a model that is adopted, a policy that does more than change the gates (a cap, window, reset or
            start: the output is then no such sum), a control or reader, ids of another shape, numbers out of range.
    """
    model = as_language_model(model)
    refuse(model, ids, segment)
    wanted = [ids.shape[1] - 1] if queries is None else sorted({int(q) for q in queries})
    if not wanted or not 0 <= wanted[0] <= wanted[-1] < ids.shape[1]:
        raise InputError(f"queries: expected positions from 0 to {ids.shape[1] - 1}, got {wanted}")
    if top is not None and (not isinstance(top, Integral) or top < 1):
        raise InputError(f"top: expected a whole number, at least 1 token, got {top!r:.40}")
    ids = ids[:, : wanted[-1] + 1]  # what comes after does not matter
    length, at = ids.shape[1], torch.tensor(wanted, device="cpu")
    once = list(read_terms(model, ids, segment)) if length <= segment else None
    asked, until = _asked(once or read_terms(model, ids, segment), wanted)
    layers, heads = len(asked), until[0].shape[1]
    wide = asked[0].dtype
    kept = 0 if top else length
    values = [torch.zeros(len(wanted), heads, kept, dtype=wide, device="cpu") for _ in range(layers)]
    tokens = [torch.arange(kept, device="cpu").expand(len(wanted), heads, kept) for _ in range(layers)]
    sums = torch.zeros(layers, len(wanted), heads, dtype=wide, device="cpu")
    totals = torch.zeros(layers, len(wanted), length, dtype=wide, device="cpu")
    so_far = [torch.zeros_like(u[0]) for u in until]
    for parts in once or read_terms(model, ids, segment):
        for i, part in enumerate(parts):
            t, u = part.start, part.start + len(part.scale)
            before = so_far[i] + part.log_decay.double().cumsum(0)  # (t, H)
            so_far[i] = before[-1]
            left = until[i][:, None] - before  # (Q, t, H): log of what is left of s at T
            here = torch.arange(t, u, device="cpu")
            left = left.masked_fill((here > at[:, None]).to(left.device)[..., None], -math.inf).exp().to(wide)
            alike = torch.einsum("qgn,tgn->qtg", asked[i], part.B).repeat_interleave(heads // part.B.shape[1], -1)
            new = (left * part.scale * alike * part.size).transpose(1, 2).cpu()  # (Q, H, t)
            sums[i] += new.abs().sum(-1)
            totals[i, :, t:u] = new.abs().sum(1)
            if top is None:
                values[i][..., t:u] = new
                continue
            values[i] = torch.cat([values[i], new], -1)
            tokens[i] = torch.cat([tokens[i], here.expand_as(new)], -1)
            best = values[i].abs().topk(min(top, values[i].shape[-1]), -1).indices
            values[i], tokens[i] = values[i].gather(-1, best), tokens[i].gather(-1, best)
    return Attribution(tuple(wanted), torch.stack(tokens), torch.stack(values), sums, totals)


def _asked(reading: Iterable[list[Terms]], queries: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer, C (Q, G, N) at the queries, and the log-decay (Q, H) float64 up to them."""
    C: dict[int, list[Tensor]] = {}
    until: dict[int, list[Tensor]] = {}
    so_far: dict[int, Tensor] = {}
    for parts in reading:
        for i, part in enumerate(parts):
            total = part.log_decay.double().cumsum(0) + so_far.get(i, 0.0)
            so_far[i] = total[-1]
            here = [q - part.start for q in queries if part.start <= q < part.start + len(total)]
            C.setdefault(i, []).append(part.C[here])
            until.setdefault(i, []).append(total[here])
    return [torch.cat(v) for v in C.values()], [torch.cat(v) for v in until.values()]
