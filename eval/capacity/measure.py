"""One model: does it forget, and how far does it recall? Rows go into the table of results as any evaluation's do."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rnn_longctx.config import counted, format_length
from rnn_longctx.data import Text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import models
from rnn_longctx.eval.capacity.config import MeasureConfig
from rnn_longctx.eval.capacity.recall import Answers, Recall, recall_of, search
from rnn_longctx.eval.jobs.base import Measuring
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.jobs.recall import Recall as Job
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.run import evaluate
from rnn_longctx.mitigations import Remedy, active, mitigate, parse_remedy
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.progress import Say, silent
from rnn_longctx.tasks.base import TooShort

START = 1024  # where the search for T_recall begins, of a model whose training length is not known


def measure(model: LanguageModel, c: MeasureConfig, out: str | Path, say: Say = silent, **about: Any) -> None:
    """Measure `model` under every remedy; what is stored in `out` already is not measured again.

    say: is given a line a finding, and one a length that recall is asked at. about: columns of models.csv that the
        model does not say itself.
    """
    out = Path(out)
    check(model, c)
    models.put(out, models.describe(model, **about))
    for remedy in map(parse_remedy, c.mitigations):
        say(f"{model.name}, {remedy}: {_forgets(model, remedy, c, out)}")
        for task in c.tasks:
            say(f"{model.name}, {remedy}: T_recall of {task.label} {t_recall(model, task, remedy, c, out, say)}")


def check(model: LanguageModel, c: MeasureConfig) -> None:
    """Refuse what cannot be put on the model or asked of it, and a haystack that is shorter than the longest context,
    before an hour is spent on what can. Raises InputError."""
    for remedy in map(parse_remedy, c.mitigations):
        with mitigate(model, remedy, target_length=c.limit):
            pass
    for task in c.tasks:
        longest, hay = min(c.limit, task.max or c.limit), task.task.text
        if isinstance(hay, Text) and len(hay) < longest:  # a token is at least a byte
            raise InputError(
                f"{task.label}: {hay.name} has {counted(len(hay), 'byte')}; a context of {longest} tokens was asked for"
            )
        task.check(Measuring(model, text=c.text, seed=c.seed), [longest])


def _forgets(model: LanguageModel, remedy: Remedy, c: MeasureConfig, out: Path) -> str:
    """Loss from the training length to the limit, doubling; the verdict is drawn from the table (see tables.py)."""
    train = model.train_length
    if train is None:
        return "training length unknown, so nothing is said of forgetting"
    with mitigate(model, remedy, target_length=c.limit):
        if model.reader is not None:
            return "reads prompts, and has no loss of a text"
    lengths = [train]
    while lengths[-1] < c.limit:
        lengths.append(min(2 * lengths[-1], c.limit))
    evaluate(model, lengths, [LossOverLength(slices=c.slices)], [remedy], text=c.text, out=str(out), batch=c.batch)
    return f"loss measured to {format_length(lengths[-1])}"


def t_recall(
    model: LanguageModel, task: Job, remedy: Remedy, c: MeasureConfig, out: str | Path | None = None, say: Say = silent
) -> Recall:
    """The longest context, within `c.limit`, at which `task` shows a recall of `c.recall`."""
    results, bare = Results(out) if out else None, Measuring(model)
    n = task.counts.n

    def now() -> Measuring:
        name, calibration = active(model, bare.weights_hash)
        segment = SEGMENTS[model.device.type]
        return Measuring(model, name, calibration, c.text, c.batch, segment, c.seed, results, memory=bare.memory)

    def ask(length: int, prompts: int) -> Answers:
        with mitigate(model, remedy, target_length=length) if remedy.per_length else nullcontext():
            measuring = now()
            stored = results.get(task.key(measuring, length)) if results else None
            if stored is None or stored["n"] < prompts:
                fewer = replace(task, counts=replace(task.counts, n=prompts, least=prompts))
                stored = [row for row in fewer.run(measuring, [length]) if row["depth"] is None][-1]
            samples = stored["samples"]
            right, asked = int(sum(samples)), len(samples)
            say(f"{model.name}, {remedy}: {task.label} at {format_length(length)}: {right}/{asked}")
            return right, asked

    def fits(length: int) -> bool:
        try:
            task.check(now(), [length])
        except TooShort:
            return False
        return True

    limit = min(c.limit, task.max or c.limit)
    with nullcontext() if remedy.per_length else mitigate(model, remedy, target_length=limit):
        recall = recall_of(search(ask, fits, model.train_length or START, limit, c.recall, n), c.recall)
    assert recall is not None
    return recall
