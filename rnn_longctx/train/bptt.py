"""Truncated back-propagation through a long stream, which is read in segments, each from the state that the one before
left: its gradient takes bounded memory.

A block of bptt + 1 segments (the whole stream under `all`) is differentiated as one: a loss's gradient reaches back to
its block's first segment, over at most bptt boundaries, and none crosses from block to block. A first pass over a block
keeps the carries at its boundaries alone; backwards, one segment at a time is read again with gradients, and what its
carry receives is handed to the segment before. So memory is that of one segment and of the boundaries' carries, however
long the stream; the price is one more forward pass over all but each block's last segment (none with bptt = 0).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnn_longctx.models.cache import Cache
from rnn_longctx.train.autocast import Autocast
from rnn_longctx.train.carries import states, with_states
from rnn_longctx.train.config import PassingConfig
from rnn_longctx.train.corpus import Batch


@dataclass(frozen=True)
class Segment:
    """Some tokens of every row of a micro-batch.

    Attributes:
        ids, targets: (B, T).
        answer: (B, T) bool, the targets that are an answer's.
        counted: (B, T) bool, the targets whose loss counts, or None: all.
        reset: (B, T) bool, the inputs that begin a document, or None.
    """

    ids: Tensor
    targets: Tensor
    answer: Tensor
    counted: Tensor | None
    reset: Tensor | None


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch that are read at once.

    Attributes:
        batch: the rows. Where a document begins (`reset`) the state is dropped; a target that does not count is 0 in
            the mean of all.
        tokens, answers: how many of both the whole batch has, of which these rows' losses are shares.
        scale: gradients are times this: where the mean over so many ranks is taken afterwards.
        cut: of the length of a segment, which of its tokens this rank reads.
        around: a context entered around each forward and backward pass, of whether it is the update's last for these
            rows; DDP synchronises only in the last of all.
    """

    batch: Batch
    tokens: int
    answers: Tensor
    scale: int = 1
    cut: Callable[[int], slice] = lambda length: slice(0, length)
    around: Callable[[bool], AbstractContextManager] = lambda last: nullcontext()

    @classmethod
    def of(cls, batch: Batch) -> MicroBatch:
        """Return all rows of a batch."""
        return cls(batch, batch.answer.numel(), batch.answer.sum())

    def segments(self, size: int) -> list[Segment]:
        """Return the segments of `size` tokens (the last may have fewer); of each, the tokens that this rank reads."""
        b, segments = self.batch, []
        length = b.answer.shape[1]
        for t in range(0, length, size):
            tokens = range(t, min(t + size, length))
            tokens = tokens[self.cut(len(tokens))]
            at, after = slice(tokens.start, tokens.stop), slice(tokens.start + 1, tokens.stop + 1)
            counted, reset = (None if marks is None else marks[:, at] for marks in (b.counted, b.reset))
            segments.append(Segment(b.ids[:, at], b.ids[:, after], b.answer[:, at], counted, reset))
        return segments


def accumulate(
    learner: nn.Module,
    rows: MicroBatch,
    passing: PassingConfig | None,
    start: Cache | None,
    answer_weight: float,
    autocast: Autocast,
) -> tuple[Tensor, Tensor, Cache]:
    """Read some streams from `start` and add the gradient of (mean loss of all tokens + answer_weight * mean loss of
    the answer tokens) to the parameters' `.grad`: these rows' share of it.

    Args:
        learner: a `Learner`, wrapped or not.
        rows: T need not be a multiple of the segment.
        passing: None reads a stream as one segment.
        start: the cache before the first token (None: none); no gradient goes to it.
        autocast: gives a context, entered anew for every read: casts of weights that it keeps from a pass without
            gradients must not serve one with them.
    Returns:
        The rows' share of the mean loss of all tokens and of the answer tokens (0 without any), in nats, and the cache
        after the last token, all detached.
    """
    segments = rows.segments(rows.batch.answer.shape[1] if passing is None else passing.segment)
    answers = rows.answers.clamp(min=1)
    loss = answer_loss = torch.zeros((), device=rows.batch.answer.device)
    size = len(segments) if passing is None or passing.bptt == "all" else passing.bptt + 1
    carried = start
    for first in range(0, len(segments), size):
        block = segments[first : first + size]
        before = [carried]
        with torch.no_grad():
            for segment in block[:-1]:
                with autocast():
                    before.append(learner(segment.ids, None, before[-1], segment.reset)[1])
        received: list[Tensor | None] = []  # gradients of what the segment hands on; nothing comes from the next block
        for segment in reversed(block):
            begun = before.pop()
            inputs = [] if begun is None else [t.detach().requires_grad_(bool(before)) for t in states(begun)]
            with rows.around(not before and first + size >= len(segments)):
                with autocast():
                    renewed = None if begun is None else with_states(begun, inputs)
                    losses, after = learner(segment.ids, segment.targets, renewed, segment.reset)
                losses = losses if segment.counted is None else losses * segment.counted
                share, answer_share = losses.sum() / rows.tokens, (losses * segment.answer).sum() / answers
                handed = states(after)
                if not received:  # the block's last segment
                    carried, received = after.detach(), [None] * len(handed)
                gradients = [(t, g) for t, g in zip(handed, received, strict=True) if g is not None]
                torch.autograd.backward(
                    [rows.scale * (share + answer_weight * answer_share), *(t for t, _ in gradients)],
                    [None, *(g for _, g in gradients)],
                )
            received = [t.grad for t in inputs]
            loss, answer_loss = loss + share.detach(), answer_loss + answer_share.detach()
    assert carried is not None
    return loss, answer_loss, carried
