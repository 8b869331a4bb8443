"""A study: cells as processes side by side on one device, what to train next chosen by what is known so far.

Everything known is on disk (done.json of a cell, the table of results), so a study that is killed goes on where it
stopped, and one that is finished runs nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rnn_longctx.config import counted, home_path, to_dict
from rnn_longctx.data import load_text, open_streamed
from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import models, tables
from rnn_longctx.eval.capacity.cell import STUDY, is_done
from rnn_longctx.eval.capacity.config import CapacityConfig, StudyCell
from rnn_longctx.eval.capacity.forget import next_models
from rnn_longctx.eval.pool import Pool, last_line
from rnn_longctx.eval.results import Results
from rnn_longctx.files import write_atomic
from rnn_longctx.progress import Say, to_stdout
from rnn_longctx.train.config import MixedText
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
    training_device(config.train.device)  # there is such a one
    study = home_path(config.out)
    train = to_dict(replace(config.train, accumulate=1, sequence_parallel=1))
    claim: dict[str, Any] = {"train": {k: v for k, v in train.items() if k not in _NEUTRAL}}
    claim |= {"pretrain": config.pretrain and to_dict(config.pretrain)}
    claim |= {"mqar": config.mqar and to_dict(replace(config.mqar, samples=1, seeds=1))}
    claim_folder(study, claim, ["models"])
    Results(study)  # it can be written
    text = load_text(config.measure.text).name  # and this read, before anything is trained
    local = replace(config, train=replace(config.train, data=replace(config.train.data, text=_texts(config, study))))
    write_atomic(study / STUDY, yaml.safe_dump(to_dict(local), sort_keys=False).encode())

    failed: dict[str, str] = {}
    known: dict[str, bool] = {}  # outcomes of the test of forgetting, by the names of cells
    done = 0
    with Pool(parallel) as pool:
        while True:
            todo = [c for c in _todo(config, study, known, text) if c.name not in failed and c.name not in pool]
            for cell in todo[: pool.free]:
                pool.start(cell.name, command(cell, study), _log(study, cell.name))
            if not len(pool):
                break
            for name, code, seconds in pool.ended():
                if code == 0 and is_done(config, config.find(name), study):
                    done += 1
                    models.gather(study)  # so that a study can be looked at before it ends
                    say(f"{name}: done in {seconds:.0f} s")
                else:
                    failed[name] = last_line(_log(study, name)) or f"exit {code}"
                    say(f"{name}: failed: {failed[name]}")
    say(f"{counted(done, 'cell')} run")
    models.gather(study)
    Results(study).gather()
    if failed:
        name, why = next(iter(failed.items()))
        raise InputError(
            f"{counted(len(failed), 'cell')} failed, the first of them {name}: {why}; run again to try again"
        )
    return study


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


def _texts(config: CapacityConfig, study: Path) -> list[str | MixedText]:
    """What is trained on, the installed packages gathered once, and not by every cell. Raises InputError: there is no
    such text, which every cell would find out by itself."""
    texts: list[str | MixedText] = []
    for spec in config.train.data.text:
        mixed = spec if isinstance(spec, MixedText) else MixedText(spec)
        if mixed.source == "site-packages":
            gathered = study / "site-packages.txt"
            if not gathered.exists():
                write_atomic(gathered, load_text("site-packages").data)
            mixed = replace(mixed, source=str(gathered))
        elif open_streamed(mixed.source) is None:
            load_text(mixed.source)
        texts.append(mixed if isinstance(spec, MixedText) else mixed.source)
    return texts


def command(cell: StudyCell, study: Path) -> list[str]:
    """Return the command that trains and measures a cell."""
    return [sys.executable, "-m", "rnn_longctx.eval.capacity.cell", str(study), cell.name]


def _log(study: Path, name: str) -> Path:
    return study / "models" / name / "log.txt"
