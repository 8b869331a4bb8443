"""The tuned setting against the default, on data that the search has not seen, by seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from rnn_longctx.eval.stats import Interval, paired_bootstrap
from rnn_longctx.eval.tune.problem import Held, Problem, mean
from rnn_longctx.files import write_atomic
from rnn_longctx.progress import Say

FILE, TUNED = "held_out.csv", "tuned.yaml"


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison.

    Attributes:
        table: a row a measurement (and one a metric over all of it, `what` "all"): metric, what, length, the means over
            seeds of the default, the tuned setting and others, and the difference tuned - default with its 95% interval.
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
    write_atomic(out / FILE, comparison.table.to_csv(index=False).encode())
    key = "mixer" if problem.kind == "mixer" else "mitigation"
    found = {key: tuned, "default": default, "beats_default": comparison.beats, "verdict": comparison.verdict}
    write_atomic(out / TUNED, yaml.safe_dump(found, sort_keys=False, width=1000).encode())
    return comparison


def judged(held: Mapping[str, Sequence[Sequence[Held]]], default: str, tuned: str, metric: str) -> Comparison:
    """Return what measurements of seeds say. metric: that was searched for, "loss" or "recall".

    Differences are paired by seed; intervals are of Student's t over seeds."""
    rows, overall = [], {}
    columns = {"default": default, "tuned": tuned} | {s: s for s in held if s not in (default, tuned)}
    keys = list(dict.fromkeys((h.metric, h.what, h.length) for seed in held[default] for h in seed))
    groups = [(m, "all", None) for m in dict.fromkeys(m for m, _, _ in keys)] + keys
    for m, what, length in groups:
        values = {}
        for column, setting in columns.items():
            values[column] = [
                mean(
                    [h.value for h in seed if h.metric == m and what in ("all", h.what) and length in (None, h.length)]
                )
                for seed in held[setting]
            ]
        difference = paired_bootstrap(values["tuned"], values["default"])
        if what == "all":
            overall[m] = difference
        row = {"metric": m, "what": what, "length": length}
        row |= {column: mean(v) for column, v in values.items()}
        rows.append(row | {"difference": difference.value, "low": difference.low, "high": difference.high,
                           "seeds": difference.n})  # fmt: skip
    table = pd.DataFrame(rows).astype({"length": "Int64"})
    beats, verdict = _verdict(overall, metric, tuned, default)
    return Comparison(default, tuned, table, beats, verdict)


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
