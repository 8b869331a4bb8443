"""The search: which setting is tried next, and what is said of a trial in the study."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rnn_longctx.errors import InputError
from rnn_longctx.eval.pool import last_line, python
from rnn_longctx.eval.tune.budget import Budget, memory_text, peak_of, time_text
from rnn_longctx.eval.tune.problem import Problem, folder_of
from rnn_longctx.eval.tune.trial import RESULT
from rnn_longctx.progress import Say

STORAGE = "tune.db"
STARTUP = 8  # trials drawn at random before the sampler goes by those that there are
UNPRUNED = 4  # trials that end before one is pruned by their median
REPEATS = 200  # settings in a row that are no new ones, after which nothing new is expected
WAIT = 0.2  # seconds between two looks at a trial


class Ended(NamedTuple):
    """How a trial's process ended: "done", "pruned", "memory", "time" or "failed"; peak: bytes."""

    how: str
    peak: int


class Search:
    """The trials of a study, one after another."""

    def __init__(self, optuna: ModuleType, study: Any, problem: Problem, out: Path, budget: Budget, say: Say):
        self.optuna, self.study, self.problem, self.out = optuna, study, problem, out
        self.budget, self.say = budget, say
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=problem.warmup)
        self.tried: dict[str, int] = {
            t.user_attrs["setting"]: t.number for t in study.trials if t.state.is_finished() and self._is_own(t)
        }

    def run(self) -> str | None:
        """Make trials until the time is up; return the best setting, or None.

        Raises:
            InputError: the budget fits no trial; the default setting cannot be measured.
        """
        if not self.study.trials:
            self.study.enqueue_trial(self.problem.space.params())
        for trial in self._unfinished():
            if not self._go_on(trial):
                return self.best()
        idle = 0
        while self._is_time() and idle < REPEATS:
            trial = self._ask()
            ran = self._try(trial)
            if ran is None:
                break
            idle = 0 if ran else idle + 1
        if idle == REPEATS:
            self.say("no new setting is left to try")
        return self.best()

    # --- which trial

    def _ask(self) -> Any:
        self._seed(len(self.study.trials))
        return self.study.ask()

    def _unfinished(self) -> list[Any]:
        running = [t for t in self.study.trials if t.state == self.optuna.trial.TrialState.RUNNING]
        return [(t.number, t._trial_id) for t in running]

    def _go_on(self, which: tuple[int, int]) -> bool:
        """Go on with a trial that was killed; whether there is time for more."""
        if not self._is_time():
            return False
        self._seed(which[0])
        return self._try(self.optuna.trial.Trial(self.study, which[1])) is not None

    def _seed(self, number: int) -> None:
        # (a trial that runs is no other worker's, to be kept clear of: it is the one that is asked for)
        self.study.sampler = self.optuna.samplers.TPESampler(seed=number, n_startup_trials=STARTUP, constant_liar=False)

    # --- a trial

    def _try(self, trial: Any) -> bool | None:
        """Run a trial; return whether it was run and has ended; None: the time is up."""
        states = self.optuna.trial.TrialState
        values = self.problem.space.suggest(trial)
        try:
            setting = self.problem.space.text(values)
            trial.set_user_attr("setting", setting)
            self.problem.check(setting)
        except InputError as error:
            trial.set_user_attr("note", f"refused: {error}")
            trial.set_constraint("refused", 1.0)
            self.study.tell(trial, state=states.PRUNED)
            return False
        if setting in self.tried:
            trial.set_user_attr("note", f"as trial {self.tried[setting]}")
            self.study.tell(trial, state=states.FAIL)
            return False
        ended = self._process(trial, setting)
        if ended.how == "time":
            if trial.number == 0:
                raise InputError(
                    f"the budget fits no trial: the default setting, {setting}, was not measured within "
                    f"{time_text(self.budget.seconds)}; run again with more time, and it goes on"
                )
            self.say(f"trial {trial.number}: {setting}: no time left")
            return None
        self._tell(trial, setting, ended)
        self.tried[setting] = trial.number
        self.problem.tidy(folder_of(self.out, setting))
        if trial.number == 0 and not self._is_time():
            self._refuse_budget()
        return True

    def _process(self, trial: Any, setting: str) -> Ended:
        """Run the process of a trial to its end, or end it."""
        folder = folder_of(self.out, setting)
        folder.mkdir(parents=True, exist_ok=True)
        before = trial.user_attrs.get("seconds", 0.0)
        left = self._left(trial)
        began, peak, how = time.monotonic(), 0, ""
        with (folder / "log.txt").open("ab") as log:
            command = python("rnn_longctx.eval.tune.trial", str(self.out), setting)
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ)
        try:
            while True:
                running = process.poll() is None
                peak = max(peak, peak_of(process.pid) or 0) if running else peak
                if self._pruned(trial, folder):
                    how = "pruned"
                elif self._is_over(peak) and trial.number:
                    how = "memory"
                elif running and time.monotonic() - began > left:
                    how = "time"
                if how or not running:
                    break
                time.sleep(WAIT)
                trial.set_user_attr("seconds", round(before + time.monotonic() - began, 1))
        finally:
            process.kill()
            process.wait()
        trial.set_user_attr("seconds", round(before + time.monotonic() - began, 1))
        return Ended(how or ("done" if process.returncode == 0 else "failed"), peak)

    def _pruned(self, trial: Any, folder: Path) -> bool:
        """Tell the study what the trial has found so far; whether it is to end there."""
        known = self.study._storage.get_trial(trial._trial_id).intermediate_values
        last = max(known, default=-1)
        for step, value in self.problem.reports(folder).items():
            if step < last:
                continue
            if step > last:
                trial.report(value, step)
            if trial.number and trial.should_prune():
                return True
        return False

    def _tell(self, trial: Any, setting: str, ended: Ended) -> None:
        """Write down what came of a trial."""
        states = self.optuna.trial.TrialState
        folder = folder_of(self.out, setting)
        if ended.how in ("pruned", "memory"):
            peak = ended.peak
            note = "pruned" if ended.how == "pruned" else f"ended over the memory budget, at {memory_text(peak)}"
            trial.set_user_attr("note", note)
            trial.set_user_attr("peak_bytes", peak)
            if ended.how == "memory":
                trial.set_constraint("memory", 1.0)
            self.study.tell(trial, state=states.PRUNED)
            self.say(f"trial {trial.number}: {setting}: {note}")
            return
        result = json.loads((folder / RESULT).read_text()) if ended.how == "done" else {}
        why = result.get("fault") or ("" if result else last_line(folder / "log.txt") or "failed")
        if why:
            if trial.number == 0:
                raise InputError(f"the default setting, {setting}, cannot be measured: {why}")
            trial.set_user_attr("note", why)
            self.study.tell(trial, state=states.FAIL)
            self.say(f"trial {trial.number}: {setting}: {why}")
            return
        peak = max(result["peak_bytes"], 0)
        for name in ("recall", "about"):
            trial.set_user_attr(name, result[name])
        trial.set_user_attr("peak_bytes", peak)
        default = self.study.trials[0].user_attrs["recall"]
        trial.set_constraint("recall", default - result["recall"])
        # (not by how much, which differs a little from run to run: then the next trials would)
        trial.set_constraint("memory", 1.0 if self._is_over(peak) else 0.0)
        notes = ["recall below the default's"] if result["recall"] < default else []
        notes += ["over the memory budget"] if self._is_over(peak) else []
        trial.set_user_attr("note", "; ".join(notes))
        value = result["value"] if math.isfinite(result["value"]) else math.inf
        self.study.tell(trial, value)
        found = f"{self.problem.metric if self.problem.metric == 'loss' else '1 - recall'} {value:.4f}"
        found += f", recall {result['recall']:.3f}" if self.problem.metric == "loss" else ""
        seconds = time_text(trial.user_attrs["seconds"])
        self.say(
            f"trial {trial.number}: {setting}: {found}, {seconds}, {memory_text(peak)}"
            + "".join(f"; {note}" for note in notes)
        )

    # --- the budget, and the best

    def best(self) -> str | None:
        """Return the setting of the least value among those that keep recall and the memory budget, of equals the
        earlier."""
        complete = [t for t in self.study.trials if t.state == self.optuna.trial.TrialState.COMPLETE]
        fit = [t for t in complete if all(v <= 0 for v in t.constraints.values()) and math.isfinite(t.value)]
        best = min(fit, key=lambda t: (t.value, t.number), default=None)
        return None if best is None else best.user_attrs["setting"]

    def _is_over(self, peak: int) -> bool:
        return self.budget.memory is not None and peak > self.budget.memory

    def _spent(self) -> float:
        return sum(t.user_attrs.get("seconds", 0.0) for t in self.study.trials)

    def _first_seconds(self) -> float | None:
        """Return how long the default setting took, or None as long as it is not measured."""
        first = self.study.trials[:1]
        done = first and first[0].state == self.optuna.trial.TrialState.COMPLETE
        return first[0].user_attrs["seconds"] if done else None

    def _left(self, trial: Any = None) -> float:
        """Return the seconds left for trials: the comparison is kept time for."""
        first = self._first_seconds() or 0.0
        return self.budget.seconds - self._spent() - first * self.problem.comparison

    def _is_time(self) -> bool:
        """Whether there is time for one more trial, as long as the default's."""
        return self._left() >= (self._first_seconds() or 0.0)

    def _refuse_budget(self) -> None:
        first = self._first_seconds() or 0.0
        least = first * (2 + self.problem.comparison)
        raise InputError(
            f"the budget fits no trial: the default setting took {time_text(first)}, and with one candidate and the "
            f"comparison that is about {time_text(least)}, more than {time_text(self.budget.seconds)}; run again with "
            "more time, and it goes on"
        )

    @staticmethod
    def _is_own(trial: Any) -> bool:
        """Whether a trial was run for a setting of its own, and is no repetition of another."""
        note = trial.user_attrs.get("note", "")
        return "setting" in trial.user_attrs and not note.startswith(("as trial", "refused"))
