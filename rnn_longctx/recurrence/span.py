"""What a layer needs to know of the tokens of a call beside their numbers. A model makes it once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rnn_longctx.recurrence.shard import Shard


@dataclass(frozen=True, eq=False)
class Span:
    """The tokens of one call: which are padding, where documents begin, where they stand in their streams.

    Attributes:
        mask: (B, T) bool, False where a token is padding. Padding may stand only before a row's first token.
        reset: (B, T) bool, True where a new row (document) begins: state and position start again.
        shard: the part of a stream that this rank reads, where a stream is spread over several ranks.
        position: (B,) int64 on the CPU, the tokens that each row read before (padding not counted), for layers whose
            carry does not count them; None where no layer asks. A scan does not read it.
        shared: what a layer leaves to the layers above it, by name: tensors (B, T, ...) of this call's tokens. A model
            makes it anew for every call, so that nothing of it outlives the call; None where a layer is called alone.
    """

    mask: Tensor | None = None
    reset: Tensor | None = None
    shard: Shard | None = None
    position: Tensor | None = None
    shared: dict[str, Tensor] | None = None


WHOLE = Span()  # every token is read, in one document, on one rank
