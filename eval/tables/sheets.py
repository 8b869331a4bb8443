"""From the table of results to sheets of rows that may be compared, and what follows from them in numbers.

Everything is worked out from the gathered table alone (see results.py). Rows of other weights, texts or
precisions end up on different sheets. Loss alone never shows that a remedy works: one that forgets everything
keeps it flat. So *context gain* is the loss of recomputing from the last tokens minus the loss of the remedy,
on the same tokens, paired by slice: only above 0 does the state hold what re-reading them does not give.
Cells of one length are of the same slices or prompts: where runs into one folder asked for different numbers of
them, of the first ones, that all have. The length of a cell is that of the tokens that were read, whatever length they
were asked for (`placed`): no verdict names a length that was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pandas as pd

from rnn_longctx.eval.stats import Verdict, mean_stderr, paired_bootstrap, peak_within, verdict

SETTING = ("model", "weights_hash", "tokenizer", "dtype", "state_dtype", "plugins")  # never mixed on one sheet
DIAGNOSTICS = ("attention-window:", "reset-recurrence:")  # one part of a hybrid forgets, the other reads on
DEPTHS = 10  # at most, of prompts
Kind = Literal["loss", "accuracy"]
RECALL = 0.95  # T_recall is the longest context with an accuracy above this (arXiv 2410.07145)


class Cell(NamedTuple):
    """One measured value; `samples` are its per-slice or per-prompt values, empty if they were not kept."""

    value: float
    stderr: float
    n: int
    samples: list[float]


class Gain(NamedTuple):
    """Context gain in nats per token, its 95% interval (NaN for one slice) and the number of slices."""

    gain: float
    low: float
    high: float
    n: int


@dataclass
class Sheet:
    """Comparable rows: one model, one task, one text. `kind` is what was measured, a loss or an accuracy.

    `cells[name][length]` holds all depths together, `depths[name][length, depth]` one depth. Names are
    mitigations (with their calibration where that tells two apart), ordered: none, remedies, controls.
    `where` holds the columns that all rows share, None where they do not; `note` what tells this sheet from
    the others. `cut[length]` is the most samples that a cell had there before it was cut to what all have;
    `asked[length]` the length that was asked for where so many tokens were read instead; `chance` what a guess scores.
    """

    task: str
    kind: Kind
    where: dict[str, Any]
    train_length: int | None
    note: str = ""
    mitigations: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # name: mitigation, calibration
    cells: dict[str, dict[int, Cell]] = field(default_factory=dict)
    depths: dict[str, dict[tuple[int, float], Cell]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    cut: dict[int, int] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)
    chance: float | None = None

    @property
    def lengths(self) -> list[int]:
        return sorted({length for row in self.cells.values() for length in row})

    def is_control(self, name: str) -> bool:
        return is_control(self.mitigations[name][0])

    def remedies(self) -> list[str]:
        """Names that are neither a control nor the bare model."""
        return [n for n in self.cells if n != "none" and not self.is_control(n)]

    def recomputes(self) -> list[str]:
        """The controls that context gain is measured against."""
        return [n for n in self.cells if is_control(self.mitigations[n][0], "recompute:")]

    def best_recompute(self, length: int) -> str | None:
        """The `recompute:` control with the lowest loss at `length`: the hardest to beat."""
        return self.lowest(self.recomputes(), length)

    def lowest(self, names: list[str], length: int) -> str | None:
        """Of the names measured at `length`, the one of the lowest value there; one that is not a number comes last."""
        measured = [n for n in names if length in self.cells[n]]
        return min(measured, key=lambda n: (math.isnan(v := self.cells[n][length].value), v), default=None)

    def diagnostic(self, kind: str, length: int) -> str | None:
        """Of the controls whose names begin with `kind`, the one with the lowest loss at `length`."""
        return self.lowest([n for n in self.cells if is_control(self.mitigations[n][0], kind)], length)

    def values(self, name: str) -> tuple[list[int], list[float]]:
        lengths = sorted(self.cells[name])
        return lengths, [self.cells[name][length].value for length in lengths]

    def peak(self, name: str) -> float | None:
        """The highest loss within the training length, of the bare model where it was measured: a remedy that
        does harm at short lengths must not raise its own threshold by it. None where a loss there is no number."""
        name = "none" if "none" in self.cells else name
        if self.train_length is None or name not in self.cells or self.broken(name):
            return None
        return peak_within(*self.values(name), self.train_length, self.peaks.get(name))

    def broken(self, name: str) -> bool:
        """Whether a loss is not finite already within the training length: nothing can be said of it beyond."""
        within = {length for length in self.cells[name] if length <= (self.train_length or 0)}
        return any(not math.isfinite(self.cells[name][length].value) for length in within)

    def verdict(self, name: str) -> Verdict:
        return verdict(*self.values(name), self.train_length, self.peak(name))

    def gain(self, control: str, name: str, length: int) -> Gain | None:
        """Context gain of `name` over `control`, or None where one of the two has no samples."""
        cells = [self.cells[n].get(length) for n in (control, name)]
        a, b = (c.samples if c else [] for c in cells)
        n = min(len(a), len(b))  # slice i is the same tokens, however many slices were asked for
        return Gain(*paired_bootstrap(a[:n], b[:n])) if n else None

    def recall_length(self, name: str) -> int | None:
        """The longest length with an accuracy above RECALL, or None."""
        return max((k for k, cell in self.cells[name].items() if cell.value > RECALL), default=None)


def is_control(mitigation: str, *kinds: str) -> bool:
    """`reset:` and `recompute:`, alone, forget on purpose, and so do DIAGNOSTICS; they are what a remedy is compared
    with."""
    return mitigation.startswith(kinds or ("reset:", "recompute:", *DIAGNOSTICS)) and "+" not in mitigation


def kind_of(metric: str) -> Kind | None:
    """Return what a metric of this library measures, or None for another's."""
    return "loss" if metric.startswith("nats_per_") else "accuracy" if metric == "accuracy" else None


def alike(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.Series:
    """True at the rows whose columns have these values; None is a missing one."""
    same = pd.Series(True, index=frame.index)
    for column, value in where.items():
        same &= frame[column].isna() if value is None else (frame[column] == value).fillna(False).astype(bool)
    return same


def sheets(frame: pd.DataFrame) -> list[Sheet]:
    """Sort rows into sheets, model by model, losses first, and cut the cells of a length to the samples that all of
    them have. Unknown metrics are left out."""
    all_sheets = whole_sheets(frame)
    for sheet in all_sheets:
        _cut(sheet)
    return all_sheets


def placed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the tokens that were read as `length`, where it has them, and what was asked as `asked`."""
    if "asked" in frame:
        return frame
    read = frame["tokens_read"].fillna(frame["length"]) if "tokens_read" in frame else frame["length"]
    return frame.assign(asked=frame["length"], length=read.astype("Int64"))


def whole_sheets(frame: pd.DataFrame) -> list[Sheet]:
    """`sheets` with all samples of every cell: for what is said of each by itself, and compares none."""
    frame = placed(frame).assign(**{c: None for c in SETTING if c not in frame})  # tables from before a column
    all_sheets: list[Sheet] = []
    losses = frame["metric"].isin(["nats_per_token", "nats_per_token_peak"])
    accuracies = frame["metric"] == "accuracy"
    for whole in _groups(frame, SETTING):
        # A prompt's text may change with its length (passkey has a short and a long form), a loss's may not.
        for rows, columns in ((losses, ("task", "text", "text_hash")), (accuracies, ("task",))):
            for group in _groups(whole[rows.loc[whole.index]], columns):
                all_sheets += [_sheet(rows_alike, _train_length(whole)) for rows_alike in _split(group)]
    all_sheets = [sheet for sheet in all_sheets if sheet.cells]
    for sheet in all_sheets:
        others = [s.where for s in all_sheets if s.task == sheet.task]
        differ = [c for c, v in sheet.where.items() if c != "model" and any(o[c] != v for o in others)]
        sheet.note = ", ".join(f"{c}={sheet.where[c]}" for c in differ)
    return all_sheets


def context_gain(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per remedy (and `none`), length and `recompute:` control: `gain` in nats per token, its 95%
    interval `low`..`high` from a bootstrap paired by slice, and `n` slices. Rows need samples to count."""
    rows = []
    for sheet in sheets(frame):
        for control in sheet.recomputes() if sheet.kind == "loss" else []:
            for name in (n for n in sheet.cells if not sheet.is_control(n)):
                for length in sorted(sheet.cells[name]):
                    gain = sheet.gain(control, name, length)
                    if gain:
                        rows.append(_named(sheet, name) | {"control": control, "length": length} | gain._asdict())
    return pd.DataFrame(rows, columns=[*_NAMES, "control", "length", *Gain._fields])


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per sheet and mitigation.

    `length` is the longest measured and `value` the loss or accuracy there; for a loss, `ratio` is over the
    best `recompute:` control (`against`) and `gain`, `low`, `high` the context gain over it; for an accuracy,
    `recall_length` is the longest length above 0.95.
    """
    rows = []
    for sheet in sheets(frame):
        for name, cells in sheet.cells.items():
            length = max(cells)
            row = _named(sheet, name) | {"is_control": sheet.is_control(name), "length": length}
            row |= {"train_length": sheet.train_length, "value": cells[length].value, "n": cells[length].n}
            if sheet.kind == "loss":
                row["first_failing"], row["verdict"] = sheet.verdict(name)
                against = sheet.best_recompute(length)
                if against:
                    ratio = cells[length].value / sheet.cells[against][length].value
                    gain = sheet.gain(against, name, length)
                    row |= {"against": against, "ratio": ratio}
                    row |= {"gain": gain.gain, "low": gain.low, "high": gain.high} if gain else {}
            else:
                row["recall_length"] = sheet.recall_length(name)
            rows.append(row)
    columns = [*_NAMES, "is_control", "train_length", "length", "value", "n", "first_failing", "verdict"]
    table = pd.DataFrame(rows, columns=[*columns, "against", "ratio", "gain", "low", "high", "recall_length"])
    return table.astype(dict.fromkeys(("train_length", "first_failing", "recall_length"), "Int64"))


_NAMES = (*SETTING, "task", "text", "text_hash", "mitigation", "calibration")


def _named(sheet: Sheet, name: str) -> dict[str, Any]:
    pair = dict(zip(("mitigation", "calibration"), sheet.mitigations[name]))
    return {c: sheet.where.get(c) for c in _NAMES} | pair | {"task": sheet.task}


def _groups(frame: pd.DataFrame, columns: Sequence[str]) -> Iterable[pd.DataFrame]:
    return (group for _, group in frame.groupby(list(columns), dropna=False, sort=False))


def _split(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Part rows that would fall into the same place of a table, by the first column that tells them apart."""
    place = ["mitigation", "calibration", "metric", "length", "depth"]
    for column in ("seed", "device", "backend", "batch", "text", "text_hash"):
        if frame.duplicated(place).any() and frame[column].nunique(dropna=False) > 1:
            return [rows for group in _groups(frame, [column]) for rows in _split(group)]
    return [frame]


def _train_length(frame: pd.DataFrame) -> int | None:
    known = frame["train_length"].dropna()
    return None if known.empty else int(known.mode().iloc[0])


def _sheet(frame: pd.DataFrame, train_length: int | None) -> Sheet:
    frame = frame.astype(object).where(frame.notna(), None)  # Nones, for pandas has three kinds of missing
    rows: list[Any] = frame.to_dict("records")
    pairs = {(r["mitigation"], r["calibration"]) for r in rows}
    several = {m for m, _ in pairs if sum(m == other for other, _ in pairs) > 1}
    pairs_in_order = sorted(pairs, key=lambda p: (is_control(p[0]), p[0] != "none", p[0], p[1] or ""))
    names = {p: f"{p[0]} [{p[1] or 'uncalibrated'}]" if p[0] in several else p[0] for p in pairs_in_order}
    shared = (*SETTING, "text", "text_hash", "seed", "device", "backend", "batch")
    where = {c: rows[0][c] if all(r[c] == rows[0][c] for r in rows) else None for c in shared}
    kind: Kind = "accuracy" if rows[0]["metric"] == "accuracy" else "loss"
    sheet = Sheet(rows[0]["task"], kind, where, train_length, mitigations={n: p for p, n in names.items()})
    for name in names.values():
        cells: dict[int, Cell] = {}
        depths: dict[tuple[int, float], Cell] = {}
        for row in (r for r in rows if names[r["mitigation"], r["calibration"]] == name):
            if row["length"] != row["asked"]:
                sheet.asked[int(row["length"])] = int(row["asked"])
            if row["metric"] == "nats_per_token_peak":
                if row["length"] != train_length:  # of a training length that was given once and was wrong
                    continue
                sheet.peaks[name] = _number(row["value"])
            elif row["depth"] is None:
                cells[int(row["length"])] = _cell(row)
                sheet.chance = row.get("chance")
            else:
                depths[int(row["length"]), float(row["depth"])] = _cell(row)
        for length, cell in cells.items():  # depths of an earlier run with another number of prompts
            bins = min(cell.n, DEPTHS)
            stale = [d for k, d in depths if k == length and abs(d * bins % 1 - 0.5) > 1e-6]
            for depth in stale:
                del depths[length, depth]
        for length in {k for k, _ in depths} - set(cells):
            turns = [(i, d, s) for (k, d), cell in depths.items() if k == length for i, s in enumerate(cell.samples)]
            samples = [s for _, _, s in sorted(turns)]  # as they were asked
            if samples:
                cells[length] = Cell(*mean_stderr(samples), len(samples), samples)
        if cells:
            sheet.cells[name] = cells
            sheet.depths[name] = depths
    return sheet


def _cut(sheet: Sheet) -> None:
    """Slice i is the same tokens whatever the number of slices, and so is prompt i from ten prompts on, whose depths
    come in turn. Fewer prompts stand at other depths, and are no part of more: such cells stay as they are."""
    for length in sheet.lengths:
        counts = {name: row[length].n for name, row in sheet.cells.items() if length in row}
        least, most = min(counts.values()), max(counts.values())
        if least == most or least < (1 if sheet.kind == "loss" else DEPTHS):
            continue
        for name in (n for n, count in counts.items() if count > least):
            if len(sheet.cells[name][length].samples) < least:  # they were not kept
                continue
            sheet.cut[length] = most
            sheet.cells[name][length] = _first(sheet.cells[name][length], least)
            for at, depth in [k for k in sheet.depths[name] if k[0] == length]:
                there = len(range(round(depth * DEPTHS - 0.5), least, DEPTHS))  # of the first prompts
                sheet.depths[name][at, depth] = _first(sheet.depths[name][at, depth], there)


def _first(cell: Cell, n: int) -> Cell:
    samples = cell.samples[:n]
    return Cell(*mean_stderr(samples), len(samples), samples)


def _cell(row: dict[str, Any]) -> Cell:
    samples = [] if row["samples"] is None else [float(s) for s in row["samples"]]
    n = len(samples) if row["n"] is None else int(row["n"])
    return Cell(_number(row["value"]), _number(row["stderr"]), n, samples)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
