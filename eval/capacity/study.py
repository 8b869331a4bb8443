"""A study: cells as processes side by side on one device, what to train next chosen by what is known so far.

Everything known is on disk (done.json of a cell, the table of results), so a study that is killed goes on where it
stopped, and one that is finished runs nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rnn_longctx.config import home_path, to_dict
from rnn_longctx.data import load_text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import models, tables
from rnn_longctx.eval.capacity.cell import STUDY, is_done
from rnn_longctx.eval.capacity.config import CapacityConfig, StudyCell
from rnn_longctx.eval.cells import run_cells, texts_for_cells
from rnn_longctx.eval.forget import next_models
from rnn_longctx.eval.pool import python
from rnn_longctx.eval.results import Results
from rnn_longctx.files import write_atomic
from rnn_longctx.progress import Say, to_stdout
from rnn_longctx.train.snapshots import claim_folder
from rnn_longctx.train.team import training_device

# Of `train`: settings that do not change what is trained. (Those that cut the work, and of MQAR the sequences measured
# and the seeds, are recorded as 1, whatever they are.)
_NEUTRAL = (
    *("out", "device", "log_every", "log_to", "checkpoint_every", "export_every", "save_layout", "fsdp"),
    "licences",
)


def run_study(config: CapacityConfig, parallel: int = 1, say: Say = to_stdout) -> Path:
    """Train and measure what the config asks for, `parallel` cells at a time; returns the folder of its tables.

    Raises InputError: a folder of another study, or that cannot be written; cells that failed, after all others ran.
    """
    if parallel < 1:
        raise InputError(f"parallel: expected a number of processes, got {parallel}")
    device = training_device(config.train.device)  # there is such a one
    study = home_path(config.out)
    train = to_dict(replace(config.train, accumulate=1, sequence_parallel=1))
    claim: dict[str, Any] = {"train": {k: v for k, v in train.items() if k not in _NEUTRAL}}
    claim |= {"pretrain": config.pretrain and to_dict(config.pretrain)}
    claim |= {"mqar": config.mqar and to_dict(replace(config.mqar, samples=1, seeds=1))}
    claim_folder(study, claim, ["models"])
    Results(study)  # it can be written
    text = load_text(config.measure.text).name  # and this read, before anything is trained
    texts = texts_for_cells(config.train.data.text, study)
    local = replace(config, train=replace(config.train, data=replace(config.train.data, text=texts)))
    write_atomic(study / STUDY, yaml.safe_dump(to_dict(local), sort_keys=False).encode())
    try:
        run_cells(_Cells(config, study, text), parallel, device, say)
    finally:
        Results(study).gather()
    return study


class _Cells:
    """The cells of a study for `run_cells`: which to train next follows from the outcomes so far.

    Attributes:
        text: the canonical name of the text that forgetting is tested on.
    """

    def __init__(self, config: CapacityConfig, study: Path, text: str):
        self.config, self.study, self.text = config, study, text
        self.known: dict[str, bool] = {}  # outcomes of the test of forgetting, by the names of cells

    def due(self) -> list[str]:
        return [cell.name for cell in _todo(self.config, self.study, self.known, self.text)]

    def command(self, name: str) -> list[str]:
        return command(self.config.find(name), self.study)

    def folder(self, name: str) -> Path:
        return self.study / "models" / name

    def is_done(self, name: str) -> bool:
        return is_done(self.config, self.config.find(name), self.study)

    def gather(self) -> None:
        models.gather(self.study)


def _todo(config: CapacityConfig, study: Path, known: dict[str, bool], text: str) -> list[StudyCell]:
    """Cells that may be run now, the next of every shape's search first."""
    cells_due = []
    for model in config.models:
        cells = {(n, s): StudyCell(model, n, s) for n in config.train_lengths for s in range(config.seeds)}
        outcomes: dict[tuple[int, int], bool] = {}
        for where, cell in cells.items():
            if cell.name not in known and is_done(config, cell, study):
                known[cell.name] = tables.passes(study, cell.name, config.measure.limit, text)
            if cell.name in known:
                outcomes[where] = known[cell.name]
        cells_due += [cells[where] for where in next_models(config.train_lengths, range(config.seeds), outcomes)]
    if config.pretrain is not None:
        ready = [cell if is_done(config, config.start_of(cell), study) else config.start_of(cell) for cell in cells_due]
        cells_due = list({cell.name: cell for cell in ready}.values())
    return cells_due + [cell for cell in config.mqar_cells() if not is_done(config, cell, study)]


def command(cell: StudyCell, study: Path) -> list[str]:
    """Return the command that trains and measures a cell."""
    return python("rnn_longctx.eval.capacity.cell", str(study), cell.name)
