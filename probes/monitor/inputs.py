"""What a model's first recurrent layer is given: its input scales, which follow from the tokens alone, on a text and in
a stream. By them a monitor tells another input from a collapse (`rnn_longctx.probes.monitor.monitor`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.segments import longest
from rnn_longctx.probes.trace import Course, watching
from rnn_longctx.recurrence.statistics import Statistics

if TYPE_CHECKING:
    from rnn_longctx.data import Text

SMOOTH = 4  # looks
SLICES, WINDOWS, AT_ONCE = 32, 8, 4  # of the text the gates are calibrated on: windows a slice; slices read at once
SLACK = 2.0  # the shift may reach this much more than in the calibration
PASSAGE = 32  # looks
FEW = 8  # passages that say nothing about a text
# Nothing has changed nearer than 1.25 times what four in five passages keep from the others, nor than three standard
# deviations of a passage's mean, were its looks independent.
APART, FOUR_IN_FIVE, NOISE = 1.25, 0.8, 3.0
TINY = 1e-30  # an input scale may underflow to 0
FLOOR = 0.01  # of a standard deviation of log input scales: a text may hold one kind of line only


class ScaleWatcher:
    """An observer of a layer that works out its input scales, as they are without a policy's gain."""

    def __init__(self, mixer: Any, every: int):
        self.mixer, self.every, self.whole = mixer, every, False
        self._course = Course(mixer, every)

    def scales(self, s: Statistics) -> Tensor:
        """(B, H, n): mean input scale over the tokens since the look before, or, where decays are given and not of
        steps, mean log-decay without its sign; not a number where it is not known."""
        policy, A = self.mixer.policy, self._course.rates.to(s.log_decay.device)
        mul, add, gain = (
            torch.as_tensor(v, dtype=torch.float64, device=A.device).reshape(-1, 1)
            for v in (policy.mul, policy.add, policy.gain)
        )
        scales = self._course.steps(self._course.add(s, policy)["decay"], policy) / gain
        # It is worked out from the decay in float32: what a policy adds there may leave nothing of a small rate.
        rate = (mul * (A.mean(-1) if A.ndim == 2 else A)[:, None]).abs()
        return scales.masked_fill((add.abs() * 2**-24 > 0.01 * rate * scales).to(scales.device), math.nan)


class _Enough(Exception):
    """The first layer has been read, and what comes after it is not needed."""


class _First(ScaleWatcher):
    found: Tensor

    def __call__(self, s: Statistics) -> None:
        self.found = self.scales(s)
        raise _Enough


@torch.no_grad()
@in_evaluation
def input_statistics(lm: Any, every: int, text: Text, lasting: bool = True) -> dict[str, Any]:
    """Of the log of the first layer's mean input scale over windows of a text: mean and standard deviation [head], the
    limits of the shift over 1 to SMOOTH windows in a row, the passages (if `lasting`) and how far they lie apart. The
    layers above are not read."""
    from rnn_longctx.data import tokens

    def read(i: int, looks: int) -> Tensor:
        return torch.from_numpy(tokens(text, lm.tokenizer, i, looks * every)[0])

    tokens_there = len(text) * WINDOWS * every / tokens(text, lm.tokenizer, 0, WINDOWS * every)[1].sum()
    count = min(SLICES, int(tokens_there / (PASSAGE * every))) if lasting else 0  # passages that do not overlap
    ids = torch.stack([read(i, PASSAGE if count >= FEW else WINDOWS) for i in range(SLICES)])
    found = []
    limit = longest(lm)  # (of all rows: a call that is read in pieces would end after its first)
    at_once = AT_ONCE if limit is None else max(1, min(AT_ONCE, limit // ids.shape[1]))
    for part in ids.split(at_once):
        eye = _First(lm.mixers[0], every)
        with watching([eye]):
            try:
                lm(part.to(lm.device))
            except _Enough:
                found.append(eye.found.double().clamp(min=TINY).log().cpu())
    gates = torch.cat(found)  # (slices, H, looks)
    windows = gates[..., :WINDOWS]
    mean, std = windows.mean((0, 2)), windows.std((0, 2), correction=0).clamp(min=FLOOR)
    if not bool(mean.isfinite().all()):
        raise InputError(f"the first layer of {lm.name} has input scales that are not finite: nothing to calibrate")
    away = (windows - mean[:, None]) / std[:, None]
    limits = [SLACK * float(away.unfold(2, k, 1).mean(-1).square().mean(1).sqrt().max()) for k in range(1, SMOOTH + 1)]
    passages = gates[:count].mean(2) if count >= FEW else gates[:0].mean(2)  # (n, H)
    between = torch.cdist(passages / std, passages / std) / len(mean) ** 0.5
    nearest = between.fill_diagonal_(math.inf).amin(1) if len(passages) else torch.ones(1, device="cpu").double()
    noise = (gates.std(2) / std).square().mean(1).sqrt().median() / PASSAGE**0.5
    apart = max(APART * float(nearest.quantile(FOUR_IN_FIVE)), NOISE * float(noise), FLOOR)
    return {
        "gate_mean": mean.tolist(), "gate_std": std.tolist(), "gate_limits": [max(limit, FLOOR) for limit in limits],
        "passages": passages.tolist(), "apart": apart,
    }  # fmt: skip
