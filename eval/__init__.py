"""Curves over length: tasks, results, verdicts, plots."""

from rnn_longctx.eval.calibrate import calibrate
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.run import TASKS, EvalConfig, evaluate, parse_task
from rnn_longctx.eval.task import Context, Task

__all__ = ["TASKS", "Context", "EvalConfig", "Results", "Task", "calibrate", "evaluate", "parse_task"]
