"""What changed between two folders of results, two of comparisons, of growth or of lm-eval: cell by cell, paired by
slice where slices are kept, from their tables alone.

A cell of one folder is paired with the cell of the other that has the same key. Where there is none, columns that say
how it was computed (LOOSE) are let go one after the other, those of the text last, as long as what is left names one
cell on each side; a model's name and a remedy are let go where each folder has only one. What was let go and differs
is said of each pair. So a model that was trained again, another version or backend, or another remedy is set against
what was measured before, and cells are never mixed up.

A change is B - A. Its 95% interval is that of `rnn_longctx.eval.stats`: of differences on the same slices or prompts,
over seeds too where a comparison has several. Where texts differ there are no pairs, and no interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.eval.results import KEY, RUNS, Results
from rnn_longctx.eval.stats import Interval, crossed, paired_bootstrap
from rnn_longctx.eval.tables import compare, growth
from rnn_longctx.eval.tables.sheets import DEPTHS

STUDY = "study.yaml"  # of a comparison
LM_EVAL = "lm_eval.csv"  # as rnn_longctx.eval.harness writes it
PILOT = "pilot_state.json"  # as rnn_longctx.eval.pilot.ledger writes it, before there is a table
READS = (
    "compare-runs reads folders that eval or pilot filled (results.parquet or results.csv), "
    f"compare ({compare.FILE}, {growth.FILE}) or lm-eval ({LM_EVAL})"
)
LOOSE = (
    *("weights_hash", "calibration", "plugins", "batch", "backend", "device", "dtype", "state_dtype"),
    *("parameters", "learning_rate", "text_hash"),
)
SINGLE = ("model", "entry", "mixer", "mitigation")  # let go where each folder has one
COLUMNS = ("model", "mitigation", "task", "text", "length", "depth", "metric", "train_length", "seed")
CHANGES = (*COLUMNS, "differs", "a", "b", "change", "low", "high", "n", "verdict", "speed")
LOWER_IS_BETTER = ("nats_per_", "loss", "held_out_loss")
HIGHER_IS_BETTER = ("accuracy", "gain", "recovery", "held_out_recall")
SURE = ("better", "worse", "higher", "lower")

Place = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Cell:
    """One measured value.

    Attributes:
        place: the columns that say what was measured, of what and how.
        samples: of each seed, the values of its slices or prompts; a results folder has the seed in the place.
        words: an outcome that is no number, such as a verdict; None for others.
        speed: tokens a second, or None.
    """

    place: Place
    value: float
    samples: dict[Any, list[float]]
    words: str | None = None
    speed: float | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """A folder's cells, and what stands above them: its commands, versions and settings, by their names."""

    folder: str
    kind: str
    cells: list[Cell]
    header: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Changes:
    """What changed from A to B.

    Attributes:
        cells: a row a cell that both have; see CHANGES. speed: tokens a second of B over those of A.
        only_a, only_b: the cells that one has alone.
        header: a row for each thing above the cells that differs: `what`, `a`, `b`.
    """

    cells: pd.DataFrame
    only_a: pd.DataFrame
    only_b: pd.DataFrame
    header: pd.DataFrame

    def count(self, *verdicts: str) -> int:
        """Return how many cells have one of these verdicts."""
        return int(self.cells["verdict"].isin(verdicts).sum())


def read_run(folder: str | Path) -> Run:
    """Return the cells of a folder of one of the kinds above. Raises InputError: it is of none, or cannot be read."""
    path = home_path(folder)
    if (path / compare.FILE).exists():
        rows = _records(compare.read(path))
        return Run(str(folder), "a comparison", _of_comparison(rows), _study(path / STUDY))
    if (path / growth.FILE).exists():
        rows = _records(growth.read(path))
        header = {c: " and ".join(sorted({_text(row[c]) for row in rows})) for c in ("device", "dtype", "versions")}
        return Run(str(folder), "growth", _of_growth(rows), _study(path / STUDY) | header)
    if path.is_dir() and not any((path / name).exists() for name in ("results.parquet", "results.csv")):
        if (path / LM_EVAL).exists():
            return Run(str(folder), "lm-eval", _of_lm_eval(path / LM_EVAL))
        if (path / PILOT).exists():
            raise InputError(f"the pilot in {path} has not finished: it has no table yet; run it again, it goes on")
        raise InputError(f"there is no such table in {path}: {READS}")
    frame = Results.read(path)
    header = _commands(path / RUNS)
    header["version"] = " and ".join(sorted({str(v) for v in frame["version"].dropna()}))
    return Run(str(folder), "results", [_of_results(row) for row in _records(frame)], header)


def compare_runs(a: Run, b: Run) -> Changes:
    """Return what changed from one run to another. Raises InputError: they are of two kinds."""
    if a.kind != b.kind:
        raise InputError(f"{a.folder} is of {a.kind} and {b.folder} of {b.kind}: they have no cells in common")
    pairs, only_a, only_b = _paired(a.cells, b.cells)
    rows = [_change(x, y) for x, y in pairs]
    header = [(what, a.header.get(what, ""), b.header.get(what, "")) for what in dict.fromkeys([*a.header, *b.header])]
    return Changes(
        _sorted(rows, CHANGES),
        _sorted([_shown(cell) | {"value": cell.value} for cell in only_a], (*COLUMNS, "value")),
        _sorted([_shown(cell) | {"value": cell.value} for cell in only_b], (*COLUMNS, "value")),
        pd.DataFrame([row for row in header if row[1] != row[2]], columns=["what", "a", "b"]),
    )


# ---- cells


def _of_results(row: Mapping[str, Any]) -> Cell:
    place = {column: row[column] for column in KEY}
    value = math.nan if row["value"] is None else float(row["value"])
    return Cell(place, value, {None: list(row["samples"] or [])}, speed=row["tokens_per_second"])


def _of_comparison(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Return a cell for all seeds together. A verdict's length and task are its outcome, and no part of the place."""
    columns = ("entry", "mixer", "parameters", "learning_rate", "train_length", *compare.PLACE)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["metric"] == "verdict":
            row = {**row, "length": None, "task": ""}
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    cells = []
    for key, group in groups.items():
        together = next((row for row in group if row["seed"] is None), group[0])
        samples = {row["seed"]: list(row["samples"]) for row in group if row["samples"] is not None}
        value = math.nan if together["value"] is None else float(together["value"])
        words = together["note"] if together["metric"] in ("verdict", "T_forget", "not_applicable") else None
        cells.append(Cell(dict(zip(columns, key)), value, samples, words))
    return cells


def _of_growth(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Return a cell for each thing measured, of which there is one sample; what was done stands as its task."""
    cells = []
    for row in rows:
        for metric in growth.MEASURED:
            if row[metric] is not None:
                place = {c: row[c] for c in growth.KEY if c != "what"} | {"task": row["what"], "metric": metric}
                cells.append(Cell(place, float(row[metric]), {None: [float(row[metric])]}))
    return cells


def _of_lm_eval(file: Path) -> list[Cell]:
    """Return a cell a row. It has no samples: lm-eval's table keeps the mean alone."""
    try:
        rows = _records(pd.read_csv(file, dtype={"weights_hash": str}))
        columns = ("model", "weights_hash", "mitigation", "task", "length", "metric", "dtype", "state_dtype", "seed")
        return [Cell({c: row[c] for c in columns}, float(row["value"]), {}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot read {file}: {' '.join(str(error).split())}") from None


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows with None for all that is missing, and lists of samples."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(k): None if _missing(v) else v for k, v in row.items()} for row in rows]


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


# ---- pairs


def _paired(a: Sequence[Cell], b: Sequence[Cell]) -> tuple[list[tuple[Cell, Cell]], list[Cell], list[Cell]]:
    """Return pairs, and what is left on each side."""
    single = [c for c in SINGLE if len(_values(a, c)) == len(_values(b, c)) == 1 and _values(a, c) != _values(b, c)]
    pairs: list[tuple[Cell, Cell]] = []
    let_go: set[str] = set()
    for column in (None, *LOOSE[:-1], *single, LOOSE[-1]):  # the text last: what is left then cannot be paired by slice
        let_go |= {column} if column else set()
        left, right = _by_key(a, let_go), _by_key(b, let_go)
        met = [(left[key], right[key]) for key in left if key in right]
        pairs += met
        gone = {id(cell) for pair in met for cell in pair}
        a, b = ([cell for cell in cells if id(cell) not in gone] for cells in (a, b))
    return pairs, list(a), list(b)


def _values(cells: Iterable[Cell], column: str) -> set[Any]:
    return {cell.place.get(column) for cell in cells}


def _by_key(cells: Iterable[Cell], let_go: set[str]) -> dict[tuple[Any, ...], Cell]:
    """Return the cells by what is left of their keys; those that another shares it with are left out."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple((c, v) for c, v in cell.place.items() if c not in let_go), []).append(cell)
    return {key: some[0] for key, some in found.items() if len(some) == 1}


# ---- changes


def _change(a: Cell, b: Cell) -> dict[str, Any]:
    differs = [f"{c}: {_text(v)} to {_text(b.place[c])}" for c, v in a.place.items() if v != b.place[c]]
    row = _shown(a) | {"differs": "; ".join(differs), "a": a.value, "b": b.value}
    if a.words is not None or b.words is not None:
        verdict = "same" if (a.words, a.value) == (b.words, b.value) or a.words == b.words else "changed"
        return row | {"a": a.words, "b": b.words, "verdict": verdict}
    pairs = [] if a.place.get("text_hash") != b.place.get("text_hash") else _sample_pairs(a, b)
    differences = [[y - x for x, y in zip(one, other)] for one, other in pairs]
    if not differences:
        interval = Interval(b.value - a.value, math.nan, math.nan, 0)
    elif len(differences) == 1:
        interval = paired_bootstrap(pairs[0][1], pairs[0][0])
    else:
        interval = crossed(differences)
    speed = b.speed / a.speed if a.speed and b.speed else math.nan
    row |= {"change": interval.value, "low": interval.low, "high": interval.high, "n": interval.n, "speed": speed}
    return row | {"verdict": _verdict(a, b, interval, differences)}


def _sample_pairs(a: Cell, b: Cell) -> list[tuple[list[float], list[float]]]:
    """Return the samples that both have, seed by seed. Slice i is the same tokens however many there are, and so is
    prompt i from DEPTHS prompts on; fewer prompts stand at other depths."""
    accuracy = a.place["metric"] in ("accuracy", "recovery")
    pairs = []
    for seed in (seed for seed in a.samples if seed in b.samples):
        x, y = a.samples[seed], b.samples[seed]
        n = min(len(x), len(y))
        if n and (len(x) == len(y) or not accuracy or n >= DEPTHS):
            pairs.append((x[:n], y[:n]))
    least = min((len(x) for x, _ in pairs), default=0)
    return [(x[:least], y[:least]) for x, y in pairs]


def _verdict(a: Cell, b: Cell, interval: Interval, differences: Sequence[Sequence[float]]) -> str:
    """Return in a word what a change is: sure where its interval does not hold 0."""
    if not math.isfinite(a.value) or not math.isfinite(b.value):
        if math.isfinite(a.value) == math.isfinite(b.value):
            return "no number"
        return "worse" if math.isfinite(a.value) else "better"
    if not differences:
        return "not paired"
    if not any(d for row in differences for d in row):
        return "same"
    if math.isnan(interval.low):
        return "one sample"
    if interval.low <= 0 <= interval.high:
        return "unclear"
    metric, higher = a.place["metric"], interval.value > 0
    if metric.startswith(LOWER_IS_BETTER):
        return "worse" if higher else "better"
    if metric in HIGHER_IS_BETTER:
        return "better" if higher else "worse"
    return "higher" if higher else "lower"


def _shown(cell: Cell) -> dict[str, Any]:
    place = {"model": cell.place.get("entry"), **cell.place}
    return {column: place.get(column) for column in COLUMNS}


def _sorted(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    places = ("model", "metric", "task", "text", "mitigation", "length", "depth")
    rows = sorted(rows, key=lambda row: [(row[c] is not None, row[c]) for c in places])
    frame = pd.DataFrame(rows, columns=list(columns))
    return frame.astype({c: "Int64" for c in ("length", "train_length", "seed", "n") if c in frame})


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


# ---- what stands above the cells


def _commands(path: Path) -> dict[str, str]:
    """Return what a results folder notes of the commands that filled it, each text once."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        entries = [(str(k), str(v)) for line in lines for k, v in line.items()]
    except FileNotFoundError:  # of a version that noted nothing
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    names = dict.fromkeys(name for name, _ in entries)
    return {name: "; ".join(dict.fromkeys(text for other, text in entries if other == name)) for name in names}


def _study(path: Path) -> dict[str, str]:
    """Return the settings of a comparison, each by its place in the config."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # the table may have been copied alone
        return {}
    return dict(_flat("", config))


def _flat(place: str, value: Any) -> Iterable[tuple[str, str]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield place, _text(value)
        return
    for name, inner in pairs:
        yield from _flat(f"{place}.{name}" if place else str(name), inner)
