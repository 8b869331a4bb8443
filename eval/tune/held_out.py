"""The tuned setting against the default, on data that the search has not seen, by seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rnn_longctx.eval.stats import Interval, paired_bootstrap
from rnn_longctx.eval.tune.problem import Held, Problem, mean
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text
from rnn_longctx.progress import Say

FILE, TUNED = "held_out.csv", "tuned.yaml"


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison.

    Attributes:
        table: a row a measurement (and one a metric over all of it, `what` "all"): metric, what, length, the means over
            seeds of the default, the tuned setting and others, the difference tuned - default and its 95% interval.
        beats: whether the tuned setting is better by the metric that was searched for, and loses no recall.
        verdict: in words.
    """

    default: str
    tuned: str
    table: pd.DataFrame
    beats: bool
    verdict: str


def compared(problem: Problem, default: str, tuned: str, out: Path, say: Say) -> Comparison:
    """Measure both on held-out data, and write the table and the tuned setting."""
    held = problem.compare([default, tuned], out, say)
    comparison = judged(held, default, tuned, problem.metric)
    write_atomic(out / FILE, csv_text(comparison.table).encode())
    key = "mixer" if problem.kind == "mixer" else "mitigation"
    found = {key: tuned, "default": default, "beats_default": comparison.beats, "verdict": comparison.verdict}
    write_atomic(out / TUNED, yaml.safe_dump(found, sort_keys=False, width=1000).encode())
    return comparison


def judged(held: Mapping[str, Sequence[Sequence[Held]]], default: str, tuned: str, metric: str) -> Comparison:
    """Return what measurements say, a list of them a seed of every setting. metric: that was searched for, "loss" or
    "recall". Differences are paired by seed; intervals are of Student's t over seeds."""
    columns = {"default": default, "tuned": tuned} | {s: s for s in held if s not in (default, tuned)}

    def row(metric: str, what: str, length: int | None) -> tuple[Interval, dict[str, Any]]:
        def is_of(h: Held) -> bool:
            return h.metric == metric and what in ("all", h.what) and length in (None, h.length)

        values = {name: [mean([h.value for h in seed if is_of(h)]) for seed in held[columns[name]]] for name in columns}
        d = paired_bootstrap(values["tuned"], values["default"])
        means = {name: mean(v) for name, v in values.items()}
        interval = {"difference": d.value, "low": d.low, "high": d.high, "seeds": d.n}
        return d, {"metric": metric, "what": what, "length": length, **means, **interval}

    keys = list(dict.fromkeys((h.metric, h.what, h.length) for h in held[default][0]))
    overall, rows = {}, []
    for name in dict.fromkeys(key[0] for key in keys):
        overall[name], of_all = row(name, "all", None)
        rows += [of_all, *(row(*key)[1] for key in keys if key[0] == name)]
    beats, verdict = _verdict(overall, metric, tuned, default)
    return Comparison(default, tuned, pd.DataFrame(rows).astype({"length": "Int64"}), beats, verdict)


def _verdict(overall: Mapping[str, Interval], metric: str, tuned: str, default: str) -> tuple[bool, str]:
    d = overall[metric]
    better, worse = (d.high < 0, d.low > 0) if metric == "loss" else (d.low > 0, d.high < 0)
    loses = metric == "loss" and "recall" in overall and overall["recall"].high < 0
    words = f"{metric} {d.value:+.4f} (95% {d.low:+.4f} to {d.high:+.4f}, {d.n} seeds)"
    if math.isnan(d.low):
        return False, f"whether {tuned} beats the default, {default}, cannot be said: {words}"
    if better and not loses:
        return True, f"{tuned} beats the default, {default}, on held-out data: {words}"
    if better:
        r = overall["recall"]
        lost = f"recall {r.value:+.4f} (95% {r.low:+.4f} to {r.high:+.4f})"
        return False, f"{tuned} does not beat the default, {default}, on held-out data: {words}, but it loses {lost}"
    how = "is worse than" if worse else "does not beat"
    return False, f"{tuned} {how} the default, {default}, on held-out data: {words}"
