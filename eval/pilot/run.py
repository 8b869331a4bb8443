"""Run a pilot within its budget: measure steps in their order, begin none that does not fit, and write what they say.

The budget is of a folder: what runs before took counts, those that were killed as well. A step is begun only where its
predicted time, a fifth more, and what the report takes fit into what is left; one that takes longer than predicted is
stopped between two segments of text when nothing is left. So a pilot ends late by no more than a segment, an answer to
a batch of prompts or a calibration, in which nobody looks at the clock, and by what the report takes
longer than thought.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from rnn_longctx.config import counted, home_path
from rnn_longctx.data import Text
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.eval.jobs.base import Measuring
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.jobs.recall import Recall
from rnn_longctx.eval.pilot.cells import cells_of, count_cells
from rnn_longctx.eval.pilot.config import PilotConfig
from rnn_longctx.eval.pilot.estimate import (
    MOST_PROMPTS,
    RESERVE,
    RESERVE_OF_LOADING,
    SAFETY,
    Estimate,
    Predictor,
    Scope,
    TimeLeft,
    choose,
    further,
    lengths_up_to,
    stages_within,
)
from rnn_longctx.eval.pilot.findings import finalists
from rnn_longctx.eval.pilot.ledger import FAILED, MEASURED, NOT_APPLICABLE, STOPPED, Ledger
from rnn_longctx.eval.pilot.limits import checked_train_length, least_lengths, longest_length, text_name, with_training
from rnn_longctx.eval.pilot.speed import ROWS, Speeds
from rnn_longctx.eval.pilot.steps import (
    FINALISTS,
    PLAIN,
    Sizes,
    Step,
    candidates,
    controls,
    final_steps,
    first_steps,
    other_steps,
)
from rnn_longctx.eval.pilot.trial import measure_speeds
from rnn_longctx.eval.plan import mitigated, plan
from rnn_longctx.eval.question import Question
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.tables.sheets import SETTING
from rnn_longctx.eval.tune.budget import own_peak, time_text
from rnn_longctx.mitigations import NotApplicable, diagnostics, parse_remedy
from rnn_longctx.models.checkpoint.locate import former_name
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.probes.probe import probe
from rnn_longctx.progress import Say
from rnn_longctx.tasks.base import Task
from rnn_longctx.version import __version__

LOOKS = 256  # tokens between two looks of the probe
HELD = 3  # times what a row carries that a call holds: what it was given, what it hands on, and what is made of both
OVERDUE, PATIENCE = 2.0, 20.0  # times as long as predicted, and seconds, that a step may take at least


class TimeIsUp(Exception):
    """A step takes longer than predicted, and nothing is left of the budget."""


class Pilot:
    """A pilot of one model on one text. `estimate`, then `measure`; what is known then is in the folder.

    Args:
        began: `time.monotonic()` when the run began: loading the model counts.
    Raises:
        InputError: a model that cannot be piloted, a text that is too short, lengths within the training length alone,
            a task that fits into none, a folder that cannot be written.
    """

    def __init__(self, model: LanguageModel, text: Text, config: PilotConfig, began: float, say: Say):
        self.model, self.text, self.config, self.say = model, text, config, say
        self.train_length = checked_train_length(model)
        named = None if config.lengths is None else with_training(config.lengths, self.train_length)
        longest = longest_length(model, text, self.train_length, None if named is None else max(named))
        tasks = self._tasks(named, longest)
        self.folder = home_path(config.out)
        self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.results = Results(config.out)
        # No snapshots of unfinished streams: states, and the tokens that a control reads again, hold text.
        self.measuring = Measuring(
            *(model, "none", None, text, config.batch),
            segment=SEGMENTS[model.device.type],
            seed=config.seed,
            results=self.results,
            snapshot_seconds=math.inf,
        )
        # What lies there of this model gets the training length of today.
        self.results.relabel(model.name, self.measuring.weights_hash, self.train_length, former_name(model.name))
        diagnoses = diagnostics(self.train_length) if model.attends else []
        self.scope = Scope(named, longest, tasks, diagnoses)
        self.ledger = Ledger(self.folder, self._settings(), began)
        self.speeds = Speeds(self.ledger.speeds, bool(model.calibration))
        beside = Measuring(model, text=text, batch=config.batch, segment=self.measuring.segment, seed=config.seed)
        beside.memory = self.measuring.memory
        self.predictor = Predictor(beside, self.speeds, self.train_length)
        stopped = {name: step for name, step in self.ledger.steps.items() if step["outcome"] == STOPPED}
        self.predictor.least = {name: OVERDUE * step["seconds"] for name, step in stopped.items()}
        self.not_applicable: dict[str, str] = {}
        self.not_measured: list[dict[str, Any]] = []
        self.stored = self.frame()
        self.reused = 0
        self.reserve = max(RESERVE, RESERVE_OF_LOADING * (time.monotonic() - began))
        self.measuring.progress = self._advance
        self.running, self.latest = False, math.inf

    # --- before anything is measured

    def _tasks(self, named: tuple[int, ...] | None, longest: int) -> dict[Task, int]:
        """Return the tasks with the shortest length, of those that may be asked, that their prompts fit into."""
        lengths = named or lengths_up_to(longest, self.train_length)
        within = [n for n in lengths if n >= self.train_length]
        return least_lengths(self.config.tasks, within, MOST_PROMPTS, self.config.seed, self.model.tokenizer)

    def _settings(self) -> dict[str, Any]:
        """Return what a ledger belongs to: of another model, text or question nothing is taken up."""
        key = self.measuring.key()
        return {
            **{column: key.get(column) for column in (*SETTING, "batch", "device", "backend", "seed")},
            "text_hash": self.text.hash,
            "lengths": self.scope.lengths and list(self.scope.lengths),
            "tasks": [f"{task} {text_name(task)}" for task in self.config.tasks],
            "train_length": self.train_length,
            "version": __version__,
        }

    def frame(self) -> pd.DataFrame:
        """Return what the folder holds of this model, text and question."""
        return cells_of(self.measuring, self.text, self.config.tasks)

    def estimate(self) -> tuple[Sizes, Estimate]:
        """Measure speeds where no run before did, choose the sizes, and return them with what they will take."""
        measure_speeds(self.predictor, self.text, self.scope.longest, self.config.budget, self.ledger.tick)
        budget = f"{self.config.budget:g}"
        if budget in self.ledger.sizes:
            values: dict[str, Any] = self.ledger.sizes[budget]
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            sizes = Sizes(**values)
        else:
            sizes = choose(self.predictor, self.scope, max(1.0, self.time.seconds))
            self.ledger.sizes = {budget: asdict(sizes)}
            self.ledger.finalists = None  # those of other sizes are not its own
        self.ledger.speeds = self.speeds.stored()
        stages, seconds = stages_within(self.predictor, self.scope, sizes, self.time, self._is_stored)
        rows = min(self.config.batch, max(sizes.slices, sizes.prompts, sizes.final_slices, sizes.final_prompts))
        peak = own_peak(self.model.device) + HELD * self.speeds.row_bytes * max(0, rows - ROWS)
        peak += self._growth(sizes.farthest, max(sizes.slices, sizes.final_slices))
        price = None if self.config.price is None else self.config.price * seconds / 3600
        self.ledger.save()
        return sizes, Estimate(stages, seconds, peak, price)

    def leave_nothing(self) -> None:
        """Remove what this run has made, where it measured nothing and its folder was not there before."""
        if not self.made or self.results.rows():
            return
        self.ledger.path.unlink(missing_ok=True)
        for path in (self.folder / "cells", *self.made):
            with contextlib.suppress(OSError):  # what is not empty stays
                path.rmdir()

    @property
    def time(self) -> TimeLeft:
        """Where it stands in its budget."""
        return TimeLeft(self.config.budget, self.ledger.spent, self.reserve)

    def _growth(self, length: int, rows: int) -> float:
        """Return the bytes that attention's keys and values take, where the model has any."""
        state = self.model.state_size()
        return float((state.total(length) - state.total(0)) * rows * next(self.model.parameters()).element_size())

    # --- measuring

    def measure(self, sizes: Sizes) -> None:
        """Measure all steps that fit into the budget.

        Raises:
            InputError: not even the first does, and nothing is stored.
        """
        steps = first_steps(sizes, self.train_length, self.scope.tasks, self.scope.diagnoses)
        self._need_room(steps[0])
        self._measure_all(steps)
        if self.ledger.finalists is None and self._can_choose(steps):
            best = self.ledger.finalists = finalists(self.frame(), candidates(self.train_length), self.speeds.processor)
            sizes = further(self.predictor, self.scope, sizes, self.time.seconds, best)
            self.ledger.sizes = {f"{self.config.budget:g}": asdict(sizes)}
            self.ledger.save()
        if self.ledger.finalists:
            self._measure_all(final_steps(sizes, self.train_length, self.scope.tasks, self.ledger.finalists))
        self._measure_all(other_steps(sizes, self.train_length, self.scope.tasks))
        if self.reused:
            cells = counted(self.reused, "cell")
            self.say(f"{cells} had been measured before and were taken as they are")

    def _can_choose(self, steps: Sequence[Step]) -> bool:
        """Whether the losses of the bare model, of the controls and of enough remedies are there to choose the best of
        them by; those that are not applicable are not waited for."""
        frame = self.frame()
        losses = [step for step in steps if isinstance(step.job, LossOverLength)]
        there = {step.remedy for step in losses if self._count_stored(step, frame)}
        rivals = {"none", *controls(self.train_length)} - set(self.not_applicable)
        remedies = set(candidates(self.train_length)) - set(self.not_applicable)
        return rivals <= there and len(remedies & there) >= max(1, min(FINALISTS, len(remedies)))

    def _need_room(self, step: Step) -> None:
        if self._is_stored(step) or self._fits(step):
            return
        self.leave_nothing()
        needed = self.ledger.spent + SAFETY * self.predictor.seconds(step) + self.reserve
        raise InputError(
            f"a budget of {time_text(self.config.budget)} is too small for anything: the shortest table takes about "
            f"{time_text(self.predictor.seconds(step))} after {time_text(self.ledger.spent)} of loading and trying "
            f"out; give --budget {math.ceil(1.1 * needed)}s or more"
        )

    def _fits(self, step: Step) -> bool:
        return self.time.fits(self.predictor.seconds(step))

    def _measure_all(self, steps: Sequence[Step]) -> None:
        for step in steps:
            known = self.ledger.steps.get(step.name, {})
            outcome = known.get("outcome")
            if outcome == NOT_APPLICABLE:
                self._cannot(step, known["why"])
            elif outcome == FAILED:
                self._leave(step, known["why"])
            elif self._is_stored(step):
                self.reused += self._count_stored(step)
            elif step.remedy in self.not_applicable:
                continue
            elif not self._fits(step):
                self._leave(step, "did not fit into the budget")
            else:
                self._measure(step)

    def _measure(self, step: Step) -> None:
        predicted, began = self.predictor.seconds(step), time.monotonic()
        budget = time_text(self.config.budget)
        self.say(f"[{time_text(self.ledger.spent)} of {budget}] {step.name}, about {time_text(predicted)}")
        outcome, why, self.running = MEASURED, "", True
        # A step that was guessed much too short is not to take what others need; without the first there is no answer.
        self.latest = began + max(PATIENCE, OVERDUE * predicted) if step.stage != PLAIN else math.inf
        try:
            if step.job is None:
                self._probe(step)
            else:
                self._read(step, predicted)
        except TimeIsUp:
            taken, why = time.monotonic() - began, "took longer than predicted"
            self.predictor.least[step.name] = OVERDUE * taken
            self._leave(step, why)
            self.say(f"{step.name}: stopped, it takes much longer than predicted")
            self.ledger.end(step.name, STOPPED, taken, predicted, why)
            return
        except InputError as error:
            if step.stage == PLAIN:  # without it there is no answer
                raise
            why = one_line(error, 300)
            # Prompts that cannot be made are no fault of the remedy, whose other steps go on.
            of_prompts = isinstance(step.job, Recall) and not isinstance(error, NotApplicable)
            if of_prompts or (step.remedy == "none" and step.job is not None):
                outcome = FAILED
                self._leave(step, why)
                self.say(f"{step.name}: not measured: {why}")
            else:
                outcome = NOT_APPLICABLE
                self._cannot(step, why)
        finally:
            self.running = False
        self.speeds.ready.add(step.remedy)
        self.ledger.speeds = self.speeds.stored()
        self.ledger.end(step.name, outcome, time.monotonic() - began, predicted, why)

    def _advance(self, tokens: int) -> None:
        """Look at the clock whenever some tokens were read. Raises TimeIsUp in a step that takes too long."""
        self.ledger.tick()
        if self.running and (self.time.seconds < 0 or time.monotonic() > self.latest):
            raise TimeIsUp

    def _leave(self, step: Step, why: str) -> None:
        """Note that a step was not measured, and why."""
        seconds = self.predictor.seconds(step)
        self.not_measured.append({"stage": step.stage, "step": step.name, "seconds": seconds, "why": why})

    def _cannot(self, step: Step, reason: str) -> None:
        """Note why a remedy is not applicable; that one which only reads prompts has no loss is no reason."""
        if isinstance(step.job, LossOverLength) and "reads prompts" in reason:
            return
        self.not_applicable.setdefault("the probe" if step.job is None else step.remedy, reason)

    def _read(self, step: Step, predicted: float) -> None:
        assert step.job is not None
        c = self.config
        question = Question.of(list(step.lengths), [step.job], [step.remedy], self.text, None, c.batch, c.seed)
        lengths = step.job.lengths(list(step.lengths), self.train_length)
        if step.stage == PLAIN:  # what a text lacks is said once
            step.job.check(self.measuring, lengths)
        name = str(parse_remedy(step.remedy))
        measurements = [m for m in plan(question, [self.measuring]) if m.mitigation == name]
        counted_tokens, began = self.predictor.tokens(step), time.monotonic()
        fresh, processor = sum(m.tokens for m in measurements), time.process_time()
        for measurement in measurements:
            with mitigated(measurement.measuring, measurement.handle):
                measurement.run()
        if isinstance(step.job, LossOverLength) and fresh == counted_tokens:
            if self.model.device.type == "cpu":
                self.speeds.processor[name] = (time.process_time() - processor) / fresh
            self.speeds.learn(step.remedy, fresh, time.monotonic() - began, predicted)

    def _probe(self, step: Step) -> None:
        every = max(1, min(LOOKS, self.train_length // 2))
        seed, length = self.config.seed, step.lengths[0]
        seen = probe(self.model, self.text, length, every=every, seed=seed, progress=self.measuring.progress)
        seen.save(self.folder / "probe")

    # --- what is there already

    def _is_stored(self, step: Step) -> bool:
        """Whether all cells of a step are there, with as many samples. (The remedy is not worked out: that is slow.)"""
        if step.job is None:
            known = self.ledger.steps.get(step.name, {}).get("outcome") == MEASURED
            return known and (self.folder / "probe" / "probe.json").is_file()
        return self._count_stored(step) > 0

    def _count_stored(self, step: Step, frame: pd.DataFrame | None = None) -> int:
        """Return the number of cells of a step, 0 where one is missing. frame: None: what was there before."""
        return count_cells(step, self.stored if frame is None else frame, self.measuring, self.train_length)
