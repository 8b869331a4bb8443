"""Losses of a context that is read as a stream, a segment at a time, in the memory of one segment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.segments import SEGMENTS


def stream_targets(
    model: LanguageModel, ids: Tensor, *, cache: Any = None, segment: int | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, a segment at a time, where it begins in ids, its hidden states and the tokens that follow them.

    Args:
        ids: (B, T + 1) int64; the last token is predicted and not read.
        cache: what was read before, moved on in place by the time that a segment is yielded; None: nothing.
        segment: tokens of each row that are read at once; None: what suits the device, of all rows together.
    Yields:
        The position of the first hidden state, hidden states (B, t, d_model), and targets (B, t) beside them: the
        target at position s is token s + 1.
    """
    segment = segment or max(1, SEGMENTS[model.device.type] // len(ids))
    position = 0
    for hidden in model.stream(ids[:, :-1], model.new_cache() if cache is None else cache, segment):
        end = position + hidden.shape[1]
        yield position, hidden, ids[:, position + 1 : end + 1].to(hidden.device)
        position = end


def stream_losses(
    model: LanguageModel, ids: Tensor, *, cache: Any = None, segment: int | None = None, since: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Yield the loss at every position from `since` on, a segment at a time.

    The loss at position s is that of token s + 1, in nats; what comes before `since` is read and has no logits.
    Arguments are those of `stream_targets`.

    Yields:
        The position of the first loss, and losses (B, t) on the model's device, in the type of `model.losses`.
    """
    for position, hidden, targets in stream_targets(model, ids, cache=cache, segment=segment):
        skip = max(0, since - position)
        if skip < hidden.shape[1]:
            yield position + skip, model.losses(hidden[:, skip:], targets[:, skip:])


@torch.inference_mode()
@in_evaluation
def tail_loss(model: LanguageModel, ids: Tensor, segment: int | None = None) -> Tensor:
    """Return the mean loss over the second half of a context: of tokens that have a context to use.

    Args: ids: (B, L + 1); segment: as in `stream_targets`.
    Returns: (B,) float64 on the CPU, nats per token over positions (L / 2, L].
    """
    length = ids.shape[1] - 1
    total = torch.zeros(len(ids), dtype=torch.float64, device="cpu")
    for _, losses in stream_losses(model, ids, segment=segment, since=length // 2):
        total += losses.double().sum(1).cpu()
    return total / (length - length // 2)
