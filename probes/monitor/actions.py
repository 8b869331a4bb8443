"""What a watch does about a report: warn, raise, call, switch a remedy on, or read again."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from rnn_longctx.errors import CollapseError, InputError, nearest
from rnn_longctx.mitigations import Handle, mitigate
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.probes.monitor.judge import Report

ACTIONS = ("warn", "raise", "mitigate:NAME", "rollback:NAME", "fallback:truncate")

Fallback = Callable[[Report, Tensor], Tensor | None]


@dataclass
class Action:
    """One action, worked out before the model reads.

    Attributes:
        text: how a report names it.
        kind: call, warn, raise, mitigate, rollback or fallback.
        call: of the kind call.
        remedy: of mitigate and rollback, planned and not on yet; `remedy_on` says whether it was switched on.
        fallback: of the kind fallback, from a report and the last ids to the ids that are read instead of the state.
    """

    text: str
    kind: str
    call: Callable[[Report], object] | None = None
    remedy: Handle | None = None
    remedy_on: bool = False
    fallback: Fallback | None = None

    @property
    def rereads(self) -> bool:
        """Whether it reads tokens again."""
        return self.kind in ("rollback", "fallback")

    @property
    def between_segments(self) -> bool:
        """Whether it falls between two segments, so that the model has to read one at a time."""
        return self.rereads or self.kind == "mitigate"

    def choose(self, report: Report, previous: str) -> str | None:
        """Return what is to be done about a report, in words, or None. previous: the status before it."""
        if self.kind == "call":
            return self.text
        if self.kind == "warn":
            return self.text if report.status not in (previous, "ok") else None
        if report.status != "collapsed" or self.remedy_on:
            return None
        if self.kind == "mitigate" and not math.isfinite(report.worst):
            return "none: a remedy does not make a state finite again, a rollback or fallback may"
        self.remedy_on = self.remedy is not None
        return self.text

    def take(self, report: Report, model: str) -> None:
        """Do what `choose` said about a report. What reads again is left to the reading. model: its name."""
        if report.action != self.text:
            return
        if self.call is not None:
            self.call(report)
        elif self.kind == "warn":
            warnings.warn(f"{model} at {replace(report, action=None)}", RuntimeWarning, stacklevel=2)
        elif self.kind == "raise":
            raise CollapseError(f"{model} at {replace(report, action=None)}", report.position, report.heads)
        elif self.kind == "mitigate":
            self.put()

    def put(self) -> None:
        """Put the remedy on the model."""
        assert self.remedy is not None
        self.remedy.put()

    def close(self) -> None:
        """Take the remedy off, if it was put on."""
        if self.remedy is not None:
            self.remedy.remove()


def parse_action(model: LanguageModel, action: str | Callable[[Report], object], fallback: Fallback | None) -> Action:
    """Return an action as it is named in `CollapseMonitor.on`. Raises InputError for one that is not known, or cannot
    be taken on this model."""
    if callable(action):
        parsed = Action("call", "call", call=action)
    elif isinstance(action, str):
        parsed = _named(model, action, fallback)
    else:
        raise InputError(f"expected an action or a callable, got {action!r} (choices: {', '.join(ACTIONS)})")
    if fallback is not None and parsed.kind != "fallback":
        raise InputError(f"a fallback goes with the action 'fallback', not with {action!r}")
    return parsed


def _named(model: LanguageModel, text: str, fallback: Fallback | None) -> Action:
    kind, _, name = text.partition(":")
    if kind in ("mitigate", "rollback") and name:
        return Action(text, kind, remedy=plan_remedy(model, name, kind))
    if kind == "fallback" and (fallback is None) == (name == "truncate") and name in ("truncate", ""):
        return Action(text, kind, fallback=fallback or (lambda report, ids: ids))
    if text in ("warn", "raise"):
        return Action(text, kind)
    kinds = {a.partition(":")[0]: a for a in ACTIONS}  # what follows the colon is not what was misspelt
    meant = next(iter(difflib.get_close_matches(kind, kinds, n=1, cutoff=0.4)), None)
    raise InputError(f"unknown action {text!r}{nearest(kinds[meant] if meant else kind, ACTIONS)}")


def plan_remedy(model: LanguageModel, name: str, kind: str) -> Handle:
    """Return a remedy planned for a model before it reads, and not on yet. Raises InputError for one that means nothing
    in mid-stream."""
    handle = mitigate(model, name)
    handle.remove()
    plan = handle.plan
    if plan.restart or plan.reader:
        raise InputError(f"{kind}:{name} is a way to read, which cannot begin in mid-stream: take fallback:truncate")
    if any(p.window is not None or p.start is not None or p.reset is not None for p in plan.policies):
        raise InputError(
            f"{kind}:{name} says how a stream starts or what it holds from its start on: it cannot begin in mid-stream"
        )
    return handle
