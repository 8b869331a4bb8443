"""One cell of a comparison in a process of its own: `python -m rnn_longctx.eval.compare.cell FOLDER NAME` trains the
model (or goes on where it was killed), says in trained.json what its learning rate is judged by, and, where that is the
rate chosen for its entry, measures it into measured.json."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rnn_longctx.config import load_yaml, to_dict
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.eval.cells import alone
from rnn_longctx.eval.compare.choice import Trial, best_rate, trial_of
from rnn_longctx.eval.compare.config import Cell, CompareConfig
from rnn_longctx.eval.compare.measures import Row, Subject, measure
from rnn_longctx.eval.energy import Meter
from rnn_longctx.eval.pool import end_with_parent
from rnn_longctx.files import write_atomic
from rnn_longctx.models import checkpoint
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.plugins import load_handed_on
from rnn_longctx.train import TrainingDiverged, train
from rnn_longctx.train.autocast import in_bfloat16
from rnn_longctx.train.prepare import claim_run
from rnn_longctx.train.snapshots import changed
from rnn_longctx.train.team import training_device

STUDY = "study.yaml"
# Of a training config: what does not change what is trained.
_NEUTRAL = ("out", "device", "log_every", "checkpoint_every")


def folder_of(study: Path, cell: Cell) -> Path:
    return study / "cells" / cell.name


def trial(config: CompareConfig, cell: Cell, study: Path) -> Trial | None:
    """Return how the training of a cell went, or None where it is not finished, or was another one."""
    known = _read(folder_of(study, cell) / "trained.json", _trained_as(config, cell))
    return None if known is None else Trial(**known["trial"])


def chosen(config: CompareConfig, entry: str, study: Path) -> float | None:
    """Return the learning rate of an entry, or None as long as a rate is not tried. Raises InputError: none is any
    use."""
    trials = {cell.rate: trial(config, cell, study) for cell in config.trials(entry)}
    finished = {rate: known for rate, known in trials.items() if known is not None}
    return best_rate(finished) if len(finished) == len(trials) else None


def measured(config: CompareConfig, cell: Cell, study: Path) -> tuple[dict[str, Any], list[Row]] | None:
    """Return what a cell's model is, and the rows that were measured of it; None where it is not measured, or was in
    another way."""
    known = _read(folder_of(study, cell) / "measured.json", _measured_as(config, cell))
    return None if known is None else (known["about"], known["rows"])


def spent(config: CompareConfig, cell: Cell, study: Path) -> dict[str, float]:
    """Return what training took, by metrics: `train_tokens`, `train_seconds` and, where they could be read,
    `train_joules`; with a score, `score_tokens` and `score_seconds` up to it, infinite where it was not reached. Empty
    where the log is not there any more."""
    try:
        with (folder_of(study, cell) / "log.csv").open() as file:
            log = [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return {}
    known = _read(folder_of(study, cell) / "trained.json", _trained_as(config, cell))
    if known is None or not log:
        return {}
    values = {f"train_{name}": log[-1][name] for name in ("tokens", "seconds")}
    if not math.isnan(joules := known.get("joules", math.nan)):
        values["train_joules"] = joules
    if (score := config.score) is not None:
        limits = [(k, v) for k, v in (("loss", score.loss), ("passkey_loss", score.answer_loss)) if v is not None]
        reached = [row for row in log if all(row[name] <= value for name, value in limits)]
        for name in ("tokens", "seconds"):
            values[f"score_{name}"] = reached[0][name] if reached else math.inf
    return values


def is_done(config: CompareConfig, cell: Cell, study: Path) -> bool:
    """Whether a cell is trained, and measured if it is to be."""
    how = trial(config, cell, study)
    if how is None:
        return False
    return measured(config, cell, study) is not None or not _is_measured(config, cell, study)


def run_cell(config: CompareConfig, cell: Cell, study: Path) -> None:
    """Train and measure one cell, unless it is done.

    Raises:
        InputError: a folder of another run, bad settings; training diverged, with a rate that was chosen.
    """
    folder = folder_of(study, cell)
    with alone(folder):
        how = trial(config, cell, study) or _train(config, cell, folder)
        if not _is_measured(config, cell, study) or measured(config, cell, study) is not None:
            return
        if how.fault:
            raise InputError(how.fault)
        entry, c = config.entry(cell.entry), config.measure
        if not _is_saved(folder):  # models are large, and may have been left behind where the rest was taken along
            _train(config, cell, folder)
        model = _load(config, cell, folder)
        subject = Subject(model, entry.longest or sys.maxsize, folder / "results", c.batch)
        if cell.train_length == config.train.train_length:
            rows = measure(subject, c)
        else:
            rows = [] if c.loss is None else list(c.loss.forgetting(subject))
        done = {"as": _measured_as(config, cell), "about": _about(model), "rows": rows}
        write_atomic(folder / "measured.json", json.dumps(done).encode())
        shutil.rmtree(folder / "snapshots", ignore_errors=True)


def _train(config: CompareConfig, cell: Cell, folder: Path) -> Trial:
    training = config.training(cell, str(folder))
    how, joules = None, math.nan
    if _is_saved(folder):
        claim_run(training)  # else an entry that has changed would go by the weights of what it was
    else:
        in_one_go = not (folder / "log.csv").exists()
        meter, began = Meter(training_device(config.device)), time.monotonic()
        try:
            train(training)
        except TrainingDiverged as error:  # so this rate is too large, which is an answer
            how = Trial(math.nan, fault=one_line(error))
        joules = meter.joules(time.monotonic() - began) if in_one_go else math.nan
    how = how or trial_of(_load(config, cell, folder), training)
    done: dict[str, Any] = {"as": _trained_as(config, cell), "trial": vars(how)}
    done |= {} if math.isnan(joules) else {"joules": joules}
    write_atomic(folder / "trained.json", json.dumps(done).encode())
    return how


def _is_saved(folder: Path) -> bool:
    return (folder / "model" / "config.json").exists()  # a model appears whole


def _load(config: CompareConfig, cell: Cell, folder: Path) -> LanguageModel:
    """Return the model of a cell; weights are bfloat16 where products of the training were."""
    device = training_device(config.device)
    dtype = torch.bfloat16 if in_bfloat16(config.train.amp, device) else None
    model = checkpoint.load(folder / "model", device=device, dtype=dtype)
    model.name = cell.name
    return model


def _is_measured(config: CompareConfig, cell: Cell, study: Path) -> bool:
    """Whether a cell is one of those that are measured."""
    return cell.train_length != config.train.train_length or cell.rate == chosen(config, cell.entry, study)


def _about(model: LanguageModel) -> dict[str, Any]:
    """Return the number of parameters, and the numbers that a row keeps when it has read the training length."""
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "state": model.state_size().total(model.train_length or 0)}


def _trained_as(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    return _plain({k: v for k, v in to_dict(config.training(cell, "-")).items() if k not in _NEUTRAL})


def _measured_as(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """What is measured, and of what; how many streams are read side by side changes nothing of it."""
    settings = {k: v for k, v in to_dict(config.measure).items() if k != "batch"}
    settings["longest"] = config.entry(cell.entry).longest
    return _plain({"trained": _trained_as(config, cell), "measure": settings})


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON makes of it."""
    return json.loads(json.dumps(value))


def _read(file: Path, how: dict[str, Any]) -> dict[str, Any] | None:
    """Return a file that was written for these settings, or None."""
    try:
        known = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return known if isinstance(known.get("as"), dict) and not changed(known["as"], how) else None


if __name__ == "__main__":
    end_with_parent()
    try:
        load_handed_on()
        where = Path(sys.argv[1])
        study_config = load_yaml(CompareConfig, where / STUDY)
        run_cell(study_config, study_config.find(sys.argv[2]), where)
    except InputError as error:
        sys.exit(f"{error}")
