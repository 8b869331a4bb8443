"""A model and its losses in one call, which takes and returns the carries of a segment."""

from __future__ import annotations

from torch import Tensor, nn

from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import LM
from rnn_longctx.train.carries import state_map
from rnn_longctx.train.graphs import Graphs


class Learner(nn.Module):
    """A model and its losses in one call, which is what DDP and FSDP2 hang their work on.

    Args:
        recorded: on a CUDA device, reads are replayed from graphs. Not where parameters are sharded, or where one read
            is that of several ranks.
    """

    def __init__(self, model: LM, recorded: bool = False):
        super().__init__()
        self.model = model
        self.graphs = Graphs(model, read) if recorded and model.device.type == "cuda" else None

    def forward(
        self, ids: Tensor, targets: Tensor | None, before: Cache | None, reset: Tensor | None = None
    ) -> tuple[Tensor | None, Cache]:
        """Return the losses (B, T) of the targets, in nats, and the cache after ids (B, T).

        Args:
            targets: (B, T), or None: no losses are wanted.
            before: the cache of the segment before, which is left as it is; None begins a stream.
            reset: (B, T) bool, where documents begin.
        """
        if self.graphs is not None and reset is None:
            return self.graphs(ids, targets, before)
        return read(self.model, ids, targets, before, reset)


def read(
    model: LM, ids: Tensor, targets: Tensor | None, before: Cache | None, reset: Tensor | None = None
) -> tuple[Tensor | None, Cache]:
    """Read a segment as `Learner.forward` does, without graphs."""
    cache = model.new_cache() if before is None else state_map(lambda tensor: tensor, before)
    hidden = model(ids, cache, reset=reset)
    return None if targets is None else model.losses(hidden, targets), cache
