"""How long a step is going to take: its tokens, over the speed that a short reading has shown."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.eval.compare.timing import carried_bytes
from rnn_longctx.mitigations import parse_remedy
from rnn_longctx.mitigations.base import Need
from rnn_longctx.models.generate import continuation, prefill
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import evaluating

ROWS = 4  # side by side
UNKNOWN = 1.5  # times as slow as the bare model is a remedy thought that was not measured
PROBE = 2.0  # and the probe, which looks at every state
# Training lengths that are read to calibrate the first remedy that needs it: steps alone, where the checkpoint keeps
# the norms of states, and else those too, in small calls.
CALIBRATION, CALIBRATION_OF_NORMS = 16, 80
STEPS = 4  # tokens that are generated to measure one


class Speeds:
    """Speeds in tokens a second, by remedy, and what a generated token takes. They are replaced by those of the steps
    that were measured, so that a machine that becomes busier is noticed.

    Attributes:
        reading: tokens a second, by remedy.
        processor: processor seconds of a token read, by remedy, on a CPU: other processes do not enter them.
        token: seconds of a generated token, of all rows together.
        calibration: training lengths that are read for it.
        ready: remedies that this process has put on before: what they were calibrated on is remembered.
        drift: how many times as long as predicted the steps so far took, of remedies that have not been read yet.
        row_bytes: that a row carries from call to call, under the remedy that carries most of those that were tried.
    """

    def __init__(self, stored: dict[str, Any], norms_kept: bool):
        self.calibration = CALIBRATION if norms_kept else CALIBRATION_OF_NORMS
        self.reading: dict[str, float] = stored.get("reading", {})
        self.processor: dict[str, float] = stored.get("processor", {})
        self.token: float = stored.get("token", 0.0)
        self.ready: set[str] = {"none"}
        self.drift: float = stored.get("drift", 1.0)
        self.row_bytes: float = stored.get("row_bytes", 0.0)

    def stored(self) -> dict[str, Any]:
        """Return what is kept for the next run."""
        return {name: value for name, value in vars(self).items() if name not in ("calibration", "ready")}

    def of(self, remedy: str) -> float:
        """Return the tokens a second under a remedy, measured, or guessed from those of none."""
        return self.reading[remedy] if remedy in self.reading else self.reading["none"] / UNKNOWN / self.drift

    def putting_on(self, remedy: str, train_length: int) -> float:
        """Return the seconds that a remedy's calibration takes; 0 where it needs none, or it was made before."""
        if not _calibrated(remedy) or any(_calibrated(other) for other in self.ready):
            return 0.0
        return self.calibration * train_length / self.of("none")

    def learn(self, remedy: str, tokens: int, seconds: float, predicted: float) -> None:
        """Take up what a step of reading took."""
        if tokens and seconds > 0:
            self.reading[remedy] = tokens / seconds
            if predicted > 0:
                self.drift = min(4.0, max(0.5, 0.5 * self.drift + 0.5 * seconds / predicted))


def _calibrated(remedy: str) -> bool:
    return any(Need.TRAIN_LENGTH in part.needs for part in parse_remedy(remedy).parts)


@torch.inference_mode()
def reading_speed(
    model: LanguageModel, ids: Tensor, segment: int, seconds: float, least: int = 0, warm: bool = True
) -> tuple[float, float]:
    """Return the tokens a second at which ids (B, T + 1) are read as an evaluation reads them, from calls that take so
    many seconds together, or all of ids; and the bytes that a row then carries.

    Args:
        segment: tokens of a call, of all rows.
        least: tokens of each row that are read in any case.
        warm: whether a call comes before, in which what only the first one needs is made.
    """
    rows, length = len(ids), ids.shape[1] - 1
    each = max(1, segment // rows)
    with evaluating(model):
        if warm:
            _read(model, ids[:, : min(each, length) + 1], model.new_cache())
        cache, t, began = model.new_cache(), 0, time.perf_counter()
        while t < length:
            u = min(length, t + each)
            _read(model, ids[:, t : u + 1], cache)
            t = u
            if time.perf_counter() - began > seconds and t >= least:
                break
        return rows * t / (time.perf_counter() - began), carried_bytes(cache.layers) / rows


def _read(model: LanguageModel, ids: Tensor, cache: Any) -> None:
    hidden = model(ids[:, :-1].to(model.device), cache)
    model.losses(hidden, ids[:, 1:].to(model.device)).double().sum().item()  # waits for a GPU


def token_seconds(model: LanguageModel, ids: Tensor) -> float:
    """Return the seconds of a generated token of all rows of ids (B, T) together."""
    logits, cache = prefill(model, ids)
    tokens = continuation(model, logits, cache)
    next(tokens).cpu()
    next(tokens).cpu()
    began = time.perf_counter()
    for _ in range(STEPS):
        next(tokens).cpu()
    return (time.perf_counter() - began) / STEPS
