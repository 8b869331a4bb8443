"""A monitor at work on one model: looks are collected from the mixers, judged, told and acted on.

See `rnn_longctx.probes.monitor.monitor`, where the definitions are.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.config import home_path
from rnn_longctx.errors import CollapseError, InputError, nearest
from rnn_longctx.probes.monitor.inputs import GateWatcher
from rnn_longctx.probes.monitor.monitor import STATUSES, CollapseMonitor, History, Report, write_atomically
from rnn_longctx.recurrence.statistics import Statistics

ACTIONS = ("warn", "raise", "mitigate:NAME", "rollback:NAME", "fallback:truncate")
RECENT = 16  # looks that a recalibration sees
SEGMENT = 4096


class Eye(GateWatcher):
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

    def __init__(self, monitor: CollapseMonitor, lm: Any, action: str | Callable[[Report], Any],
                 log: str | Path | None, prometheus: str | Path | None,
                 fallback: Callable[[Report, Tensor], Tensor | None] | None, raw: bool):  # fmt: skip
        self.monitor, self.lm, self.every = monitor, lm, monitor.every
        self.reports: list[Report] = []
        self._callable = action if callable(action) else None
        if not (callable(action) or isinstance(action, str)):
            raise InputError(f"expected an action or a callable, got {action!r} (choices: {', '.join(ACTIONS)})")
        self._action = "call" if callable(action) else action
        kind, _, name = self._action.partition(":")
        self._kind = kind
        self._handle: Any = None
        if kind in ("mitigate", "rollback") and name:
            self._handle = worked_out(lm, name, kind)
        elif kind == "fallback" and (fallback is None) == (name == "truncate") and name in ("truncate", ""):
            self._fallback = fallback or (lambda report, ids: ids)
        elif callable(action) or action in ("warn", "raise"):
            pass
        else:
            kinds = {a.partition(":")[0]: a for a in ACTIONS}  # what follows the colon is not what was misspelt
            meant = next(iter(difflib.get_close_matches(kind, kinds, n=1, cutoff=0.4)), None)
            raise InputError(f"unknown action {action!r}{nearest(kinds[meant] if meant else kind, ACTIONS)}")
        if fallback is not None and kind != "fallback":
            raise InputError(f"a fallback goes with the action 'fallback', not with {action!r}")
        self._rereads = kind in ("rollback", "fallback")
        if self._rereads and raw:
            raise InputError(f"{self._action} reads tokens again, which {lm.name} does not in its own generate: give "
                             "rnn_longctx.adopt(model), and read with rnn_longctx.generate or stream")  # fmt: skip
        if lm.restart is not None or lm.reader is not None:
            raise InputError("a monitor follows a stream read token after token, and a control or a way to read "
                             "prompts is on the model: take it off")  # fmt: skip
        self.eyes = [Eye(mixer, i, self) for i, mixer in enumerate(lm.mixers)]
        self._pending: list[Statistics] = []
        self._history = History()
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=RECENT)
        self._previous = "ok"  # status of the report before, in this stream
        self._warnings = 0
        # the stream that is being read, where this library reads it
        self._cache: Any = None
        self._at = 0  # tokens its cache holds
        self._dropped = 0  # tokens it held before a fallback
        self._ids: list[Tensor] = []  # since the snapshot (rollback), or the last ones (fallback)
        self._snapshot: tuple[Any, History] | None = None
        self._due: Report | None = None
        self._inside = self._silent = False
        self._prometheus, self._log = prometheus, None
        if log is not None:
            try:
                self._log = home_path(log).open("a")
            except OSError as error:
                raise InputError(f"cannot write {log}: {error.strerror}") from None
        try:
            self._tell([])
        except InputError:
            self.close()
            raise

    @property
    def status(self) -> str:
        return self.reports[-1].status if self.reports else "ok"

    def summary(self) -> str:
        """One line: the last report, and what was done where."""
        if not self.reports:
            return f"nothing yet: a look is taken every {self.every} tokens"
        done: dict[str, list[str]] = {}
        for r in self.reports:
            if r.action:
                done.setdefault(r.action, []).append(str(r.position))
        said = [f"{action} at {', '.join(at[:3])}{f' and {len(at) - 3} more' if at[3:] else ''}"
                for action, at in done.items()]  # fmt: skip
        return "; ".join([str(replace(self.reports[-1], action=None)), *said])

    def recent(self) -> tuple[Tensor, Tensor | None]:
        """Of the last looks: the largest log norms (all heads), and the mean log input scales (first layer's heads), or
        None where they are not known. Raises InputError if there was no look yet."""
        if not self._recent:
            raise InputError(f"nothing was seen yet: a look is taken every {self.every} tokens")
        gates = torch.stack([g for _, g in self._recent])
        known = gates[gates.isfinite().all(1)]
        return torch.stack([n for n, _ in self._recent]).amax(0), (known.mean(0) if len(known) else None)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self._log is not None:
            self._log.close()

    # --- looking

    def look(self, layer: int, s: Statistics) -> None:
        """One layer's statistics. The last layer's come when all have been read up to there, and nothing is taken off
        the device before: the layers between need not wait."""
        if self._rereads and not self._inside:
            raise InputError(f"{self._action} needs the model read by this library: use rnn_longctx.generate or stream")
        if layer == 0:
            self._pending = []
        self._pending.append(s)
        if layer < len(self.eyes) - 1:
            return
        norms = torch.cat([seen.norm for seen in self._pending], 1).cpu()  # (B, heads, n)
        scales = self.eyes[0].scales(self._pending[0].cpu())
        self._pending, new = [], []
        try:
            for i, at in enumerate(s.position.tolist()):
                new += self._judge(at, norms[..., i], scales[..., i])
        finally:
            self.reports += new
            self._tell(new)
        for report in new:
            self._act(report)

    def _judge(self, at: int, norm: Tensor, scale: Tensor) -> list[Report]:
        position, history = at + self._dropped, self._history
        if history.position is None or position != history.position + self.every:
            self.monitor.check(self.lm)
            if not self._silent:
                self._previous = "ok"
            history = self._history = History()
        history.add(position, norm, scale)
        self._recent.append((history.norms[-1].amax(0), history.gates[-1].mean(0)))
        if self._silent:
            return []
        report = self.monitor.judge(position, history)
        report = replace(report, action=self._choose(report))
        self._previous = report.status
        return [report]

    def _choose(self, report: Report) -> str | None:
        """What is to be done about a report."""
        changed, collapsed = report.status != self._previous, report.status == "collapsed"
        self._warnings += changed and report.status != "ok"
        if self._kind == "call":
            return "call"
        if self._kind == "warn":
            return "warn" if changed and report.status != "ok" else None
        if not collapsed:
            return None
        if self._handle is not None:
            if self._handle.on:
                return None
            if self._kind == "mitigate" and not math.isfinite(report.worst):
                return "none: a remedy does not make a state finite again, a rollback or fallback may"
            self._handle.on = True
        return self._action

    def _act(self, report: Report) -> None:
        if report.action == "call":
            assert self._callable is not None
            self._callable(report)
        elif report.action == "warn":
            warnings.warn(f"{self.lm.name} at {replace(report, action=None)}", RuntimeWarning, stacklevel=2)
        elif report.action == "raise":
            raise CollapseError(f"{self.lm.name} at {replace(report, action=None)}", report.position, report.heads)
        elif report.action == self._action and self._kind == "mitigate":
            self._handle.put()
        elif report.action == self._action:
            self._due = report

    def _tell(self, new: list[Report]) -> None:
        if self._log is not None and new:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            for r in new:
                heads = [[layer, head, _number(ratio)] for layer, head, ratio in r.heads]
                line = {"time": now, "position": r.position, "status": r.status, "heads": heads, "outside": r.outside,
                        "worst": _number(r.worst), "shift": _number(r.shift), "action": r.action}  # fmt: skip
                self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        if self._prometheus is not None:
            write_atomically(self._prometheus, self._exposition())

    def _exposition(self) -> str:
        last = self.reports[-1] if self.reports else Report(0, "ok", (), 0, 0.0, None)
        values = {
            "status": ("gauge", "0 ok, 1 warning, 2 drift, 3 collapsed.", STATUSES.index(last.status)),
            "worst_ratio": (
                "gauge",
                "Largest ratio of a state's norm to its envelope (of heads outside their margins, if any).",
                last.worst,
            ),
            "position": ("gauge", "Tokens read.", last.position),
            "warnings_total": ("counter", "Changes of status to another than ok.", self._warnings),
        }
        lines = []
        for name, (kind, text, value) in values.items():
            shown = "+Inf" if math.isinf(value) else f"{value:.6g}" if isinstance(value, float) else str(value)
            full = f"rnn_longctx_monitor_{name}"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {shown}"]
        return "\n".join(lines) + "\n"

    # --- reading, where an action reads again or falls between two segments

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The model's `read` is ours inside the block, if the action asks for it."""
        if self._kind not in ("mitigate", "rollback", "fallback"):
            yield
            return
        own = self.lm.read
        vars(self.lm)["read"] = lambda ids, cache, *more, **named: self._read(own, ids, cache, *more, **named)
        try:
            yield
        finally:
            del vars(self.lm)["read"]

    def _read(self, own: Callable, ids: Tensor, cache: Any, *more: Any, **named: Any) -> Tensor:
        if any(v is not None for v in (*more, *named.values())) or not ids.shape[1]:
            return own(ids, cache, *more, **named)  # masks and documents: the scan says what an observer refuses
        at = int(cache.position[0]) if _begun(cache) else 0
        if cache is not self._cache or at != self._at:
            self._cache, self._at, self._dropped, self._ids, self._history = cache, at, 0, [], History()
            self._snapshot = (_copy(cache), History()) if self._kind == "rollback" else None
        hidden, t = None, 0
        self._inside = True
        try:
            while t < ids.shape[1]:
                part = ids[:, t : t + self.every - self._at % self.every]
                out = own(part, cache)
                hidden = out if hidden is None else torch.cat([hidden, out], 1)
                t, self._at = t + part.shape[1], self._at + part.shape[1]
                if self._rereads:
                    hidden = self._keep(own, part, cache, hidden)
        finally:
            self._inside, self._due = False, None
        assert hidden is not None
        return hidden

    def _keep(self, own: Callable, part: Tensor, cache: Any, hidden: Tensor) -> Tensor:
        """Remember what an action needs, and take it if it is due. hidden (B, n, d) of the present call, so far."""
        if self._kind == "rollback" and self._handle.on and self._due is None:
            return hidden  # a rollback comes once
        self._ids.append(part)
        if self._at % self.every and self._due is None:
            return hidden
        ids = torch.cat(self._ids, 1)
        self._ids = [ids if self._kind == "rollback" else ids[:, -self.monitor.length :]]
        report, self._due = self._due, None
        if report is not None:
            return self._again(own, report, cache, hidden)
        if self._kind == "rollback" and self._history.position is not None and self.status == "ok":
            self._snapshot, self._ids = (_copy(cache), self._history.copy()), []
        return hidden

    def _again(self, own: Callable, report: Report, cache: Any, hidden: Tensor) -> Tensor:
        ids = again = self._ids[0]
        if self._kind == "rollback":
            assert self._snapshot is not None
            kept, self._history = self._snapshot
            vars(cache).update(vars(kept))
            self._handle.put()
            self._ids, self._snapshot = [], None
            same = ids.shape[1]
        else:
            answer = self._fallback(report, ids)
            if answer is None or (answer is ids and self._at <= ids.shape[1]):  # nothing older that could be dropped
                return hidden
            again = answer.to(ids.device)
            if again.ndim != 2 or len(again) != len(ids) or not again.shape[1] or again.is_floating_point():
                raise InputError(f"a fallback returns ids (B, n) of {len(ids)} rows, got shape {tuple(again.shape)}")
            cache.layers, cache.position = [], torch.zeros(0, dtype=torch.int64, device="cpu")
            self._dropped += self._at - again.shape[1]
            self._at, self._history = again.shape[1], History()
            n = min(ids.shape[1], again.shape[1])
            differ = (ids[:, ids.shape[1] - n :] != again[:, again.shape[1] - n :]).any(0).flip(0)
            same = int(differ.int().argmax()) if bool(differ.any()) else n
        outs, self._silent = hidden[:, :0], True
        try:
            for piece in again.split(SEGMENT, 1):
                outs = torch.cat([outs, own(piece, cache)], 1)[:, -hidden.shape[1] :]
        finally:
            self._silent = False
        same = min(same, outs.shape[1])
        return torch.cat([hidden[:, : hidden.shape[1] - same], outs[:, outs.shape[1] - same :]], 1)


def worked_out(lm: Any, name: str, kind: str) -> Any:
    """A remedy found for a model before it reads, and not on yet; `on` says whether it was switched on. Raises
    InputError for one that means nothing in mid-stream."""
    from rnn_longctx.mitigations import mitigate

    handle: Any = mitigate(lm, name)
    handle.remove()
    plan = handle.plan
    if plan.restart or plan.reader:
        raise InputError(f"{kind}:{name} is a way to read, which cannot begin in mid-stream: take fallback:truncate")
    if any(p.window is not None or p.start is not None or p.reset is not None for p in plan.policies):
        raise InputError(f"{kind}:{name} says how a stream starts or what it holds from its start on: it cannot begin "
                         "in mid-stream")  # fmt: skip
    handle.on = False
    return handle


def _begun(cache: Any) -> bool:
    return bool(cache.seen if hasattr(cache, "seen") else cache.layers)


def _copy(cache: Any) -> Any:
    """Of this library's cache, whose tensors are never written into, or a deep one."""
    return cache.clone() if hasattr(cache, "library") else copy.copy(cache)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)
