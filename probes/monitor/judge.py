"""Say of a stream's last looks whether the model has collapsed. What is measured, and what each status means, stands in
`rnn_longctx.probes.monitor.monitor`."""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rnn_longctx.config import counted
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.probes.monitor.inputs import PASSAGE, SMOOTH, TINY

STATUSES = ("ok", "warning", "drift", "collapsed")
WARNED, COLLAPSED = 1 / 12, 1 / 8  # shares of heads
LISTED = 16  # heads named in a report


@dataclass(frozen=True)
class Report:
    """One segment.

    Attributes:
        position: tokens read.
        status: ok, warning, drift or collapsed; of a batch, the worst row's.
        heads: (layer, head, ratio) of heads outside their margins, the largest ratio first, 16 at most; ratio is
            infinite where a state is not finite.
        outside: how many there are.
        worst: the largest ratio, of the heads outside their margins where there are any, else of all.
        shift: of the input, in units of its limit, over the heads where it is known; None where it is of none (the
            first looks at a stream that had begun before, a norm cap on the model).
        action: what was done, or None.
    """

    position: int
    status: str
    heads: tuple[tuple[int, int, float], ...]
    outside: int
    worst: float
    shift: float | None
    action: str | None = None

    def __str__(self) -> str:
        line = f"position {self.position}: {self.status}"
        if self.heads:
            layer, head, ratio = self.heads[0]
            whose = "its" if self.outside == 1 else "their"
            line += f", {counted(self.outside, 'head')} outside {whose} margins"
            line += f" (layer {layer} head {head} at {ratio:.3g} times)"
        if self.shift is not None:
            line += f", input shift {self.shift:.2g}"
        return line + (f"; {self.action}" if self.action else "")


@dataclass
class History:
    """The last looks at one stream: log norms (B, all heads) and log input scales (B, first layer's heads); and which
    rows (B) stood as collapsed at the last."""

    position: int | None = None
    norms: deque[Tensor] = field(default_factory=lambda: deque(maxlen=SMOOTH))
    scales: deque[Tensor] = field(default_factory=lambda: deque(maxlen=PASSAGE))
    collapsed: Tensor | None = None

    def add(self, position: int, norm: Tensor, scale: Tensor) -> None:
        self.position = position
        self.norms.append(norm.double().log())
        self.scales.append(scale.double().clamp(min=TINY).log())

    def copy(self) -> History:
        return History(self.position, copy.copy(self.norms), copy.copy(self.scales), self.collapsed)


@dataclass(frozen=True)
class Recent:
    """The last looks of a watch, whatever streams they were at.

    Attributes:
        position: where the last report stands, in tokens.
        norms: the largest log norms (all heads).
        scales: the mean log input scales (first layer's heads), or None where they are not known.
    """

    position: int
    norms: Tensor
    scales: Tensor | None


class Seen(Protocol):
    """What has looked at streams, as a watch has."""

    def recent(self) -> Recent: ...


class Judge(Protocol):
    """What a watch asks about its looks, as a calibrated monitor answers it.

    Attributes: every: tokens between two looks; length: tokens of a context in training.
    """

    every: int
    length: int

    def check(self, model: LanguageModel) -> None: ...
    def judge(self, position: int, history: History) -> Report: ...


@dataclass(frozen=True)
class Limits:
    """What looks are judged by. Shapes: H heads of all layers, K heads of the first layer, all float64 on the CPU.

    Attributes:
        envelope, margin: (H), logs of the largest norms in training and of what a ratio may reach.
        mean, std: (K), of the log input scales of the calibration's text.
        shifts: (SMOOTH), what the shift may reach over one look, two, and so on.
        passages: (n, K), means of the log input scales over PASSAGE looks; apart: how far from the nearest one may lie.
        heads: of every layer, how many.
    """

    envelope: Tensor
    margin: Tensor
    mean: Tensor
    std: Tensor
    shifts: Tensor
    passages: Tensor
    apart: float
    heads: tuple[int, ...]

    @classmethod
    def of(cls, values: dict[str, Any], heads: list[int]) -> Limits:
        """The limits of a monitor's saved values. Raises ValueError where they are not one a head."""

        def numbers(saved: list) -> Tensor:
            return torch.tensor(saved, dtype=torch.float32, device="cpu").double()

        envelope, margin = (numbers([v for layer in values[n] for v in layer]).log() for n in ("norms", "margins"))
        mean, std, shifts = (numbers(values[name]) for name in ("gate_mean", "gate_std", "gate_limits"))
        lengths = [len(v) for v in (envelope, margin, mean, std, shifts)]
        if lengths != [sum(heads), sum(heads), heads[0], heads[0], SMOOTH]:
            raise ValueError("its values are not one a head")
        passages = numbers(values["passages"]).reshape(-1, heads[0])
        return cls(envelope, margin, mean, std, shifts, passages, values["apart"], tuple(heads))

    def shift(self, history: History) -> Tensor:
        """(B,): how far a stream's input lies from the calibration text's, in units of the limit; NaN: not known."""
        looks = torch.stack(list(history.scales))  # (looks, B, K)
        last = looks[-SMOOTH:]
        shift = ((last.mean(0) - self.mean) / self.std).square().nanmean(1).sqrt() / self.shifts[len(last) - 1]
        if len(looks) == PASSAGE and len(self.passages):
            away = ((looks.mean(0)[:, None] - self.passages) / self.std).square().nanmean(2).sqrt().amin(1)
            shift = torch.fmax(shift, away / self.apart)
        return shift


def judge(limits: Limits, position: int, history: History) -> Report:
    """Return a report of a stream's last looks, without action; the history is told which rows have collapsed."""
    ratios = torch.stack(list(history.norms)).mean(0) - limits.envelope  # (B, H), logs
    ratios = ratios.masked_fill(ratios.isnan(), math.inf)
    over, shift = ratios - limits.margin, limits.shift(history)
    level = _levels(ratios, over, shift, history.collapsed)
    history.collapsed = level == 3
    worst, outside = ratios.amax(0).exp(), over.amax(0) > 0
    names = [(layer, head) for layer, heads in enumerate(limits.heads) for head in range(heads)]
    order = [i for i in worst.argsort(descending=True).tolist() if outside[i]]
    heads = tuple((*names[i], float(worst[i])) for i in order[:LISTED])
    largest = heads[0][2] if heads else float(worst.max())
    shift_known = not bool(shift.isnan().any())
    return Report(
        position, STATUSES[int(level.max())], heads, len(order), largest, float(shift.max()) if shift_known else None
    )


def _levels(ratios: Tensor, over: Tensor, shift: Tensor, collapsed: Tensor | None) -> Tensor:
    """(B,), places in STATUSES, of log ratios (B, H), of what they are over the log margins, and of the input's shift.
    collapsed: the rows that were at the look before."""

    def past(factor: float, share: float, alone: float) -> Tensor:
        return ((over > math.log(factor)).double().mean(1) >= share) | (over.amax(1) > math.log(alone))

    level = torch.where(past(1, WARNED, 4), 1, 0)
    level = level.where(~past(2, COLLAPSED, 16), 3)
    excused = (shift > 1) & ~past(4, COLLAPSED, 16)
    if collapsed is not None:  # before the input changed
        excused &= ~collapsed | (level < 3)
    return level.where(~excused, 2).where((ratios < math.inf).all(1), 3)
