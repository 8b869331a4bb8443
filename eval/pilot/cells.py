"""The cells that a pilot's folder holds: which belong to it, and whether a step is among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from rnn_longctx.data import Text
from rnn_longctx.eval.jobs.base import Measuring
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.jobs.recall import Recall
from rnn_longctx.eval.pilot.limits import text_name, with_blind
from rnn_longctx.eval.pilot.steps import Step
from rnn_longctx.eval.results import to_frame
from rnn_longctx.eval.tables.sheets import SETTING, alike
from rnn_longctx.mitigations import parse_remedy
from rnn_longctx.plain import plain
from rnn_longctx.tasks.base import Task


def cells_of(measuring: Measuring, text: Text, tasks: Sequence[Task]) -> pd.DataFrame:
    """Return what the folder of `measuring` holds of its model, a text and some tasks (where names stand plain)."""
    assert measuring.results is not None
    key = measuring.key()
    frame = to_frame(measuring.results.rows())
    same = alike(frame, {c: key.get(c) for c in (*SETTING, "batch", "device", "seed")})
    of_text = (frame["task"] == "lm") & (frame["text_hash"] == text.hash)
    names = {(plain(task.label), plain(text_name(task))) for task in with_blind(tasks)}
    of_tasks = pd.Series([pair in names for pair in zip(frame["task"], frame["text"])], frame.index, bool)
    return frame[same & (of_text | of_tasks)].reset_index(drop=True)


def count_cells(step: Step, frame: pd.DataFrame, measuring: Measuring, train_length: int) -> int:
    """Return the number of cells of a step in a frame, 0 where one is missing or has fewer samples than the step takes.
    (The remedy is not worked out: that is slow.)"""
    if step.job is None:
        return 0
    rows: Any = frame[frame["mitigation"] == plain(str(parse_remedy(step.remedy)))]
    rows = rows[rows["task"] == plain(step.job.label)]
    metric = "accuracy" if isinstance(step.job, Recall) else "nats_per_token"
    whole = rows[(rows["metric"] == metric) & rows["depth"].isna()]
    lengths = step.job.lengths(list(step.lengths), train_length)
    for length in lengths:
        at = whole[whole["length"] == length]
        if at.empty or int(at["n"].max()) < _samples(step, length, measuring):
            return 0
    return int(rows["length"].isin(lengths).sum())


def _samples(step: Step, length: int, measuring: Measuring) -> int:
    if isinstance(step.job, LossOverLength):
        return step.job.count(measuring, length)
    assert isinstance(step.job, Recall)
    return step.job.counts.at(length)
