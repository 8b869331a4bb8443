"""One cell of a study in a process of its own: `python -m rnn_longctx.eval.capacity.cell STUDY NAME` trains the model
(or goes on where it was killed), measures it, and says in done.json what was measured."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rnn_longctx.config import load_yaml, to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import models
from rnn_longctx.eval.capacity.config import CapacityConfig, StudyCell, label
from rnn_longctx.eval.capacity.measure import measure
from rnn_longctx.eval.capacity.mqar import measure_mqar, train_mqar
from rnn_longctx.eval.cells import alone
from rnn_longctx.eval.pool import end_with_parent
from rnn_longctx.eval.results import Results
from rnn_longctx.files import write_atomic
from rnn_longctx.models import checkpoint
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.plugins import load_handed_on
from rnn_longctx.progress import to_stdout
from rnn_longctx.train import train
from rnn_longctx.train.snapshots import changed
from rnn_longctx.train.team import training_device

STUDY = "study.yaml"


def asked(config: CapacityConfig, cell: StudyCell) -> dict[str, Any]:
    """What a finished cell has measured: a cell that finds other settings in its done.json measures what is missing.
    How many streams it reads side by side, and which other cells there are, is no part of it."""
    if cell.task == "pretrain":
        return {}
    settings = to_dict(config.measure if cell.task == "text" else config.mqar)
    return {k: v for k, v in settings.items() if k not in ("batch", "tasks", "seeds")}


def is_done(config: CapacityConfig, cell: StudyCell, study: Path) -> bool:
    try:
        done = json.loads((study / "models" / cell.name / "done.json").read_text())
        now = asked(config, cell)
        return not changed({k: v for k, v in done.items() if k in now}, now)
    except (FileNotFoundError, ValueError):
        return False


def run_cell(config: CapacityConfig, cell: StudyCell, study: Path) -> None:
    """Train and measure one cell, unless it is done. One process at a time: another waits for it and finds it done."""
    folder = study / "models" / cell.name
    with alone(folder):
        if is_done(config, cell, study):
            return
        device = training_device(config.train.device)
        model: LanguageModel
        about: dict[str, Any] = {"shape": label(cell.model), "task": cell.task, "train_seed": cell.seed}
        if cell.task == "pretrain":
            train(config.training(cell, str(folder)))
        elif cell.task == "text":
            training = config.training(cell, str(folder))
            about["train_tokens"] = training.steps * training.batch_size * cell.train_length
            if config.pretrain is not None:
                start = config.start_of(cell)
                training = replace(training, init=str(study / "models" / start.name / "model"))
                first = config.training(start, "")
                about["train_tokens"] += first.steps * first.batch_size * start.train_length
            if not (folder / "model" / "config.json").exists():  # it appears whole
                train(training)
            model = checkpoint.load(folder / "model", device=device)
            model.name = cell.name
            measure(model, config.measure, study, to_stdout, **about)
        else:
            assert config.mqar is not None
            model = train_mqar(cell, config.mqar, folder, device, to_stdout)
            models.put(study, models.describe(model, **about))
            measure_mqar(model, cell, config.mqar, Results(study), to_stdout)
        write_atomic(folder / "done.json", json.dumps(asked(config, cell)).encode())
        if cell.task in ("text", "pretrain"):
            shutil.rmtree(folder / "snapshots", ignore_errors=True)


if __name__ == "__main__":
    end_with_parent()
    try:
        load_handed_on()
        where = Path(sys.argv[1])
        study_config = load_yaml(CapacityConfig, where / STUDY)
        run_cell(study_config, study_config.find(sys.argv[2]), where)
    except InputError as error:
        sys.exit(f"{error}")
