"""The search: which setting is tried next, and what is written down of a trial.

What the next trial is follows from the trials before it and its number alone: not from time, nor from how much memory
exactly they took. So a search that was killed goes on as it would have gone on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

from rnn_longctx.devices import device_of
from rnn_longctx.errors import InputError
from rnn_longctx.eval.pool import last_line, python
from rnn_longctx.eval.tune.budget import Budget, memory_text, time_text
from rnn_longctx.eval.tune.problem import Problem, folder_of
from rnn_longctx.eval.tune.process import Ended, run
from rnn_longctx.eval.tune.trial import RESULT
from rnn_longctx.progress import Say

STARTUP = 8  # trials drawn at random before the sampler goes by those that there are
UNPRUNED = 4  # trials that end before one may be pruned for being worse than their median
REPEATS = 20  # suggestions in a row that are no new settings, after which none is expected
SAVED = 2.0  # seconds between two savings of how long a trial runs


class Search:
    """The trials of an Optuna study, one after another."""

    def __init__(self, optuna: ModuleType, study: Any, problem: Problem, out: Path, budget: Budget, say: Say):
        self.optuna, self.study, self.problem, self.out = optuna, study, problem, out
        self.budget, self.say, self.states = budget, say, optuna.trial.TrialState
        self.on_cpu = device_of(problem.device).type == "cpu"
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=problem.warmup)

    def run(self) -> str:
        """Make trials until the time is up; return the best setting of those that keep the default's recall and the
        memory budget, of equals the earlier.

        Raises:
            InputError: the budget fits no trial, or no setting fits the memory; the default setting cannot be measured.
        """
        if not self._trials():
            self.study.enqueue_trial(self.problem.space.params())
        self._make_trials()
        measured = [t for t in self._trials() if "peak_bytes" in t.user_attrs]
        if len(measured) < 2:
            self._refuse_time()
        complete = [t for t in measured if t.state == self.states.COMPLETE and math.isfinite(t.value)]
        fit = [t for t in complete if all(v <= 0 for v in t.constraints.values())]
        if not fit:
            peaks = min(t.user_attrs["peak_bytes"] for t in complete)
            raise InputError(
                f"no setting fits the memory budget of {memory_text(self.budget.memory or 0)}: of {len(measured)} that "
                f"were tried, the least that one held at its peak is {memory_text(peaks)}"
            )
        return min(fit, key=lambda t: (t.value, t.number)).user_attrs["setting"]

    def _make_trials(self) -> None:
        for t in self._trials():
            # One that was killed. (Optuna has no public way back to a trial of which it has told the number.)
            if t.state == self.states.RUNNING:
                self._seed(t.number)
                if not (self._is_time() and self._try(self.optuna.trial.Trial(self.study, t._trial_id))):
                    return
        idle = 0
        while self._is_time() and idle < REPEATS and not self._is_exhausted():
            self._seed(len(self._trials()))
            trial = self.study.ask()
            known = self._is_known(trial)
            idle = idle + 1 if known else 0
            if not known and not self._try(trial):
                return
        if idle == REPEATS or self._is_exhausted():
            self.say("no new setting is left to try")

    def _is_exhausted(self) -> bool:
        """Whether every setting has been suggested."""
        known = {tuple(sorted(t.params.items())) for t in self._trials() if t.state.is_finished()}
        return len(known) >= self.problem.space.size

    def _seed(self, number: int) -> None:
        # (constant_liar keeps clear of trials that others run: here that is the one which is asked for)
        sampler = self.optuna.samplers.TPESampler
        self.study.sampler = sampler(seed=number, n_startup_trials=STARTUP, constant_liar=False)

    # --- a trial

    def _is_known(self, trial: Any) -> bool:
        """Whether the setting of a trial is refused, or was tried before; then that is written down."""
        try:
            setting = self.problem.space.text(self.problem.space.suggest(trial))
            self.problem.check(setting)
        except InputError as error:
            if trial.number == 0:
                raise
            trial.set_user_attr("note", str(error))
            trial.set_constraint("refused", 1.0)
            self.study.tell(trial, state=self.states.PRUNED)
            return True
        others = self._trials()[: trial.number]
        same = next((t.number for t in others if t.user_attrs.get("setting") == setting), None)
        if same is not None:
            trial.set_user_attr("repeats", same)
            self.study.tell(trial, state=self.states.FAIL)
            return True
        trial.set_user_attr("setting", setting)
        return False

    def _try(self, trial: Any) -> bool:
        """Run a trial; return whether it has ended before the time is up."""
        if "setting" not in trial.user_attrs and self._is_known(trial):  # killed before it was known
            return True
        setting = trial.user_attrs["setting"]
        folder = folder_of(self.out, setting)
        folder.mkdir(parents=True, exist_ok=True)
        before, left, saved = trial.user_attrs.get("seconds", 0.0), self._left(), 0.0

        def look(seconds: float, peak: int) -> str:
            nonlocal saved
            if seconds - saved > SAVED:
                saved = seconds
                trial.set_user_attr("seconds", round(before + seconds, 1))
            if self._is_pruned(trial, folder):
                return "pruned"
            if trial.number and self.on_cpu and self._is_over(peak):
                return "memory"
            return "time" if seconds > left else ""

        ended = self._process(setting, folder, look)
        if ended.how == "time":
            self.say(f"trial {trial.number}: {setting}: no time left")
            return False
        self._tell(trial, setting, ended)
        self.problem.tidy(folder)
        return True

    def _process(self, setting: str, folder: Path, look: Any) -> Ended:
        return run(python("rnn_longctx.eval.tune.trial", str(self.out), setting), folder / "log.txt", look)

    def _is_pruned(self, trial: Any, folder: Path) -> bool:
        """Tell the study what the trial has found so far; whether it is to end there."""
        known = self._trials()[trial.number].intermediate_values
        last = max(known, default=-1)
        for step, value in self.problem.reports(folder).items():
            if step > last:
                trial.report(value, step)
            if step >= last and trial.number and trial.should_prune():
                return True
        return False

    def _tell(self, trial: Any, setting: str, ended: Ended) -> None:
        """Write down what came of a trial. Raises InputError: it is the default's, and cannot be measured."""
        folder, note = folder_of(self.out, setting), ended.how
        result = json.loads((folder / RESULT).read_text()) if ended.how == "done" else {}
        if ended.how == "memory":
            note = f"ended over the memory budget, at {memory_text(ended.peak)}"
            trial.set_constraint("memory", 1.0)
        elif ended.how == "failed":
            note = last_line(folder / "log.txt") or "failed"
        elif result.get("fault"):
            note = result["fault"]
        if ended.how in ("failed", "memory", "pruned") or result.get("fault"):
            if trial.number == 0:
                raise InputError(f"the default setting, {setting}, cannot be measured: {note}")
            trial.set_user_attr("note", note)
            if ended.how != "failed":
                trial.set_user_attr("peak_bytes", ended.peak)
            self.study.tell(trial, state=self.states.FAIL if ended.how == "failed" else self.states.PRUNED)
            self.say(f"trial {trial.number}: {setting}: {note}")
            return
        self._tell_measured(trial, setting, result)

    def _tell_measured(self, trial: Any, setting: str, result: dict[str, Any]) -> None:
        value, recall, peak = result["value"], result["recall"], result["peak_bytes"]
        for name in ("recall", "about", "peak_bytes"):
            trial.set_user_attr(name, result[name])
        default = self._trials()[0].user_attrs["recall"]
        trial.set_constraint("recall", default - recall)
        # (not by how much, which is not the same twice: then the trials after it would not be)
        trial.set_constraint("memory", 1.0 if self._is_over(peak) else 0.0)
        notes = ["recall below the default's"] if recall < default else []
        notes += ["over the memory budget"] if self._is_over(peak) else []
        trial.set_user_attr("note", "; ".join(notes))
        self.study.tell(trial, value)
        found = f"loss {value:.4f}, recall {recall:.3f}" if self.problem.metric == "loss" else f"recall {recall:.3f}"
        seconds = time_text(self._trials()[trial.number].user_attrs.get("seconds", 0.0))
        self.say("; ".join([f"trial {trial.number}: {setting}: {found}, {seconds}, {memory_text(peak)}", *notes]))

    def _trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    # --- the budget

    def _is_over(self, peak: int) -> bool:
        return self.budget.memory is not None and peak > self.budget.memory

    def _spent(self) -> float:
        return sum(t.user_attrs.get("seconds", 0.0) for t in self._trials())

    def _first(self) -> float:
        """Return the seconds that the default setting took, 0 as long as it is not measured."""
        first = self._trials()[0]
        return first.user_attrs["seconds"] if first.state == self.states.COMPLETE else 0.0

    def _left(self) -> float:
        """Return the seconds left for trials, without those that the comparison takes."""
        return self.budget.seconds - self._spent() - self._first() * self.problem.comparison

    def _is_time(self) -> bool:
        """Whether there is time for one more trial, as long as the default's."""
        return self._left() > self._first()

    def _refuse_time(self) -> None:
        first, budget = self._first(), time_text(self.budget.seconds)
        if not first:
            raise InputError(
                f"a budget of {budget} fits no trial: the default setting, {self.problem.space.default_text}, was not "
                "measured within it; with more time it goes on where it stopped"
            )
        least = time_text(max(first * (2 + self.problem.comparison), self.budget.seconds + first))
        raise InputError(
            f"a budget of {budget} fits no trial beside the default's, which took {time_text(first)}: with a candidate "
            f"and the comparison that is about {least}; with more time it goes on where it stopped"
        )
