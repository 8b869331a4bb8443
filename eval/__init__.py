"""Curves over length: jobs, results, verdicts, plots."""

from rnn_longctx.eval.jobs.base import Job, Measuring
from rnn_longctx.eval.jobs.parsing import parse_task
from rnn_longctx.eval.question import EvalConfig, Question
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.run import answer, evaluate
from rnn_longctx.eval.search.calibrate import calibrate

__all__ = [
    "EvalConfig",
    "Job",
    "Measuring",
    "Question",
    "Results",
    "answer",
    "calibrate",
    "evaluate",
    "parse_task",
]
