"""A mixer's parameters, tuned in the models of a comparison (`rnn_longctx.eval.compare`).

A trial trains models as the comparison does, of as much of what `equal` names as the default has, with two seeds at
each of its learning rates: by one alone, what learned early by luck would be chosen. Where the models learn text and a
loss is measured, the least held-out loss of the training texts is searched; else the most recall. Recall is that of the
config's `measure.recall`, of other examples than are measured on later, and no seed is one of the comparison's.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from rnn_longctx.config import from_dict, to_dict
from rnn_longctx.data import load_tokenizer
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.eval.cells import texts_for_cells
from rnn_longctx.eval.compare.cell import chosen, measured
from rnn_longctx.eval.compare.choice import learns_text, trial_of
from rnn_longctx.eval.compare.config import Cell, CompareConfig, Entry
from rnn_longctx.eval.compare.study import run_study
from rnn_longctx.eval.run import evaluate
from rnn_longctx.eval.tune.problem import Held, Outcome, mean, short, table_of
from rnn_longctx.eval.tune.space import Space
from rnn_longctx.models import checkpoint
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.progress import Say
from rnn_longctx.train import TrainConfig, TrainingDiverged, train
from rnn_longctx.train.config import EvaluateConfig
from rnn_longctx.train.mix import check_mix
from rnn_longctx.train.team import training_device

SEEDS = (1000, 1001)  # of the models of a trial: the comparison has 0, 1, ...
EXAMPLES = 1  # seed of the examples that trials are asked: what is measured on has 0
REPORTS = 4  # of a training, at which it may be pruned
PROMPTS = 50  # of a report, at each of its lengths
REACH = 4  # times the training length: no report asks further than that, for it would take longer than the training


@dataclass(frozen=True)
class Run:
    """One training of a trial."""

    rate: float
    seed: int

    def folder(self, trial: Path) -> Path:
        return trial / f"lr{self.rate:g}-s{self.seed}"


@dataclass(frozen=True)
class MixerProblem:
    """A mixer in the models of a comparison.

    Attributes:
        mixer: its name, with the parameters that stay as they are.
    """

    config: CompareConfig
    mixer: str

    kind: ClassVar[str] = "mixer"

    @classmethod
    def of(cls, described: dict[str, Any]) -> MixerProblem:
        return cls(from_dict(CompareConfig, described["config"]), described["mixer"])

    def described(self) -> dict[str, Any]:
        return {"mixer": self.mixer, "config": to_dict(self.config)}

    def prepared(self, out: Path) -> MixerProblem:
        """Return the problem with its texts gathered once, checked. Raises InputError: bad settings, no text."""
        config = self.config
        training_device(config.device)
        tokenizer = load_tokenizer(config.train.data.tokenizer)
        check_mix(config.train.data, tokenizer, config.shape.vocab_size)
        config.measure.check(tokenizer, config.shape.vocab_size)
        if config.measure.recall is None:
            raise InputError("measure.recall: nothing is asked, and recall guards what is tuned")
        self.check(self.space.default_text)
        texts = texts_for_cells(config.train.data.text, out)
        return replace(
            self, config=replace(config, train=replace(config.train, data=replace(config.train.data, text=texts)))
        )

    @cached_property
    def space(self) -> Space:
        return Space.of("mixer", self.mixer, _Configs(), None if self.entry is None else str(self.entry.mixer))

    @cached_property
    def entry(self) -> Entry | None:
        """The first entry of the config that has this mixer in all layers, which says the default."""
        name = self.mixer.partition(":")[0].strip()
        for entry in self.config.entries:
            if isinstance(entry.mixer, str) and entry.mixer.partition(":")[0].strip() == name:
                return entry
        return None

    @property
    def device(self) -> str:
        return self.config.device

    @property
    def seeds(self) -> int:
        return self.config.seeds

    @property
    def metric(self) -> str:
        by_loss = self.config.measure.loss is not None and learns_text(
            self._training(self.space.default_text, self._runs[0], "-")
        )
        return "loss" if by_loss else "recall"

    @property
    def comparison(self) -> float:
        rates = len(self.config.learning_rates)
        return 2 * (self.seeds + rates - 1) / (rates * len(SEEDS))

    @property
    def warmup(self) -> int:
        return self.config.train.steps // 2

    def check(self, setting: str) -> None:
        self._study([setting]).models  # noqa: B018  (is checked when made)

    def measure(self, setting: str, folder: Path) -> Outcome:
        at_rates: dict[float, list[Outcome]] = {}
        for run in self._runs:
            at_rates.setdefault(run.rate, []).append(self._trained(setting, run, folder))
        return min((_mean(rate, outcomes) for rate, outcomes in at_rates.items()), key=lambda outcome: outcome.value)

    @property
    def _runs(self) -> list[Run]:
        """The trainings of a trial: all seeds at a rate, then at the next."""
        return [Run(rate, seed) for rate in self.config.learning_rates for seed in SEEDS]

    def _trained(self, setting: str, run: Run, folder: Path) -> Outcome:
        training = self._training(setting, run, str(run.folder(folder)))
        try:
            where = train(training)
        except TrainingDiverged as error:
            return Outcome(math.inf, 0.0, fault=one_line(error))
        model = checkpoint.load(where, device=training_device(self.config.device))
        recall = self.config.measure.recall
        assert recall is not None
        frame = evaluate(
            model, recall.lengths, recall.jobs, ["none"], text="builtin", batch=self.config.measure.batch, seed=EXAMPLES
        )
        right = mean(frame.loc[(frame["metric"] == "accuracy") & frame["depth"].isna(), "value"].tolist())
        loss = trial_of(model, training).loss
        return Outcome(loss if self.metric == "loss" else 1 - right, right, {"held_out_loss": loss})

    def reports(self, folder: Path) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for i, run in enumerate(self._runs):
            for row in table_of(run.folder(folder) / "eval.csv"):
                if step := int(row["step"]):
                    value = float(row["loss"]) if self.metric == "loss" else 1 - float(row["passkey_accuracy"])
                    found.setdefault(i * self.config.train.steps + step, []).append(value)
        lengths = len(self._report_lengths)
        return {step: mean(values) for step, values in found.items() if len(values) == lengths}

    @property
    def _report_lengths(self) -> list[int]:
        """The training length, and the longer ones of those that recall is asked at, within REACH."""
        length, recall = self.config.train.train_length, self.config.measure.recall
        longer = [] if recall is None else [n for n in recall.lengths if length < n <= REACH * length]
        return [length, *longer]

    def tidy(self, folder: Path) -> None:
        for run in self._runs:
            for name in ("snapshots", "last", "best", "model"):
                shutil.rmtree(run.folder(folder) / name, ignore_errors=True)

    def compare(self, settings: Sequence[str], out: Path, say: Say) -> dict[str, list[list[Held]]]:
        config = replace(self._study(settings), out=str(out / "compare"))
        study = run_study(config, 1, (), say)
        config = replace(config.settled(), out=str(study))
        held: dict[str, list[list[Held]]] = {}
        for setting, entry in zip(settings, config.entries):
            rows = []
            for seed in range(config.seeds):
                rate = chosen(config, entry.name, study)
                assert rate is not None
                known = measured(config, Cell(entry.name, rate, seed, config.train.train_length), study)
                assert known is not None  # (else the study would have failed)
                rows.append([_held(row) for row in known[1] if row["metric"] in ("loss", "accuracy")])
            held[setting] = rows
        return held

    def _study(self, settings: Sequence[str]) -> CompareConfig:
        """Return the comparison of settings, the first of which the others are as large as."""
        default = self.space.default_text
        texts = list(dict.fromkeys([default, *settings]))
        like = self.entry or Entry("default", default)
        names = ["default" if text == default else f"tuned-{short(text)}" for text in texts]
        entries = [replace(like, name=name, mixer=text) for name, text in zip(names, texts)]
        return replace(self.config, entries=entries, forget=[])

    def _training(self, setting: str, run: Run, out: str) -> TrainConfig:
        study, t = self._study([setting]), self.config.train
        cell = Cell(study.entries[-1].name, run.rate, run.seed, t.train_length)
        prompts = PROMPTS if any(mixed.fraction for mixed in t.data.mixed) else 0
        every = max(1, math.ceil(t.steps / REPORTS))
        evaluation = EvaluateConfig(self._report_lengths, every=every, passkeys=prompts)
        return replace(study.training(cell, out), evaluate=evaluation, checkpoint_every=every)


class _Configs(dict[str, type]):
    """The dataclass of every mixer's parameters, by the mixer's name."""

    def __init__(self) -> None:
        super().__init__({name: kind.Config for name, kind in MIXERS.items()})


def _mean(rate: float, outcomes: Sequence[Outcome]) -> Outcome:
    """Return what the models of a rate say together. One that diverged is no use, nor is its rate then."""
    fault = next((outcome.fault for outcome in outcomes if outcome.fault), "")
    if fault:
        return Outcome(math.inf, 0.0, fault=fault)
    about = {key: mean([outcome.about[key] for outcome in outcomes]) for key in outcomes[0].about}
    value, recall = (mean([getattr(outcome, name) for outcome in outcomes]) for name in ("value", "recall"))
    return Outcome(value, recall, {"learning_rate": rate, **about})


def _held(row: dict[str, Any]) -> Held:
    loss = row["metric"] == "loss"
    return Held("loss" if loss else "recall", row["text"] if loss else row["task"], int(row["length"]), row["value"])
