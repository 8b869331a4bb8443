"""How far each head of a transformers decoder reads, before and after it is retrofitted.

Of the weight that a head gives to the tokens before a query, in shares:

    sink       of the first blocks of the context, as far as they lie outside the window
    beyond     of blocks before the window, sinks aside
    missed     of these, what the best choice of `top` blocks for each query leaves
    distance   tokens back, on average, sinks aside, to the accuracy of a block

Measured over the second half of a context, whose tokens have something to look back at. The weights of a recurrence may
be negative; shares are then of their sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.retrofit.pooled import pooled, watched


@dataclass(frozen=True)
class Lens:
    """What counts as near: blocks of `block` tokens, a window of `window`, `sinks` first blocks, `top` others."""

    block: int = 16
    window: int = 64
    sinks: int = 0
    top: int = 0

    @classmethod
    def of(cls, settings: Any) -> Lens:
        """Return the lens of a mixer's settings: its own window and blocks, where it has some."""
        own = {name: getattr(settings, name) for name in ("block", "window", "sinks", "top") if hasattr(settings, name)}
        return cls(**own)


@dataclass(frozen=True)
class HeadReach:
    """How far a head reads; see above."""

    layer: int
    head: int
    sink: float
    beyond: float
    missed: float
    distance: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
@in_evaluation
def reach_of_heads(model: Any, contexts: Iterable[Tensor], lens: Lens) -> list[HeadReach]:
    """Return how far every head of every layer reads in contexts (B, T) of ids.

    Args:
        model: a `Retrofitted`.
    """
    sums: dict[int, Tensor] = {}
    counts = 0
    for ids in contexts:
        with watched(model.attentions) as seen:
            model(ids.to(model.device))
        for layer, attention in enumerate(model.attentions):
            of_layer = _sums(attention, seen[layer], lens)
            sums[layer] = sums[layer] + of_layer if layer in sums else of_layer
        counts += len(ids) * (ids.shape[1] - ids.shape[1] // 2)
    out = []
    for layer, total in sorted(sums.items()):
        for head, values in enumerate((total / counts).tolist()):
            out.append(HeadReach(layer, head, *values))
    return out


def _sums(attention: Any, inputs: Any, lens: Lens) -> Tensor:
    """Return (H, 4) float64, the sums over rows and queries of a layer."""
    half = inputs.u.shape[1] // 2
    total: Any = 0.0
    for queries, weights in pooled(attention, inputs, lens.block):
        first = max(0, half - queries.start)
        weights = weights[:, :, first:].double()
        if not weights.shape[2]:
            continue
        weights = weights / weights.sum(3, keepdim=True).clamp(min=1e-30)
        query = torch.arange(queries.start + first, queries.stop, device=weights.device)
        blocks = torch.arange(weights.shape[3], device=weights.device)
        back = query[:, None] // lens.block - blocks  # (t, M), in blocks
        outside = back >= lens.window // lens.block
        sink = outside & (blocks < lens.sinks)
        far = weights * (outside & ~sink)
        beyond = far.sum(3)
        best = far.topk(min(lens.top, far.shape[3])).values.sum(3) if lens.top else torch.zeros_like(beyond)
        rest = weights * ~sink
        distance = (rest * back.clamp(min=0) * lens.block).sum(3) / rest.sum(3).clamp(min=1e-30)
        shares = [(weights * sink).sum(3), beyond, (beyond - best).clamp(min=0), distance]
        total = total + torch.stack([share.sum((0, 2)) for share in shares], 1)
    return total
