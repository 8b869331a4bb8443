"""What streams begin from: zero, the carries of the rows' last streams, or noise (Ruiz & Gu, arXiv 2507.02782)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import LM
from rnn_longctx.recurrence.carry import tree_map
from rnn_longctx.train.carries import integers, states, with_integers, with_states
from rnn_longctx.train.config import PassingConfig
from rnn_longctx.train.corpus import Batch

NOISE = 0.1  # standard deviation of `noise`, in the units of the state; a trained model's own are 0.01 to 1 a head
FIT_EVERY = 20  # steps between measurements of the final states for `fitted-noise`


def scan_states(model: LM, cache: Cache) -> list[Tensor]:
    """Return the states (B, H, P, N) of the recurrent layers, in order."""
    carries = {layer.mixer: carry for layer, carry in zip(model.layers, cache.layers, strict=True)}
    return [mixer.scan_state(carries[mixer]) for mixer in model.mixers]


def state_norms(model: LM, cache: Cache) -> Tensor:
    """Return the Frobenius norm of each head's state, in order of the layers, the mean over rows; NaN where no layer
    has a state."""
    norms = [state.float().flatten(2).norm(dim=2).mean(0) for state in scan_states(model, cache)]
    return torch.cat(norms) if norms else torch.full((1,), torch.nan, device=model.device)


def check_start(model: LM, start: str) -> None:
    """Raise InputError where a model's streams cannot begin so."""
    if start == "previous" and model.state_size().grows:
        grows = "the model keeps something of every token, so what rows go on from would grow without end"
        raise InputError(f"passing.start: previous is for states of a fixed size, and {grows}; set passing.start=zero")
    if "noise" in start and not scan_states(model, model.new_cache(1)):
        raise InputError(f"passing.start: {start} is that of a recurrent state, and no layer of the model has one")


class Starts:
    """The caches that streams begin from, and what must be kept between steps for them.

    Noise is a function of (seed, step, row); what a snapshot must hold is in `state_dict`.

    Args:
        rows: which rows of the global batch are read here.
        total: returns the sum over all rows of what is a sum over these.
    """

    def __init__(
        self,
        model: LM,
        passing: PassingConfig,
        seed: int,
        rows: slice = slice(None),
        total: Callable[[Tensor], Tensor] = lambda t: t,
    ):
        self.model, self.passing, self.seed, self.rows, self.total = model, passing, seed, rows, total
        self.last: Cache | None = None  # previous: what the rows' last streams ended with
        self.fitted: Tensor | None = None  # fitted-noise: (2, heads), mean and standard deviation

    def begin(self, step: int, batch: Batch) -> Cache:
        """Return the cache before the first token of each of these rows, which are all that `batch` has."""
        if self.passing.start == "previous" and self.last is not None:
            assert batch.carried is not None
            return _where(batch.carried, self.last)
        start = self.model.new_cache(len(batch.ids))
        fitted = self.fitted
        if self.passing.start == "noise":
            heads = sum(state.shape[1] for state in scan_states(self.model, start))
            fitted = torch.tensor([[0.0], [NOISE]]).expand(2, heads).to(self.model.device)
        if fitted is not None:
            for row in range(len(batch.ids)):
                self._draw_noise(step, row, start, fitted)
        return start

    def _draw_noise(self, step: int, row: int, start: Cache, fitted: Tensor) -> None:
        """Make a row's states noise, in place. Whatever else a layer carries, such as the inputs of a convolution,
        begins empty."""
        key = [self.seed, step, (self.rows.start or 0) + row]
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) % 2**63
        draw = torch.Generator(self.model.device).manual_seed(seed)
        scanned = scan_states(self.model, start)
        for state, of_heads in zip(scanned, fitted.split([state.shape[1] for state in scanned], 1), strict=True):
            mean, std = of_heads[..., None, None]
            noise = torch.randn(state.shape[1:], generator=draw, dtype=state.dtype, device=state.device)
            state[row] = mean + std * noise

    def end(self, step: int, cache: Cache) -> None:
        """Take note of what the streams of a step ended with."""
        if self.passing.start == "previous":
            self.last = cache
        elif self.passing.start == "fitted-noise" and step % FIT_EVERY == 0:
            scanned = scan_states(self.model, cache)
            heads = [state.transpose(0, 1).flatten(1).double() for state in scanned]  # (H, B * P * N)
            sums = [torch.stack([torch.full_like(h[:, 0], h.shape[1]), h.sum(1), h.square().sum(1)]) for h in heads]
            count, one, two = self.total(torch.cat(sums, 1))
            spread = (two - one.square() / count).clamp(min=0) / (count - 1)
            self.fitted = torch.stack([one / count, spread.sqrt()]).to(scanned[0].dtype)

    def forget(self) -> None:
        """Let the next streams begin at zero: after a step that failed, and where another stage's streams begin."""
        self.last = None

    def state_dict(self, all_rows: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Any]:
        """Return what a snapshot holds. all_rows: returns the tensor of all rows from that of these."""
        layers, positions = None, None
        if self.last is not None:
            layers = [[all_rows(t) for t in states(layer)] for layer in self.last.layers]
            positions = [all_rows(t.to(self.model.device)).cpu() for t in integers(self.last)]
        return {"kept": layers, "integers": positions, "fitted": self.fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; an older version's snapshot has no integers (positions)."""
        device = self.model.device
        self.last = None
        if state["kept"] is not None:
            floats = [t[self.rows].to(device) for layer in state["kept"] for t in layer]
            cache = self.model.new_cache(len(floats[0]))
            if state.get("integers") is not None:
                pairs = zip(integers(cache), state["integers"], strict=True)
                cache = with_integers(cache, [t[self.rows].to(zero.device) for zero, t in pairs])
            self.last = with_states(cache, floats)
        self.fitted = None if state["fitted"] is None else state["fitted"].to(device).flatten(1)  # was (2, L, H)


def _where(goes_on: Tensor, cache: Cache) -> Cache:
    """Return the cache with zeros in the rows that begin anew: one at position 0 has read nothing."""

    def chosen(tensor: Tensor) -> Tensor:
        rows = goes_on.view(-1, *(1,) * (tensor.ndim - 1)).to(tensor.device)
        return torch.where(rows, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))

    return tree_map(chosen, cache)
