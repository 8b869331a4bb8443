"""Curves over length: jobs, results, verdicts, plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnn_longctx.lazy import on_first_use

# Imported on first use: tables and pictures (`rnn_longctx.eval.tables`, `.show`) load no torch.
_WHERE = {
    "EvalConfig": "rnn_longctx.eval.question",
    "Job": "rnn_longctx.eval.jobs.base",
    "Measuring": "rnn_longctx.eval.jobs.base",
    "Question": "rnn_longctx.eval.question",
    "Results": "rnn_longctx.eval.results",
    "answer": "rnn_longctx.eval.run",
    "calibrate": "rnn_longctx.eval.search.calibrate",
    "evaluate": "rnn_longctx.eval.run",
    "parse_task": "rnn_longctx.eval.jobs.parsing",
}

__all__ = ["EvalConfig", "Job", "Measuring", "Question", "Results", "answer", "calibrate", "evaluate", "parse_task"]

if TYPE_CHECKING:
    from rnn_longctx.eval.jobs.base import Job, Measuring
    from rnn_longctx.eval.jobs.parsing import parse_task
    from rnn_longctx.eval.question import EvalConfig, Question
    from rnn_longctx.eval.results import Results
    from rnn_longctx.eval.run import answer, evaluate
    from rnn_longctx.eval.search.calibrate import calibrate

__getattr__, __dir__ = on_first_use(__name__, _WHERE)
