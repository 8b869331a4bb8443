"""A comparison: its cells side by side on one device, and the table that comes of them.

What to run follows from what is on disk: the rates of an entry first, then its seeds at the best rate, then, where that
is asked for, the training lengths that the search for T_forget takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rnn_longctx.config import home_path, to_dict
from rnn_longctx.data import load_tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.eval.cells import run_cells, texts_for_cells
from rnn_longctx.eval.compare.cell import STUDY, chosen, folder_of, is_done, measured, spent, trial
from rnn_longctx.eval.compare.config import Cell, CompareConfig, selected
from rnn_longctx.eval.compare.equal import parameters, size, state
from rnn_longctx.eval.compare.measures import row_of
from rnn_longctx.eval.forget import next_models
from rnn_longctx.eval.pool import python
from rnn_longctx.eval.tables.compare import passes, summarised, write
from rnn_longctx.files import write_atomic
from rnn_longctx.models.config import warn_of_unfit
from rnn_longctx.progress import Say, to_stdout
from rnn_longctx.train.mix import check_mix
from rnn_longctx.train.snapshots import claim_folder
from rnn_longctx.train.team import training_device


def run_study(config: CompareConfig, jobs: int = 1, only: Sequence[str] = (), say: Say = to_stdout) -> Path:
    """Train and measure every entry, or those of `only`, `jobs` cells at a time; return the folder of the table.

    Raises:
        InputError: bad settings, no text, a folder of another comparison, or that cannot be written; cells that failed,
            after all others have run, whose table is then written.
    """
    names = selected(config, only)
    if jobs < 1:
        raise InputError(f"jobs: expected a number of processes, got {jobs}")
    device = training_device(config.device)  # there is such a one
    tokenizer = load_tokenizer(config.train.data.tokenizer)
    check_mix(config.train.data, tokenizer, config.shape.vocab_size)
    config.measure.check(tokenizer, config.shape.vocab_size)
    study = home_path(config.out)
    train = {k: v for k, v in to_dict(config.train).items() if k not in ("log_every", "checkpoint_every")}
    claim_folder(study, {"train": train}, ["cells"])
    texts = texts_for_cells(config.train.data.text, study)
    equal = size(config.equal or "parameters", config.train.train_length)
    config = replace(
        config.settled(), train=replace(config.train, data=replace(config.train.data, text=texts)), out=str(study)
    )
    write_atomic(study / STUDY, yaml.safe_dump(to_dict(config), sort_keys=False).encode())
    for name, model in config.models.items():
        sizes = {"parameters": parameters(model), "numbers of state": state(model, config.train.train_length)}
        sizes |= {equal.named: equal.of(model)} if equal.kind == "flops" else {}
        shape = f"d_model {model.d_model}, mlp {model.mlp:.3g}"
        say(f"{name}: {', '.join(f'{number:,} {what}' for what, number in sizes.items())}, {shape}")
        longest = max([*config.train_lengths, *config.measure.lengths])
        warn_of_unfit(model, min(longest, config.entry(name).longest or longest), f"{name}: ")
    run_cells(_Cells(config, study, names), jobs, device, say)
    return study


class _Cells:
    """The cells of a comparison for `run_cells`."""

    def __init__(self, config: CompareConfig, study: Path, entries: Sequence[str]):
        self.config, self.study, self.entries = config, study, entries

    def due(self) -> list[str]:
        """The first cell of every entry first: kernels that it compiles and tunes are there for the others."""
        rounds = zip_longest(*(self._due(entry) for entry in self.entries))
        return [cell.name for cells in rounds for cell in cells if cell is not None]

    def _due(self, entry: str) -> list[Cell]:
        c, study = self.config, self.study
        trials = c.trials(entry)
        if untried := [cell for cell in trials if trial(c, cell, study) is None]:
            return untried
        try:
            rate = chosen(c, entry, study)
        except InputError:
            return trials[:1]  # which says why
        assert rate is not None
        replicas = c.replicas(entry, rate)
        if unmeasured := [cell for cell in replicas if not is_done(c, cell, study)]:
            return unmeasured
        return self._search(entry, rate) if c.forget else []

    def _search(self, entry: str, rate: float) -> list[Cell]:
        """Return the cells that the search for T_forget takes next."""
        cells = {(n, s): Cell(entry, rate, s, n) for n in self.config.train_lengths for s in range(self.config.seeds)}
        outcomes = {}
        for where, cell in cells.items():
            if (known := measured(self.config, cell, self.study)) is not None:
                outcomes[where] = passes(known[1], cell.train_length)
        return [cells[where] for where in next_models(self.config.train_lengths, range(self.config.seeds), outcomes)]

    def command(self, name: str) -> list[str]:
        return command(name, self.study)

    def folder(self, name: str) -> Path:
        return folder_of(self.study, self.config.find(name))

    def is_done(self, name: str) -> bool:
        return is_done(self.config, self.config.find(name), self.study)

    def gather(self) -> pd.DataFrame:
        """Write compare.parquet and compare.csv from all cells that are finished; return the table."""
        frame = summarised(list(_rows(self.config, self.study)), self.config.train.train_length)
        write(frame, self.study)
        return frame


def command(name: str, study: Path) -> list[str]:
    """Return the command that runs a cell."""
    return python("rnn_longctx.eval.compare.cell", str(study), name)


def _rows(config: CompareConfig, study: Path) -> Iterator[dict[str, Any]]:
    """Yield what is known of every cell: how its training went, and what was measured of it."""
    for entry in config.entries:
        try:
            best = chosen(config, entry.name, study)
        except InputError:
            best = None
        mixer = entry.mixer if isinstance(entry.mixer, str) else " ".join(entry.mixer)
        of_entry = {"entry": entry.name, "mixer": mixer, "parameters": parameters(config.models[entry.name])}
        for rate in config.learning_rates:
            for length in config.train_lengths:
                for seed in range(config.seeds):
                    cell = Cell(entry.name, rate, seed, length)
                    key = of_entry | {"learning_rate": rate, "train_length": length, "seed": seed}
                    if (how := trial(config, cell, study)) is not None:
                        note = how.fault
                        yield key | {"metric": "held_out_loss", "value": how.loss, "note": note}
                        for task, value in how.recall.items():
                            yield key | {"metric": "held_out_recall", "task": task, "value": value, "note": note}
                    if rate != best:
                        continue
                    rows = [row_of(metric, value) for metric, value in spent(config, cell, study).items()]
                    if (known := measured(config, cell, study)) is not None:
                        about, more = known
                        key, rows = key | {"state": about["state"]}, rows + more
                    for row in rows:
                        yield key | row
                        if config.price is not None and row["metric"].endswith("_seconds"):
                            cost = row["value"] * config.price / 3600
                            yield key | row | {"metric": row["metric"].replace("_seconds", "_cost"), "value": cost}
