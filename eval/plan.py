"""The list of measurements that answers a question: which job under which remedy, on which text, at which lengths."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from rnn_longctx.config import format_length
from rnn_longctx.data import Text, load_text
from rnn_longctx.eval.jobs.base import Job, Measuring
from rnn_longctx.eval.question import Question
from rnn_longctx.eval.results import Row
from rnn_longctx.eval.search.unseen import check_unseen
from rnn_longctx.mitigations import (
    Handle,
    NotApplicable,
    Remedy,
    active,
    diagnostics,
    handles_on,
    mitigate,
    parse_remedy,
)
from rnn_longctx.models.interface import LanguageModel


@dataclass(frozen=True)
class Trial:
    """A remedy and the jobs it is measured by. named: it was asked for by its name, so it has to be applicable."""

    remedy: Remedy
    jobs: list[Job]
    named: bool


@dataclass(frozen=True)
class Measurement:
    """One job under one remedy, which is worked out already.

    Attributes:
        mitigation: the canonical text of all that is on the model then.
        by_itself: a length is measured by itself, of several.
        tokens: how many it is going to read.
        stored: how many of the lengths need not be read: their cells are there.
    """

    measuring: Measuring
    handle: Handle
    mitigation: str
    job: Job
    lengths: list[int]
    by_itself: bool
    tokens: int
    stored: int

    @cached_property
    def id(self) -> str:
        """A name that no other measurement of a folder has: of the same one in every process."""
        with mitigated(self.measuring, self.handle):
            text = self.measuring.loaded_text.hash if self.job.kind == "loss" else None
            return self.measuring.snapshot_name(self.job.label, text, self.lengths)

    @property
    def name(self) -> str:
        """What it is called in a message."""
        of = f" of {self.measuring.loaded_text.name}" if self.job.kind == "loss" else ""
        return f"{self.mitigation}, {self.job.name}{of} at {','.join(map(format_length, self.lengths))}"

    def title(self, texts: bool) -> str:
        """Return what a progress bar says of it. texts: there are several, so losses say which one."""
        of = f" of {self.measuring.loaded_text.name}" if texts and self.job.kind == "loss" else ""
        at = f" at {format_length(*self.lengths)}" if self.by_itself else ""
        return f"{self.mitigation}, {self.job.name}{of}{at}"

    def missing(self) -> list[int]:
        """Return those of the lengths whose cells are not stored by now."""
        with mitigated(self.measuring, self.handle):
            return self.job.todo(self.measuring, self.lengths)

    def run(self) -> list[Row]:
        """Measure what is not stored yet, under the remedy. It has to be `mitigated`."""
        return list(self.job.run(self.measuring, self.lengths))


@contextmanager
def mitigated(measuring: Measuring, handle: Handle) -> Iterator[None]:
    """Put a remedy on the model inside the block, and its name into the keys of what is measured there."""
    handle.put()
    with handle:
        measuring.mitigation, measuring.calibration = active(handle.model, measuring.weights_hash)
        yield


def plan(question: Question, measurings: list[Measuring], apart: bool = False) -> list[Measurement]:
    """Return the measurements, text by text; prompts depend on no text, and are asked with the first.

    Args:
        apart: every length is a measurement of its own, where one pass does not give all of them.
    Raises:
        InputError: a remedy that cannot be put on the model or was calibrated on what is evaluated; NotApplicable: the
            model lacks what a remedy needs that was asked for by its name. A warning says so of others.
    """
    planner = _Planner(question, measurings[0].model, apart)
    trials = _trials(question, measurings[0])
    measurements = [m for trial in trials for m in planner.measurements(trial, measurings[0], first=True)]
    for measuring in measurings[1:]:
        for trial in trials:
            losses = Trial(trial.remedy, [job for job in trial.jobs if job.kind == "loss"], trial.named)
            measurements += planner.measurements(losses, measuring, first=False)
    return measurements


def _trials(question: Question, measuring: Measuring) -> list[Trial]:
    """Return every remedy with all jobs, and of a hybrid the controls that tell which part of it fails."""
    model, train_length = measuring.model, measuring.model.train_length
    remedies = question.remedies(train_length)
    trials = [Trial(remedy, question.jobs, question.names(remedy)) for remedy in remedies.values()]
    losses = [job for job in question.jobs if job.kind == "loss"]
    if train_length is None or not 1 < train_length < max(question.lengths) or not (model.attends and model.mixers):
        return trials
    if losses and "none" in remedies and active(model, measuring.weights_hash)[0] == "none":
        controls = map(parse_remedy, diagnostics(train_length))
        trials += [Trial(control, losses, False) for control in controls if str(control) not in remedies]
    return trials


class _Planner:
    """Works out every remedy once for a length, whatever it is measured by."""

    def __init__(self, question: Question, model: LanguageModel, apart: bool):
        self.question, self.model, self.apart = question, model, apart
        text = question.calibration_text
        self.calibration: Text | None = None if text is None else load_text(text)
        self.handles: dict[tuple[str, int], Handle] = {}

    def measurements(self, trial: Trial, measuring: Measuring, first: bool) -> list[Measurement]:
        """Return the measurements of a remedy on a text. One that is not applicable has none; on the first text that is
        an error where it was named, else a warning."""
        if not trial.jobs:
            return []
        try:
            self._check(trial, measuring)
        except NotApplicable as error:
            if first and trial.named:
                raise
            if first:
                logging.getLogger(__name__).warning("%s is not applicable: %s", trial.remedy, error)
            return []
        measurements = []
        for job in trial.jobs:
            lengths = job.lengths(self.question.lengths, self.model.train_length)
            single = trial.remedy.per_length or (self.apart and not job.one_pass)
            for some in [[n] for n in lengths] if single else [lengths] if lengths else []:
                handle = self._handle(trial.remedy, max(some if trial.remedy.per_length else lengths))
                with mitigated(measuring, handle):
                    if self.model.reader is None or job.reads_prompts:  # it has no loss of tokens that it does not read
                        tokens, stored = job.cost(measuring, some), len(some) - len(job.todo(measuring, some))
                        of = (measuring, handle, measuring.mitigation, job, some, single)
                        measurements.append(Measurement(*of, tokens, stored))
        return measurements

    def _check(self, trial: Trial, measuring: Measuring) -> None:
        """Refuse a remedy that is not applicable, or was calibrated on the text."""
        with mitigated(measuring, self._handle(trial.remedy, max(self.question.lengths))):
            if any(job.kind == "loss" for job in trial.jobs):
                named = self.question.calibration_text
                check_unseen(handles_on(self.model), measuring.loaded_text, measuring.text, named)
            if self.model.reader is not None and not any(job.reads_prompts for job in trial.jobs):
                raise NotApplicable(f"{trial.remedy} reads prompts, and has no loss of a text: give one like passkey")

    def _handle(self, remedy: Remedy, target: int) -> Handle:
        """Return a remedy for that many tokens, which is not on the model."""
        key = (str(remedy), target)
        if key not in self.handles:
            with mitigate(self.model, remedy, target_length=target, text=self.calibration) as handle:
                self.handles[key] = handle
        return self.handles[key]
