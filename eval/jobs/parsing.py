"""Jobs by their names: `lm`, the loss of a text, or any task of `rnn_longctx.tasks`, whose answers are judged."""

from __future__ import annotations

from dataclasses import fields

from rnn_longctx.errors import InputError, nearest
from rnn_longctx.eval.jobs.base import Job
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.jobs.recall import Counts, Recall
from rnn_longctx.spec import arguments, build
from rnn_longctx.tasks.base import TASKS, Task


def parse_task(text: str | Task | Job) -> Job:
    """Return the job of `name:key=value,...`, whose parameters are those of the task and, of any task, how many
    examples are asked (`Counts`).

    Raises:
        InputError: unknown names, parameters and bad values.
    """
    if isinstance(text, Job):
        return text
    if isinstance(text, Task):
        return Recall(text)
    if not isinstance(text, str):
        raise InputError(f"expected a task such as lm or passkey:n=100, got {text!r:.80}")
    if any(_known(piece.strip().partition(":")[0]) for piece in text.split(",")[1:]):
        raise InputError(f'{text!r}: several tasks are a list, as in ["lm", "passkey"]; here, --task once for each')
    name = text.strip().partition(":")[0]
    if not _known(name):
        raise InputError(f"unknown task {name!r}{nearest(name, [LossOverLength.name, *TASKS])}")
    if name == LossOverLength.name:
        return build(LossOverLength, arguments(text, fields(LossOverLength), "task"), text, "task")
    return parse_recall(text)


def parse_recall(text: str) -> Recall:
    """Return the job of a task in `name:key=value,...`. Raises InputError as `parse_task` does, and for a job that asks
    for no answer."""
    name = text.strip().partition(":")[0]
    if name == LossOverLength.name:
        raise InputError(f"{name} asks for no answer; there are {', '.join(TASKS)}")
    task, counts = fields(TASKS[name]), fields(Counts)
    several = sorted({f.name for f in task} & {f.name for f in counts})
    if several:
        raise InputError(f"task {name}: {', '.join(several)} says how many examples are asked of every task: rename it")
    values = arguments(text, (*counts, *task), "task")
    parts = [{f.name: values[f.name] for f in of if f.name in values} for of in (counts, task)]
    return Recall(build(TASKS[name], parts[1], text, "task"), build(Counts, parts[0], text, "task"))


def _known(name: str) -> bool:
    return name == LossOverLength.name or name in TASKS
