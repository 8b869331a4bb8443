"""What a pilot is going to take, from a short measured speed and a count of the tokens of each step; and the sizes that
fit a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rnn_longctx.eval.jobs.base import Measuring
from rnn_longctx.eval.jobs.recall import Recall
from rnn_longctx.eval.pilot.speed import PROBE, Speeds
from rnn_longctx.eval.pilot.steps import (
    FINALISTS,
    STAGES,
    Sizes,
    Step,
    Tasks,
    candidates,
    final_steps,
    first_steps,
    other_steps,
)
from rnn_longctx.eval.plan import mitigated
from rnn_longctx.mitigations import Handle, parse_remedy

SAFETY = 1.2  # a step is begun only where so many times its predicted time is left
# Seconds that the tables and the report take at the end: at least so many, and so many times what loading took.
RESERVE, RESERVE_OF_LOADING = 4.0, 1.5
# Shares of the budget that reading the bare model far, the first steps, and those with the finals may take.
FAR, FIRST, ALL = 0.15, 0.75, 0.9
FARTHEST = 128  # training lengths that are read unless a person names longer ones
# Longest length in training lengths, slices, prompts: the richest that fits is taken.
LADDER = ((FARTHEST, 4, 20), (FARTHEST, 3, 10), (64, 3, 10), (64, 2, 10), (32, 2, 10), (32, 2, 5), (16, 2, 5),
          (8, 2, 5), (4, 2, 5), (2, 2, 5))  # fmt: skip
FINALS_LADDER = ((16, 60), (12, 40), (8, 30), (6, 20), (4, 20))
MOST_PROMPTS = max(prompts for *_, prompts in (*LADDER, *FINALS_LADDER))  # that a task is asked at a length
UNKNOWN_FINALIST = "one of the best remedies"


class Predictor:
    """Predicts the seconds of steps.

    Attributes:
        measuring: without results: all of a step is counted, whether some of it is stored or not.
        least: seconds that steps are going to take at least, by name: of those that were stopped before.
        handles: of remedies that were put on, by name: of controls, which read prompts' ends alone.
    """

    def __init__(self, measuring: Measuring, speeds: Speeds, train_length: int):
        self.measuring, self.speeds, self.train_length = measuring, speeds, train_length
        self.least: dict[str, float] = {}
        self.handles: dict[str, Handle] = {}
        self._tokens: dict[Step, int] = {}

    def tokens(self, step: Step) -> int:
        """Return the tokens of text that a step reads."""
        if step.job is None:
            return step.lengths[0]
        if step not in self._tokens:
            self._tokens[step] = self._count(step)
        return self._tokens[step]

    def _count(self, step: Step) -> int:
        assert step.job is not None
        lengths = step.job.lengths(list(step.lengths), self.train_length)
        handle = self.handles.get(step.remedy)
        if handle is not None and handle.plan.restart:
            with mitigated(self.measuring, handle):
                return step.job.cost(self.measuring, lengths)
        one_by_one = step.remedy != UNKNOWN_FINALIST and parse_remedy(step.remedy).per_length
        return sum(
            step.job.cost(self.measuring, some) for some in ([[n] for n in lengths] if one_by_one else [lengths])
        )

    def seconds(self, step: Step) -> float:
        """Return the seconds that a step is going to take."""
        return max(self._by_speed(step), self.least.get(step.name, 0.0))

    def _by_speed(self, step: Step) -> float:
        speeds, tokens = self.speeds, self.tokens(step)
        putting_on = 0.0 if step.remedy == UNKNOWN_FINALIST else speeds.putting_on(step.remedy, self.train_length)
        if step.job is None:
            return putting_on + PROBE * tokens / speeds.of("none")
        if step.remedy == UNKNOWN_FINALIST:
            remedies = candidates(self.train_length)
            known = [speeds.reading[name] for name in remedies if name in speeds.reading]
            speed = len(known) / sum(1 / s for s in known) if known else speeds.of(step.remedy)
        else:
            speed = speeds.of(step.remedy)
        generating = 0.0
        if isinstance(step.job, Recall):
            batches = math.ceil(step.job.counts.n / self.measuring.batch)
            generating = len(step.lengths) * batches * self._new_tokens(step.job, step.lengths[0]) * speeds.token
        return putting_on + tokens / speed + generating

    def _new_tokens(self, job: Recall, length: int) -> int:
        return self.measuring.memo(
            ("new", str(job), length), lambda: job.examples(self.measuring, length, 1)[0].new_tokens
        )

    def total(self, steps: Sequence[Step]) -> float:
        """Return the seconds of several steps; a remedy is put on once."""
        ready = set(self.speeds.ready)
        seconds = 0.0
        for step in steps:
            seconds += self.seconds(step)
            if step.remedy != UNKNOWN_FINALIST:
                self.speeds.ready.add(step.remedy)
        self.speeds.ready = ready
        return seconds


@dataclass(frozen=True)
class Scope:
    """What a pilot may measure.

    Attributes:
        lengths: in tokens, that the person named, with the training length; None: the pilot chooses them.
        longest: tokens, of which the text has two slices side by side.
        tasks: that recall is asked by; diagnoses: more controls, of hybrids.
    """

    lengths: tuple[int, ...] | None
    longest: int
    tasks: Tasks
    diagnoses: Sequence[str] = ()


@dataclass(frozen=True)
class TimeLeft:
    """Where a pilot stands in its budget, in seconds. reserve: what the tables and the report take at the end."""

    budget: float
    spent: float
    reserve: float

    @property
    def seconds(self) -> float:
        return self.budget - self.spent - self.reserve

    def fits(self, seconds: float) -> bool:
        """Return whether a step of so many predicted seconds may be begun."""
        return SAFETY * seconds <= self.seconds


@dataclass(frozen=True)
class Estimate:
    """What is printed before a pilot begins, and written.

    Attributes:
        stages: of each in its order: stage, steps, tokens, seconds, begun (how many of the steps fit).
        seconds: of all that fits, loading and the report included; peak_bytes: of memory; price: None where none an
            hour was named.
    """

    stages: list[dict[str, Any]]
    seconds: float
    peak_bytes: float
    price: float | None

    def about(self) -> dict[str, Any]:
        return vars(self)


def finals_of_unknown(sizes: Sizes, train_length: int, tasks: Tasks) -> list[Step]:
    """Return the steps of the finals before it is known whose they are."""
    return final_steps(sizes, train_length, tasks, [UNKNOWN_FINALIST] * FINALISTS)


def lengths_up_to(longest: int, train_length: int) -> tuple[int, ...]:
    """Return half of the training length, itself, and its doublings."""
    doublings = [train_length << k for k in range((longest // train_length).bit_length())]
    return (*([train_length // 2] if train_length > 1 else []), *doublings)


def choose(predictor: Predictor, scope: Scope, left: float) -> Sizes:
    """Return the richest sizes whose steps fit into `left` seconds: the first steps into FIRST of it, all into ALL; the
    thinnest where none do."""
    train_length, rungs = predictor.train_length, []
    for factor, slices, prompts in LADDER:
        longest = factor * train_length
        if scope.lengths is not None or longest <= scope.longest:
            lengths = lengths_up_to(longest, train_length) if scope.lengths is None else scope.lengths
            rungs.append(Sizes(lengths, lengths, lengths, slices, prompts, slices, prompts))

    def first(sizes: Sizes) -> float:
        return predictor.total(first_steps(sizes, train_length, scope.tasks, scope.diagnoses))

    sizes = next((sizes for sizes in rungs if first(sizes) <= FIRST * left), rungs[-1])
    further = sizes.longest
    while scope.lengths is None and 2 * further <= min(scope.longest, FARTHEST * train_length):
        further *= 2
        far = replace(sizes, plain=lengths_up_to(further, train_length))
        if predictor.seconds(first_steps(far, train_length, {})[0]) > FAR * left:
            break
        sizes = far
    taken = first(sizes)
    for slices, prompts in (*FINALS_LADDER, (sizes.slices, sizes.prompts)):
        more = replace(sizes, final=sizes.plain, final_slices=slices, final_prompts=prompts)
        taking = taken + predictor.total(finals_of_unknown(more, train_length, scope.tasks))
        if slices >= sizes.slices and taking <= ALL * left:
            return more
    return sizes


def further(predictor: Predictor, scope: Scope, sizes: Sizes, left: float, finalists: Sequence[str]) -> Sizes:
    """Return the sizes of the finals, once speeds are those of the steps that were measured: as far as `left` seconds
    go, then as much text; those chosen before where that is no further."""
    train_length, longest = predictor.train_length, sizes.final[-1]
    while scope.lengths is None and 2 * longest <= min(scope.longest, FARTHEST * train_length):
        longest *= 2
    while longest > sizes.final[-1]:
        for slices, prompts in (*FINALS_LADDER, (sizes.slices, sizes.prompts)):
            final = lengths_up_to(longest, train_length)
            more = replace(sizes, final=final, final_slices=slices, final_prompts=prompts)
            steps = final_steps(more, train_length, scope.tasks, finalists)
            if slices >= sizes.slices and SAFETY * predictor.total(steps) <= left:
                return more
        longest //= 2
    return sizes


def stages_within(
    predictor: Predictor, scope: Scope, sizes: Sizes, time: TimeLeft, is_stored: Callable[[Step], bool]
) -> tuple[list[dict[str, Any]], float]:
    """Return the stages of an `Estimate`, and the seconds of the whole pilot.

    Args: is_stored: of steps that a run before this one measured.
    """
    train_length = predictor.train_length
    steps = first_steps(sizes, train_length, scope.tasks, scope.diagnoses)
    steps += finals_of_unknown(sizes, train_length, scope.tasks) + other_steps(sizes, train_length, scope.tasks)
    stages: dict[str, dict[str, Any]] = {
        stage: {"stage": stage, "steps": 0, "begun": 0, "tokens": 0, "seconds": 0.0} for stage in STAGES
    }
    ready = set(predictor.speeds.ready)
    for step in steps:
        if step.remedy != UNKNOWN_FINALIST and is_stored(step):
            continue
        row, seconds = stages[step.stage], predictor.seconds(step)
        row["steps"] += 1
        if time.fits(seconds):
            time = replace(time, spent=time.spent + seconds)
            row["begun"] += 1
            row["tokens"] += predictor.tokens(step)
            row["seconds"] += seconds
            if step.remedy != UNKNOWN_FINALIST:
                predictor.speeds.ready.add(step.remedy)
    predictor.speeds.ready = ready
    return list(stages.values()), time.spent + time.reserve
