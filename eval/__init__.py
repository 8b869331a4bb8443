"""Curves over length: tasks, results, verdicts, plots."""

from rnn_longctx.eval.jobs.base import Context, Task
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.run import TASKS, EvalConfig, evaluate, parse_task
from rnn_longctx.eval.search.calibrate import calibrate

__all__ = ["TASKS", "Context", "EvalConfig", "Results", "Task", "calibrate", "evaluate", "parse_task"]
