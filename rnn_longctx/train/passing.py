"""State passing: a long stream read in segments, each from the state the one before left, its gradient in bounded
memory.

A block of bptt + 1 segments (the whole stream under `all`) is differentiated as one: a loss's gradient reaches back to
its block's first segment, over at most bptt boundaries, and none crosses from block to block. A first pass over a block
keeps the states at its boundaries alone; backwards, one segment at a time is read again with gradients, and what its
carry receives is handed to the segment before. So memory is that of one segment and of the boundaries' states, however
long the stream; the price is one more forward pass over all but each block's last segment (none with bptt = 0).

How a stream begins: Ruiz & Gu, arXiv 2507.02782.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnn_longctx.models.cache import Cache, Carry
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.train.config import PassingConfig
from rnn_longctx.train.corpus import Batch
from rnn_longctx.train.graphs import Graphs

# A layer's: its convolution's last inputs (B, channels, d_conv - 1), and its scan's state (B, H, P, N).
States = list[tuple[Tensor, Tensor]]
NOISE = 0.1  # standard deviation of `noise`, in the units of the state; a trained model's own are 0.01 to 1 a head
FIT_EVERY = 20  # steps between measurements of the final states for `fitted-noise`


class Learner(nn.Module):
    """A model and its losses in one call, which is what DDP and FSDP2 hang their work on. recorded: on a CUDA device
    reads are replayed from graphs (not where parameters are sharded, or one read is that of several ranks)."""

    def __init__(self, model: Any, recorded: bool = False):
        super().__init__()
        self.model = model
        self.graphs = Graphs(model, _read) if recorded and model.device.type == "cuda" else None

    def forward(self, ids: Tensor, targets: Tensor | None, before: States | None,
                reset: Tensor | None = None) -> tuple[Tensor | None, States]:  # fmt: skip
        """Losses (B, T) of the targets, in nats, and the states after ids (B, T), documents beginning at `reset`.
        before: None begins and forgets."""
        if self.graphs is not None and reset is None:
            return self.graphs(ids, targets, before)
        return _read(self.model, ids, targets, before, reset)


def _read(model: Any, ids: Tensor, targets: Tensor | None, before: States | None,
          reset: Tensor | None = None) -> tuple[Tensor | None, States]:  # fmt: skip
    cache = model.new_cache() if before is None else _cache(before)
    hidden = model(ids, cache, reset=reset)
    losses = None if targets is None else model.losses(hidden, targets)
    return losses, [(layer.conv, layer.scan.state) for layer in cache.layers]


@dataclass(frozen=True)
class Part:
    """Rows of a batch that are read at once.

    Attributes:
        batch: the rows. Where a document begins (`reset`) the state is dropped; a target that does not count is 0 in
            the mean of all.
        tokens, answers: how many of both the whole batch has, of which this part's losses are shares.
        scale: gradients are times this: where the mean over so many ranks is taken afterwards.
        cut: of the length of a segment, which of its tokens this rank reads.
        step: whether a read is the update's last; around it and its backward.
    """

    batch: Batch
    tokens: int
    answers: Tensor
    scale: int = 1
    cut: Callable[[int], slice] = lambda length: slice(0, length)
    step: Callable[[bool], AbstractContextManager] = lambda last: nullcontext()

    @classmethod
    def of(cls, batch: Batch) -> Part:
        """All of a batch."""
        return cls(batch, batch.answer.numel(), batch.answer.sum())

    def pieces(self, segment: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Inputs, targets, which of those are an answer's and which count, and which inputs begin a document, of each
        segment; this rank's tokens of it."""
        b, found = self.batch, []
        length = b.answer.shape[1]
        for t in range(0, length, segment):
            own = range(t, min(t + segment, length))
            own = own[self.cut(len(own))]
            at, after = slice(own.start, own.stop), slice(own.start + 1, own.stop + 1)
            counted, reset = (None if marks is None else marks[:, at] for marks in (b.counted, b.reset))
            found.append((b.ids[:, at], b.ids[:, after], b.answer[:, at], counted, reset))
        return found


def accumulate(learner: nn.Module, part: Part, passing: PassingConfig | None, start: States | None,
               answer_weight: float,
               context: Callable[[], AbstractContextManager]) -> tuple[Tensor, Tensor, States]:  # fmt: skip
    """Read some streams from `start` and add the gradient of (mean loss of all tokens + answer_weight * mean loss of
    the answer tokens) to the parameters' `.grad`: this part's share of it.

    Args:
        learner: a `Learner`, wrapped or not.
        part: T need not be a multiple of the segment.
        passing: None reads a stream as one segment.
        start: states before the first token (None: none); no gradient goes to them.
        context: gives an autocast, entered anew for every read: casts of weights that it keeps from a pass without
            gradients must not serve one with them.
    Returns:
        The part's share of the mean loss of all tokens and of the answer tokens (0 without any), in nats, and the
        states after the last token, all detached.
    """
    pieces = part.pieces(part.batch.answer.shape[1] if passing is None else passing.segment)
    answers = part.answers.clamp(min=1)
    loss = answer_loss = torch.zeros((), device=part.batch.answer.device)
    size = len(pieces) if passing is None or passing.bptt == "all" else passing.bptt + 1
    states = start
    for first in range(0, len(pieces), size):
        block = pieces[first : first + size]
        before = [states]
        with torch.no_grad():
            for ids, *_, reset in block[:-1]:
                with context():
                    before.append(learner(ids, None, before[-1], reset)[1])
        received: list[Tensor | None] = []  # gradients of what the segment hands on; nothing comes from the next block
        for ids, goal, asked, counted, reset in reversed(block):
            begun = before.pop()
            leaves = [t.detach().requires_grad_(bool(before)) for pair in begun or [] for t in pair]
            paired = None if begun is None else list(zip(leaves[::2], leaves[1::2], strict=True))
            with part.step(not before and first + size >= len(pieces)):
                with context():
                    losses, after = learner(ids, goal, paired, reset)
                losses = losses if counted is None else losses * counted
                own, own_answer = losses.sum() / part.tokens, (losses * asked).sum() / answers
                handed = [t for pair in after for t in pair]
                if not received:  # the block's last segment
                    states, received = [(conv.detach(), scan.detach()) for conv, scan in after], [None] * len(handed)
                gradients = [(t, g) for t, g in zip(handed, received, strict=True) if g is not None]
                torch.autograd.backward(
                    [part.scale * (own + answer_weight * own_answer), *(t for t, _ in gradients)],
                    [None, *(g for _, g in gradients)],
                )
            received = [leaf.grad for leaf in leaves]
            loss, answer_loss = loss + own.detach(), answer_loss + own_answer.detach()
    assert states is not None
    return loss, answer_loss, states


def state_norms(states: States) -> Tensor:
    """(L, H): the Frobenius norm of each head's state, the mean over rows."""
    return torch.stack([state.float().flatten(2).norm(dim=2).mean(0) for _, state in states])


def _cache(before: States) -> Cache:
    """Positions and sums of decays begin anew: a model in training has no policy that would ask for them."""
    position = torch.zeros(len(before[0][1]), dtype=torch.int64)
    carries = []
    for conv, state in before:
        spent = state.new_zeros(state.shape[:2], dtype=torch.float64)
        carries.append(Carry(conv, ScanCarry(state, position, spent)))
    return Cache(carries, position)


def zeros(model: Any, batch: int) -> States:
    """The states of `batch` rows that begin, float32 (float64 in a float64 model)."""
    c, dtype = model.config, torch.promote_types(model.dtype, torch.float32)
    shapes = (batch, c.conv_dim, c.d_conv - 1), (batch, c.nheads, c.headdim, c.d_state)
    return [
        (
            torch.zeros(shapes[0], dtype=dtype, device=model.device),
            torch.zeros(shapes[1], dtype=dtype, device=model.device),
        )
        for _ in range(c.n_layer)
    ]


class Starts:
    """The states that streams begin from, and what must be kept between steps for them.

    Noise is a function of (seed, step, row); what a snapshot must hold is in `state_dict`.

    Args:
        rows: which rows of the global batch are read here.
        total: the sum over all rows of what is a sum over these.
    """

    def __init__(self, model: Any, passing: PassingConfig, seed: int, rows: slice = slice(None),
                 total: Callable[[Tensor], Tensor] = lambda t: t):  # fmt: skip
        self.model, self.passing, self.seed, self.rows, self.total = model, passing, seed, rows, total
        self.kept: States | None = None  # previous: what the rows' last streams ended with
        self.fitted: Tensor | None = None  # fitted-noise: (2, L, H), mean and standard deviation

    def begin(self, step: int, batch: Batch) -> States:
        """The states before the first token of each of these rows, which are all that `batch` has. Noise of a
        convolution's inputs is none: they begin empty."""
        start = zeros(self.model, len(batch.ids))
        if self.passing.start == "previous" and self.kept is not None:
            assert batch.carried is not None
            rows = batch.carried[:, None, None]
            return [
                (torch.where(rows, conv, 0.0), torch.where(rows[..., None], state, 0.0)) for conv, state in self.kept
            ]
        fitted = self.fitted
        if self.passing.start == "noise":
            heads = self.model.config.nheads
            fitted = (
                torch.tensor([0.0, NOISE], dtype=torch.float32)
                .view(2, 1, 1)
                .expand(2, len(start), heads)
                .to(self.model.device)
            )
        if fitted is None:
            return start
        for row in range(len(batch.ids)):
            key = [self.seed, step, (self.rows.start or 0) + row]
            seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) % 2**63
            draw = torch.Generator(self.model.device).manual_seed(seed)
            for (_, state), mean, std in zip(start, fitted[0], fitted[1], strict=True):
                noise = torch.randn(state.shape[1:], generator=draw, dtype=state.dtype, device=state.device)
                state[row] = mean[:, None, None] + std[:, None, None] * noise
        return start

    def end(self, step: int, states: States) -> None:
        """Take note of what the streams of a step ended with."""
        if self.passing.start == "previous":
            self.kept = states
        elif self.passing.start == "fitted-noise" and step % FIT_EVERY == 0:
            wide = torch.stack([state.transpose(0, 1).flatten(1).double() for _, state in states])  # (L, H, ·)
            sums = torch.stack([torch.full_like(wide[..., 0], wide.shape[2]), wide.sum(2), wide.square().sum(2)])
            count, one, two = self.total(sums)
            spread = (two - one.square() / count).clamp(min=0) / (count - 1)
            self.fitted = torch.stack([one / count, spread.sqrt()]).to(states[0][1].dtype)

    def forget(self) -> None:
        """The next streams go on from none: after a step that failed, and where another stage's streams begin."""
        self.kept = None

    def state_dict(self, rows: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Any]:
        """rows: all rows from these."""
        kept = None if self.kept is None else [[rows(t) for t in pair] for pair in self.kept]
        return {"kept": kept, "fitted": self.fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def own(t: Tensor) -> Tensor:
            return t[self.rows].to(self.model.device)

        self.kept = None if state["kept"] is None else [(own(conv), own(scan)) for conv, scan in state["kept"]]
        self.fitted = None if state["fitted"] is None else state["fitted"].to(self.model.device)
