"""Documents packed into one row, for models that do not keep them apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rnn_longctx.models.adopt.cache import AdoptedCache


def read_packed(read: Callable[[Tensor, AdoptedCache], Tensor], new_cache: Callable[[], AdoptedCache], ids: Tensor,
                cache: AdoptedCache, reset: Tensor) -> Tensor:  # fmt: skip
    """Read rows in which documents begin where reset (B, T) is True, and return the hidden states.

    Each document is read as a row of its own, one after the other, since the families' convolutions keep documents
    apart with a kernel of theirs only. The cache is left at each row's last document; positions count from its
    beginning.
    """
    rows, hidden = [], []
    for i, begins in enumerate(reset.tolist()):
        cuts = [t for t in range(ids.shape[1] + 1) if t in (0, ids.shape[1]) or begins[t]]
        row, documents = cache.rows([i]) if cache.seen else new_cache(), []
        for start, end in zip(cuts, cuts[1:]):
            row = new_cache() if begins[start] else row
            documents.append(read(ids[i : i + 1, start:end], row))
        rows.append(row)
        hidden.append(torch.cat(documents, 1))
    whole = cache.concat(rows, list(range(len(rows))))
    cache.library, cache.position, cache.seen, cache.padding = whole.library, whole.position, whole.seen, whole.padding
    return torch.cat(hidden)
