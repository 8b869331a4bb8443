"""A monitor at work on one model: looks are collected from the mixers, judged, written down and acted on.

See `rnn_longctx.probes.monitor.monitor`, where the definitions are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.probes.monitor.actions import Action
from rnn_longctx.probes.monitor.inputs import ScaleWatcher
from rnn_longctx.probes.monitor.journal import Journal
from rnn_longctx.probes.monitor.judge import History, Judge, Recent, Report
from rnn_longctx.probes.monitor.reread import Rereader, Stream
from rnn_longctx.probes.trace import watching
from rnn_longctx.recurrence.statistics import Statistics

RECENT = 16  # looks that a recalibration sees


class LayerWatcher(ScaleWatcher):
    """The observer of one layer."""

    def __init__(self, mixer: Any, layer: int, watch: Watch):
        super().__init__(mixer, watch.every)
        self.layer, self.watch = layer, watch

    def __call__(self, s: Statistics) -> None:
        self.watch.look(self.layer, s)


class Watch:
    """What `CollapseMonitor.on` gives.

    Attributes:
        reports: one a segment of `every` tokens, in the order they were read. What an action reads again is not
            reported again.
        status: the last report's, ok before the first.
        every: tokens between two looks.
    """

    def __init__(self, judge: Judge, model: LanguageModel, action: Action, journal: Journal):
        self.judge, self.model, self.action, self.journal, self.every = judge, model, action, journal, judge.every
        self.reports: list[Report] = []
        self.stream = Stream()
        self._watchers = [LayerWatcher(mixer, i, self) for i, mixer in enumerate(model.mixers)]
        self._pending: list[Statistics] = []  # one a layer, of the call that is being read
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=RECENT)  # log norms, log input scales
        self._previous = "ok"  # status of the report before, in this stream
        self._warnings = 0

    def __repr__(self) -> str:
        on = any(mixer.observer is watcher for mixer, watcher in zip(self.model.mixers, self._watchers))
        seen = f"{self.status} at {self.reports[-1].position}" if self.reports else "nothing seen yet"
        return f"<Watch of {self.model.name}, {self.action.text}: {'on' if on else 'off'}, {seen}>"

    @property
    def status(self) -> str:
        return self.stream.status

    def summary(self) -> str:
        """One line: the last report, and what was done where."""
        if not self.reports:
            return f"nothing yet: a look is taken every {counted(self.every, 'token')}"
        positions: dict[str, list[str]] = {}
        for report in self.reports:
            if report.action:
                positions.setdefault(report.action, []).append(str(report.position))
        actions = [
            f"{action} at {', '.join(at[:3])}{f' and {len(at) - 3} more' if at[3:] else ''}"
            for action, at in positions.items()
        ]
        return "; ".join([str(replace(self.reports[-1], action=None)), *actions])

    def recent(self) -> Recent:
        """Return what the last looks saw. Raises InputError if there was no look yet."""
        if not self._recent:
            raise InputError(f"nothing was seen yet: a look is taken every {counted(self.every, 'token')}")
        scales = torch.stack([scale for _, scale in self._recent])
        known = scales[scales.isfinite().all(1)]
        norms = torch.stack([norm for norm, _ in self._recent]).amax(0)
        return Recent(self.reports[-1].position, norms, known.mean(0) if len(known) else None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block; afterwards the remedy of an action is off, and the files are closed."""
        try:
            with watching(self._watchers):
                if not self.action.between_segments:
                    yield
                    return
                rereader = Rereader(self.action, self.stream, self.every, self.judge.length)
                with self.model.reading_with(rereader):
                    yield
        finally:
            self.action.close()
            self.journal.close()

    def look(self, layer: int, s: Statistics) -> None:
        """Take one layer's statistics. The last layer's come when all have been read up to there, and nothing is taken
        off the device before: the layers between need not wait."""
        if self.action.rereads and not self.stream.reading:
            raise InputError(
                f"{self.action.text} needs the model read by this library: use rnn_longctx.generate or stream"
            )
        if layer == 0:
            self._pending = []
        self._pending.append(s)
        if layer < len(self._watchers) - 1:
            return
        norms = torch.cat([seen.norm for seen in self._pending], 1).cpu()  # (B, heads, n)
        scales = self._watchers[0].scales(self._pending[0].cpu())
        self._pending, reports = [], []
        try:
            for i, at in enumerate(s.position.tolist()):
                reports += self._judge(at, norms[..., i], scales[..., i])
        finally:
            self._report(reports)
        for report in reports:
            self.action.take(report, self.model.name)
            if self.action.rereads and report.action == self.action.text:
                self.stream.due = report

    def _judge(self, at: int, norm: Tensor, scale: Tensor) -> list[Report]:
        """The report of one look, at `at` tokens in the cache; none of what is read again."""
        stream, position = self.stream, at + self.stream.dropped
        if stream.history.position is None or position != stream.history.position + self.every:
            self.judge.check(self.model)
            if not stream.silent:
                self._previous = "ok"
            stream.history = History()
        stream.history.add(position, norm, scale)
        self._recent.append((stream.history.norms[-1].amax(0), stream.history.scales[-1].mean(0)))
        if stream.silent:
            return []
        report = self.judge.judge(position, stream.history)
        report = replace(report, action=self.action.choose(report, self._previous))
        self._warnings += report.status not in (self._previous, "ok")
        self._previous = report.status
        return [report]

    def _report(self, reports: list[Report]) -> None:
        self.reports += reports
        if self.reports:
            self.stream.status = self.reports[-1].status
        self.journal.write(reports, self.reports[-1] if self.reports else None, self._warnings)
