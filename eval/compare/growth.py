"""How time and memory grow with the length: mixers alone, or whole models of them, in one table with fitted exponents
(see configs/compare/growth.yaml). Nothing is trained. One cell is one entry in a process of its own, with a file a
length: `python -m rnn_longctx.eval.compare.growth FOLDER NAME`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import yaml

from rnn_longctx.config import format_length, home_path, load_yaml, to_dict
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.eval.cells import alone, run_cells
from rnn_longctx.eval.compare.config import Entry, ShapeConfig, check_names, check_price, named
from rnn_longctx.eval.compare.measures import ascending
from rnn_longctx.eval.compare.timing import ReadingConfig, Row, rows_at
from rnn_longctx.eval.pool import end_with_parent, python
from rnn_longctx.eval.tables.growth import summarised, write
from rnn_longctx.files import write_atomic
from rnn_longctx.models.config import warn_of_unfit
from rnn_longctx.plugins import load_handed_on
from rnn_longctx.progress import Say, to_stdout
from rnn_longctx.train.snapshots import changed, claim_folder
from rnn_longctx.train.team import training_device

STUDY = "study.yaml"
WHOLE = "whole"  # a segment: all in one call


@dataclass(frozen=True)
class GrowthEntry(Entry):
    """An entry (of mixers alone, one mixer), and where it differs from `segment`."""

    segment: int | Literal["whole"] | None = None


@dataclass(frozen=True)
class GrowthConfig:
    """What is read how, and at which lengths.

    Attributes:
        measure: says what kind of comparison this is.
        what: "mixers": the forward of one layer's mixer on (1, length, d_model) numbers; "models": reading a prompt to
            its last token's logits, and then generating `tokens`.
        segment: tokens of a call, as this library reads a stream; or "whole": all in one call.
        fit_from: exponents are fitted to the lengths from this one on; None: to the longer half.
        reference: the entry that the others are set against; None: the first.
        price: of an hour of the device, in any currency; None: nothing is said of costs.
    """

    measure: Literal["growth"]
    entries: list[GrowthEntry]
    lengths: list[int]
    what: Literal["mixers", "models"] = "mixers"
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    segment: int | Literal["whole"] = "whole"
    fit_from: int | None = None
    reference: str | None = None
    tokens: int = 20
    price: float | None = None
    device: str = "auto"
    out: str = "runs/compare/growth"

    def __post_init__(self) -> None:
        check_names(self.entries)
        ascending("lengths", self.lengths)
        for i, entry in enumerate(self.entries):
            where = f"entries[{i}] ({entry.name})"
            if self.what == "mixers" and not isinstance(entry.mixer, str):
                raise InputError(f"{where}: what: mixers takes one mixer an entry, got {len(entry.mixer)}")
            for segment in (entry.segment, self.segment):
                if isinstance(segment, int) and segment < 1:
                    raise InputError(f"segment: expected at least 1 token, or {WHOLE}, got {segment}")
            try:
                entry.model(self.shape)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            if not self.within(entry.name):
                raise InputError(f"{where}: nothing is read: longest {entry.longest} is below all lengths")
        if self.reference is not None:
            self.entry(self.reference)
        if len([n for n in self.lengths if n >= self.fitted_from]) < 2:
            raise InputError(
                f"fit_from: an exponent takes at least two lengths, and there are fewer from {self.fitted_from} on"
            )
        if self.tokens < 1:
            raise InputError(f"tokens: expected at least 1, got {self.tokens}")
        check_price(self.price)

    @property
    def fitted_from(self) -> int:
        return self.lengths[max(0, (len(self.lengths) - 1) // 2)] if self.fit_from is None else self.fit_from

    def entry(self, name: str) -> GrowthEntry:
        """Return the entry of a name. Raises InputError: there is none."""
        return named(self.entries, name)

    def reading(self, name: str) -> ReadingConfig:
        """Return how an entry is read."""
        entry = self.entry(name)
        segment = self.segment if entry.segment is None else entry.segment
        model = entry.model(self.shape)
        if self.what == "mixers":
            model = replace(model, n_layer=1, mlp=0.0)
        return ReadingConfig(model, self.what, None if segment == WHOLE else int(segment), self.tokens)

    def within(self, name: str) -> list[int]:
        """Return the lengths at which an entry is read."""
        longest = self.entry(name).longest
        return [length for length in self.lengths if longest is None or length <= longest]


def run_growth(config: GrowthConfig, only: Sequence[str] = (), say: Say = to_stdout) -> Path:
    """Measure every entry, or those of `only`, one after another; return the folder of the table.

    Raises:
        InputError: bad settings, a folder of another comparison; entries that failed, after all others have run, whose
            table is then written.
    """
    names = [config.entry(name).name for name in only] or [entry.name for entry in config.entries]
    device = training_device(config.device)
    study = home_path(config.out)
    claim_folder(study, {"measure": config.measure, "device": device.type}, ["cells"])
    config = replace(config, out=str(study))
    write_atomic(study / STUDY, yaml.safe_dump(to_dict(config), sort_keys=False).encode())
    for name in names:
        warn_of_unfit(config.reading(name).model, config.within(name)[-1], f"{name}: ")
    run_cells(_Cells(config, study, names), 1, device, say)
    return study


class _Cells:
    """The entries for `run_cells`: by themselves on the device, since they are timed."""

    def __init__(self, config: GrowthConfig, study: Path, names: Sequence[str]):
        self.config, self.study, self.names = config, study, names

    def due(self) -> list[str]:
        return [name for name in self.names if not self.is_done(name)]

    def command(self, name: str) -> list[str]:
        return command(name, self.study)

    def folder(self, name: str) -> Path:
        return self.study / "cells" / name

    def is_done(self, name: str) -> bool:
        return not missing(self.config, name, self.study)

    def gather(self) -> pd.DataFrame:
        """Write growth.parquet and growth.csv from all that is measured; return the table."""
        every = []
        for entry in self.config.entries:
            for length in self.config.within(entry.name):
                every += known_rows(self.config, entry.name, length, self.study) or []
        reference = self.config.reference or self.config.entries[0].name
        frame = summarised(every, self.config.fitted_from, reference, self.config.price)
        write(frame, self.study)
        return frame


def command(name: str, study: Path) -> list[str]:
    """Return the command that measures an entry."""
    return python("rnn_longctx.eval.compare.growth", str(study), name)


def known_rows(config: GrowthConfig, name: str, length: int, study: Path) -> list[Row] | None:
    """Return the rows of an entry at a length, or None where they are not measured, or in another way."""
    try:
        known = json.loads(_file(study, name, length).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return None if changed(known["as"], _as(config, name)) else known["rows"]


def missing(config: GrowthConfig, name: str, study: Path) -> list[int]:
    """Return the lengths at which an entry is not measured yet; none beyond one at which memory did not suffice."""
    lengths = []
    for length in config.within(name):
        rows = known_rows(config, name, length, study)
        if rows is None:
            lengths.append(length)
        elif any(row["note"] for row in rows):
            break
    return lengths


def run_cell(config: GrowthConfig, name: str, study: Path) -> None:
    """Measure what is missing of an entry, a length at a time. Raises InputError where one cannot be read."""
    with alone(study / "cells" / name):
        device = training_device(config.device)
        of_entry = {"entry": name, "mixer": _text(config.entry(name))}
        for length in missing(config, name, study):
            torch.manual_seed(0)  # the same weights at every length: what they forget need not be read
            try:
                rows = list(rows_at(config.reading(name), length, device))
            except (RuntimeError, ValueError) as error:
                raise InputError(f"{format_length(length)} tokens: {one_line(error)}") from None
            done = {"as": _as(config, name), "rows": [of_entry | row for row in rows]}
            write_atomic(_file(study, name, length), json.dumps(done).encode())
            if not missing(config, name, study):
                break


def _file(study: Path, name: str, length: int) -> Path:
    return study / "cells" / name / f"{length}.json"


def _as(config: GrowthConfig, name: str) -> dict[str, Any]:
    """What is measured, and how, in terms of JSON."""
    return json.loads(json.dumps(to_dict(config.reading(name))))


def _text(entry: GrowthEntry) -> str:
    return entry.mixer if isinstance(entry.mixer, str) else " ".join(entry.mixer)


if __name__ == "__main__":
    end_with_parent()
    try:
        load_handed_on()
        where = Path(sys.argv[1])
        with torch.inference_mode():
            run_cell(load_yaml(GrowthConfig, where / STUDY), sys.argv[2], where)
    except InputError as error:
        sys.exit(f"{error}")
