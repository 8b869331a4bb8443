"""Effective remembrance: how far back what a model says next still depends on what it read.

    EffRem_T(t) = TV(q(. | x[0:T]), q(. | x[t:T]))        TV(q, p) = 1/2 * sum over tokens v of |q(v) - p(v)|

q is the next-token distribution after the whole context of T tokens, and after its last T - t alone (Ruiz & Gu, arXiv
2507.02782). 0: the first t tokens change nothing; 1: without them the model says something else altogether. High
within the training length it is memory. High far past it may as well be collapse, which a loss or a recall tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.generate import prefill, prompt_ids
from rnn_longctx.models.segments import SEGMENT

if TYPE_CHECKING:
    from rnn_longctx.models.lm import Mamba2LM


@torch.no_grad()
def remembrance(
    model: Mamba2LM, ids: Tensor, cuts: Iterable[int] | None = None, segment: int = SEGMENT
) -> pd.DataFrame:
    """Total variation between what the model says after T tokens and after the last of them alone.

    Every context is a stream of its own, read from a fresh cache under whatever remedy the model has; the rows of a
    cut, which are of one length, are read together. A remedy or control that counts tokens (a cap every k, a restart)
    counts from the cut.

    Args:
        model: this library's, or one of another library, which is adopted.
        ids: (B, T) int64, T >= 2.
        cuts: t, numbers of tokens cut off at the start, 0 to T - 1; None leaves 1, 2, 4, ... tokens (all below T),
            and reads fewer than 2 T tokens a row beside the T of the whole.
        segment: tokens read at once, all rows together; at least one a row.
    Returns:
        A row for every row of ids and cut, columns row, cut (t), kept (T - t, tokens), tv (0 to 1; not a number where
        the model's logits are none).
    Raises:
        InputError: ids that are no tensor of the model's tokens, no rows of at least 2 of them, no cut, one that is no
            whole number or out of range, a segment below 1.
    """
    from rnn_longctx.models.adopt.adopting import as_language_model

    lm = as_language_model(model)
    if not isinstance(ids, Tensor):
        raise InputError(f"ids must be a tensor (B, T) of whole numbers, got {type(ids).__name__} {ids!r:.60}")
    if ids.ndim != 2 or len(ids) < 1 or ids.shape[1] < 2:
        raise InputError(f"ids must be (B, T) with at least a row of 2 tokens, got shape {tuple(ids.shape)}")
    if segment < 1:
        raise InputError(f"segment: expected at least 1 token, got {segment}")
    ids = prompt_ids(lm, ids)
    rows, length = ids.shape
    try:
        wanted = default_cuts(length) if cuts is None else sorted({index(t) for t in cuts})
    except TypeError:
        raise InputError(f"cuts: expected several whole numbers of tokens, such as [3], got {cuts!r:.60}") from None
    if not wanted:
        raise InputError("cuts: expected at least one")
    outside = [t for t in wanted if not 0 <= t < length]
    if outside:
        raise InputError(f"a cut leaves 1 to all of the {length} tokens: expected 0 to {length - 1}, got {outside[0]}")
    at_once = max(1, segment // rows)
    whole, parts = _distribution(lm, ids, at_once), []
    for cut in wanted:
        # nothing cut off is the same reading: 0 by definition, and not read twice
        tv = (_distribution(lm, ids[:, cut:], at_once) - whole).abs().sum(-1) / 2 if cut else whole.sum(-1) * 0
        parts.append(pd.DataFrame({"row": range(rows), "cut": cut, "kept": length - cut, "tv": tv.cpu().numpy()}))
    return pd.concat(parts).sort_values(["row", "cut"], ignore_index=True)


def remembered(frame: pd.DataFrame, below: float = 0.05) -> pd.Series:
    """Tokens of context that a prediction rests on: the fewest kept from which on tv stays below `below`.

    From which on: with a few tokens kept tv may dip by chance. A cut of nothing is not counted, which says nothing.

    Args: frame: of `remembrance`; below: in (0, 1].
    Returns: for every row, tokens; infinity where tv is not below it at the longest cut context either. As fine as the
        cuts were laid.
    Raises: InputError: another frame, no cut of at least one token, a threshold out of range.
    """
    missing = {"row", "cut", "kept", "tv"} - set(frame.columns)
    if missing:
        raise InputError(f"expected a table of remembrance, which has the column {sorted(missing)[0]!r}")
    if not 0 < below <= 1:
        raise InputError(f"below: expected a threshold in (0, 1], got {below:g}")
    found = {}
    for row, part in frame[frame["cut"] > 0].groupby("row"):
        part = part.sort_values("kept")
        above = np.flatnonzero(~(part["tv"].to_numpy() < below))  # not a number counts as above
        first = int(above[-1]) + 1 if len(above) else 0
        found[row] = float(part["kept"].iloc[first]) if first < len(part) else float("inf")
    if not found:
        raise InputError("no cut of at least one token: nothing says how much is remembered")
    return pd.Series(found, name="remembered", dtype=float).rename_axis("row")


def default_cuts(length: int) -> list[int]:
    """The cuts of T tokens that leave 1, 2, 4, ... of them, in rising order."""
    return [length - 2**i for i in reversed(range((length - 1).bit_length()))]


def _distribution(model: Any, ids: Tensor, segment: int) -> Tensor:
    """(B, vocab) float64: of the token after ids (B, T)."""
    return prefill(model, ids, segment=segment)[0].double().softmax(-1)
