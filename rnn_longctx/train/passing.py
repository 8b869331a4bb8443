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
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnn_longctx.models.cache import Cache, Carry
from rnn_longctx.ssd import ScanCarry
from rnn_longctx.train.config import PassingConfig
from rnn_longctx.train.corpus import Batch

# A layer's: its convolution's last inputs (B, channels, d_conv - 1), and its scan's state (B, H, P, N).
States = list[tuple[Tensor, Tensor]]
NOISE = 0.1  # standard deviation of `noise`, in the units of the state; a trained model's own are 0.01 to 1 a head
FIT_EVERY = 20  # steps between measurements of the final states for `fitted-noise`


def accumulate(model: Any, batch: Batch, passing: PassingConfig, start: States, answer_weight: float,
               context: Callable[[], AbstractContextManager]) -> tuple[Tensor, Tensor, States]:  # fmt: skip
    """Read one batch of streams from `start` and add the gradient of (mean loss of all tokens + answer_weight * mean
    loss of the answer tokens) to the parameters' `.grad`.

    Args:
        batch: ids (B, T + 1); T need not be a multiple of the segment. Where a document begins (`reset`) the state is
            dropped; a target that does not count is 0 in the mean of all.
        start: states before the first token; no gradient goes to them.
        context: gives an autocast, entered anew for every read: casts of weights that it keeps from a pass without
            gradients must not serve one with them.
    Returns:
        Mean loss of all tokens and of the answer tokens (0 without any), in nats, and the states after the last
        token, all detached.
    """
    inputs, targets, answer = batch.ids[:, :-1], batch.ids[:, 1:], batch.answer
    counted = torch.ones_like(answer) if batch.counted is None else batch.counted
    pieces = list(zip(*(t.split(passing.segment, 1) for t in (inputs, targets, answer, counted)), strict=True))
    resets = [None] * len(pieces) if batch.reset is None else batch.reset.split(passing.segment, 1)
    answers = answer.sum().clamp(min=1)
    loss = answer_loss = torch.zeros((), device=answer.device)
    size = len(pieces) if passing.bptt == "all" else passing.bptt + 1
    states = start
    for first in range(0, len(pieces), size):
        block = list(zip(pieces[first : first + size], resets[first : first + size]))
        before = [states]
        with torch.no_grad():
            for (ids, *_), reset in block[:-1]:
                before.append(_read(model, ids, reset, before[-1], context)[1])
        received: list[Tensor | None] = []  # gradients of what the segment hands on; nothing comes from the next block
        for (ids, goal, asked, counts), reset in reversed(block):
            begun = before.pop()
            leaves = [t.detach().requires_grad_(bool(before)) for pair in begun for t in pair]
            hidden, after = _read(model, ids, reset, list(zip(leaves[::2], leaves[1::2], strict=True)), context)
            with context():
                losses = model.losses(hidden, goal) * counts
            own, own_answer = losses.sum() / answer.numel(), (losses * asked).sum() / answers
            handed = [t for pair in after for t in pair]
            if not received:  # the block's last segment
                states, received = [(conv.detach(), scan.detach()) for conv, scan in after], [None] * len(handed)
            gradients = [(t, g) for t, g in zip(handed, received, strict=True) if g is not None]
            torch.autograd.backward(
                [own + answer_weight * own_answer, *(t for t, _ in gradients)], [None, *(g for _, g in gradients)]
            )
            received = [leaf.grad for leaf in leaves]
            loss, answer_loss = loss + own.detach(), answer_loss + own_answer.detach()
    return loss, answer_loss, states


def _read(model: Any, ids: Tensor, reset: Tensor | None, before: States,
          context: Callable[[], AbstractContextManager]) -> tuple[Tensor, States]:  # fmt: skip
    """Hidden states (B, T, d_model) of ids (B, T), documents beginning at `reset`, and the states after them."""
    cache = Cache([_carry(*pair) for pair in before], torch.zeros(len(ids), dtype=torch.int64))
    with context():
        hidden = model(ids, cache, reset=reset)
    return hidden, [(layer.conv, layer.scan.state) for layer in cache.layers]


def _carry(conv: Tensor, state: Tensor) -> Carry:
    """Positions and sums of decays begin anew: a model in training has no policy that would ask for them."""
    position = torch.zeros(len(state), dtype=torch.int64)
    return Carry(conv, ScanCarry(state, position, state.new_zeros(state.shape[:2], dtype=torch.float64)))


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

    Noise is a function of (seed, step); what a snapshot must hold is in `state_dict`.
    """

    def __init__(self, model: Any, passing: PassingConfig, seed: int):
        self.model, self.passing, self.seed = model, passing, seed
        self.kept: States | None = None  # previous: what the rows' last streams ended with
        self.fitted: Tensor | None = None  # fitted-noise: (2, L, H), mean and standard deviation

    def begin(self, step: int, batch: Batch) -> States:
        """The states before the first token of each row. Noise of a convolution's inputs is none: they begin empty."""
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
            fitted = torch.tensor([0.0, NOISE]).view(2, 1, 1).expand(2, len(start), heads).to(self.model.device)
        if fitted is None:
            return start
        seed = int(np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)[0]) % 2**63
        draw = torch.Generator(self.model.device).manual_seed(seed)
        noisy = []
        for (conv, state), mean, std in zip(start, fitted[0], fitted[1], strict=True):
            noise = torch.randn(state.shape, generator=draw, dtype=state.dtype, device=state.device)
            noisy.append((conv, mean[:, None, None] + std[:, None, None] * noise))
        return noisy

    def end(self, step: int, states: States) -> None:
        """Take note of what the streams of a step ended with."""
        if self.passing.start == "previous":
            self.kept = states
        elif self.passing.start == "fitted-noise" and step % FIT_EVERY == 0:
            spread = [torch.std_mean(state.transpose(0, 1).flatten(1), dim=1) for _, state in states]
            self.fitted = torch.stack([torch.stack([mean for _, mean in spread]), torch.stack([s for s, _ in spread])])

    def forget(self) -> None:
        """The next streams go on from none: after a step that failed, and where another stage's streams begin."""
        self.kept = None

    def state_dict(self) -> dict[str, Any]:
        kept = None if self.kept is None else [list(pair) for pair in self.kept]
        return {"kept": kept, "fitted": self.fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = None if state["kept"] is None else [(conv, scan) for conv, scan in state["kept"]]
        self.fitted = state["fitted"]
