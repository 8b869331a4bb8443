"""What a pilot's table says: where and how often the model collapses, which remedy to use, and how sure that is.

Everything follows from the table of results and the probe's files: nothing is read again, and no torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from rnn_longctx.eval.stats import Interval, paired_bootstrap
from rnn_longctx.eval.tables.conclusion import GUARD
from rnn_longctx.eval.tables.sheets import Sheet, sheets

ALIKE = 0.02  # a loss within so much of the lowest is as good, however surely the two are told apart
CHEAP = 0.25  # a remedy that is slower by so much than the fastest, or takes so much more memory, costs more
HOLDS = 1.05  # a remedy suffices where its loss is at most so many times that of reading the last tokens again
BEST = 3


@dataclass(frozen=True)
class Row:
    """A remedy at the length that remedies are compared at.

    Attributes:
        loss: nats a token; n: slices.
        over_control: the loss over that of the better control that reads the last tokens again; nan: none was measured.
        saved: what it saves against no remedy, nats a token, with its 95% interval; gain: against that control.
        recall: by task, the mean over the lengths that all remedies were asked at; prompts: how many at each;
            recall_gain: how much more is right than with that control, with its 95% interval.
        speed: of reading over that of no remedy, by processor time on a CPU; peak_bytes: of memory, on a GPU.
        fails_at: the first length at which it collapses itself.
        above: by how much its loss is above the lowest of the remedies that do not collapse, with its 95% interval;
            None: it is that one, or no remedy.
    """

    name: str
    control: bool
    loss: float
    n: int
    over_control: float
    saved: Interval | None
    gain: Interval | None
    recall: dict[str, float]
    prompts: dict[str, int]
    recall_gain: dict[str, Interval]
    speed: float
    tokens_per_second: float
    peak_bytes: float
    fails_at: int | None
    above: Interval | None = None

    @property
    def mean_recall(self) -> float:
        return sum(self.recall.values()) / len(self.recall) if self.recall else math.nan

    @property
    def holds(self) -> bool:
        """Whether its loss is about that of reading the last tokens again."""
        return self.over_control <= HOLDS


@dataclass(frozen=True)
class Comparison:
    """The remedies, the controls and none at one length, the lowest loss first.

    Attributes:
        against: the control that reads the last tokens again, with the lowest loss there.
    """

    length: int
    rows: list[Row]
    against: str | None

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def remedies(self) -> list[Row]:
        return [row for row in self.rows if not row.control and row.name != "none"]

    @property
    def lowest(self) -> Row | None:
        """The remedy with the lowest loss of those that do not collapse, or of all where all do; None: none has a loss
        that is a number."""
        sound = [row for row in self.remedies if math.isfinite(row.loss)]
        return next((row for row in sound if row.fails_at is None), sound[0] if sound else None)


def loss_sheet(frame: pd.DataFrame) -> Sheet | None:
    """Return the sheet of losses, the cells of each length cut to the slices that all have."""
    return next((sheet for sheet in sheets(frame) if sheet.kind == "loss"), None)


def most_read(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of those that were measured on as much text as the bare model, where some remedy and some control
    were; else all. So the remedies that came out best are compared on all that was read of them."""
    rows: Any = frame[(frame["metric"] == "nats_per_token") & (frame["task"] == "lm")]
    if rows.empty or "none" not in set(rows["mitigation"]):
        return frame
    longest = rows.loc[rows["mitigation"] == "none", "length"].max()
    at = rows[rows["length"] == longest]
    n = at.loc[at["mitigation"] == "none", "n"].max()
    names = set(at.loc[at["n"] >= n, "mitigation"])
    some = loss_sheet(frame[frame["mitigation"].isin(names)])
    if some is None or not some.remedies() or not some.recomputes():
        return frame
    return frame[frame["mitigation"].isin(names)]


def compared_at(sheet: Sheet, widest: bool = False) -> int | None:
    """Return the longest length at which none, a remedy and a control that reads the last tokens again were measured,
    or at least none and a remedy; None: there is no such length. widest: of those of most remedies."""
    bare = sheet.cells.get("none", {})
    with_remedy = [n for n in bare if any(n in sheet.cells[name] for name in sheet.remedies())]
    with_control = [n for n in with_remedy if sheet.best_recompute(n)]
    lengths = with_control or with_remedy
    if widest and lengths:
        remedies = {n: sum(n in sheet.cells[name] for name in sheet.remedies()) for n in lengths}
        lengths = [n for n in lengths if remedies[n] == max(remedies.values())]
    return max(lengths, default=None)


def comparison(
    frame: pd.DataFrame, widest: bool = False, processor: Mapping[str, float] | None = None
) -> Comparison | None:
    """Return the remedies compared at one length (`compared_at`); None where none was measured.

    Args: processor: processor seconds of a token read, by remedy: what speeds are compared by, where they are known.
    """
    sheet = loss_sheet(frame)
    length = None if sheet is None else compared_at(sheet, widest)
    if sheet is None or length is None:
        return None
    recalls = [s for s in sheets(frame) if s.kind == "accuracy" and not s.task.endswith("-without-document")]
    against = sheet.best_recompute(length)
    named = [name for name in sheet.cells if length in sheet.cells[name]]
    tables = _Tables(frame, sheet, recalls, processor or {})
    rows = [_row(tables, name, length, against) for name in named]
    rows.sort(key=lambda row: (not math.isfinite(row.loss), row.loss))
    if lowest := Comparison(length, rows, against).lowest:
        above = {
            row.name: _difference(sheet, row.name, lowest.name, length) for row in rows if row.name in sheet.remedies()
        }
        rows = [replace(row, above=above.get(row.name)) for row in rows]
    return Comparison(length, rows, against)


@dataclass(frozen=True, eq=False)
class _Tables:
    """What a row is made of: all results, the sheets of losses and of recall, and processor seconds of a token."""

    frame: pd.DataFrame
    losses: Sheet
    recalls: Sequence[Sheet]
    processor: Mapping[str, float]


def _row(tables: _Tables, name: str, length: int, against: str | None) -> Row:
    sheet, frame, processor = tables.losses, tables.frame, tables.processor
    cell, control = sheet.cells[name][length], sheet.cells[against][length].value if against else math.nan
    recall, prompts, recall_gain = {}, {}, {}
    for other in tables.recalls:
        lengths = set.intersection(*(set(cells) for cells in other.cells.values()))
        if name in other.cells and lengths:
            recall[other.task] = sum(other.cells[name][n].value for n in lengths) / len(lengths)
            prompts[other.task] = min(other.cells[name][n].n for n in lengths)
            if against in other.cells and against != name:
                both = [[s for n in sorted(lengths) for s in other.cells[one][n].samples] for one in (name, against)]
                if both[0] and len(both[0]) == len(both[1]):
                    recall_gain[other.task] = paired_bootstrap(both[0], both[1])
    cost, bare = _cost(frame, name, length), _cost(frame, "none", length)
    if "none" in processor and name in processor:
        speed = processor["none"] / processor[name]
    else:
        speed = cost[0] / bare[0] if bare[0] else math.nan
    return Row(
        name,
        sheet.is_control(name),
        cell.value,
        cell.n,
        cell.value / control if control else math.nan,
        _difference(sheet, "none", name, length),
        None if against is None else _difference(sheet, against, name, length),
        recall,
        prompts,
        recall_gain,
        speed,
        *cost,
        sheet.verdict(name).first_failing,
    )


def _difference(sheet: Sheet, name: str, other: str, length: int) -> Interval | None:
    """Return by how much the loss of `other` is below that of `name`; None where one is not there, or both are one."""
    gain = sheet.gain(name, other, length) if name != other and name in sheet.cells else None
    return None if gain is None else Interval(*gain)


def _cost(frame: pd.DataFrame, name: str, length: int) -> tuple[float, float]:
    """Return the tokens a second in reading, and the peak bytes on a GPU; nan where they are not known."""
    rows: Any = frame[
        (frame["mitigation"] == name) & (frame["metric"] == "nats_per_token") & (frame["length"] == length)
    ]
    if rows.empty:
        return math.nan, math.nan
    row = rows.iloc[0]
    peak = None if row["device"] == "cpu" else row["peak_bytes"]
    return _float(row["tokens_per_second"]), _float(peak)


def _float(value: Any) -> float:
    return math.nan if value is None or pd.isna(value) else float(value)


def alike(compared: Comparison) -> list[Row]:
    """Return the remedies whose losses are not told apart, the one to use first.

    They are the one with the lowest loss of those that do not collapse, and those whose loss is above it by less than
    ALIKE of it, or by what its own interval does not tell from nothing, though no more than HOLDS allows: where little
    was read, intervals are wide. Of them those that recall most (to GUARD) come first, then those that cost no more
    than the others (to CHEAP), then the simpler, then the lower loss."""
    lowest = compared.lowest
    if lowest is None:
        return []
    upright = [row for row in compared.remedies if (row.fails_at is None) == (lowest.fails_at is None)]
    rows = [row for row in upright if row is lowest or _as_good(row, lowest)]
    return sorted(rows, key=lambda row: (*_reasons(row, rows), row.loss))


def _as_good(row: Row, lowest: Row) -> bool:
    if lowest.holds and not row.holds:
        return False
    untold = row.above is not None and not row.above.low > 0
    return row.loss <= (1 + ALIKE) * lowest.loss or (row.holds and untold)


def _reasons(row: Row, rows: Sequence[Row]) -> tuple[bool, bool, int, int]:
    """Return what stands against a remedy among those that are as good by loss, the gravest first: that it recalls
    less, that it costs more than others that recall as much, its parts, the numbers that are set in it."""
    best = max((other.mean_recall for other in rows if math.isfinite(other.mean_recall)), default=math.nan)

    def forgets(row: Row) -> bool:
        return math.isfinite(best) and not row.mean_recall >= best - GUARD

    rivals = [other for other in rows if not forgets(other)]
    fastest = max((other.speed for other in rivals if math.isfinite(other.speed)), default=math.nan)
    least = min((other.peak_bytes for other in rivals if math.isfinite(other.peak_bytes)), default=math.nan)
    dear = row.speed < (1 - CHEAP) * fastest or row.peak_bytes > (1 + CHEAP) * least
    return forgets(row), dear, row.name.count("+"), row.name.count("=")


def reason(row: Row, rows: Sequence[Row]) -> str:
    """Return why the first of some remedies that are as good by loss is chosen before `row`, another of them."""
    pairs = zip(_reasons(row, rows), _reasons(rows[0], rows))
    words = ("recalls less", "costs more", "more parts", "more numbers to set")
    return next((word for word, (its, first) in zip(words, pairs) if its != first), "a higher loss")


def ranked(compared: Comparison, most: int | None = None) -> list[Row]:
    """Return the remedies whose loss is a number, the one to use first: those that are not told apart from the lowest
    (`alike`), then the others by their loss, those that collapse last."""
    first = alike(compared)
    rest = [row for row in compared.remedies if math.isfinite(row.loss) and row not in first]
    return [*first, *sorted(rest, key=lambda row: (row.fails_at is not None, row.loss))][:most]


def finalists(
    frame: pd.DataFrame, names: Sequence[str], processor: Mapping[str, float] | None = None, most: int = BEST
) -> list[str]:
    """Return which of some remedies are worth more text, by name, the best first: those that do not raise the loss."""
    compared = comparison(frame, True, processor)
    bare = None if compared is None else compared.row("none")
    if compared is None or bare is None:
        return []
    best = [row for row in ranked(compared) if row.name in names and not row.loss > (1 + ALIKE) * bare.loss]
    return [row.name for row in best][:most]


# ---- collapse


def collapse(frame: pd.DataFrame) -> dict[str, Any]:
    """Return where and how often the bare model collapses: `length` (tokens, None where it does not), `verdict` in
    words, `peak` (the highest loss within the training length), `threshold` (twice of it), and a row a length: loss,
    slices, how many of them fail by themselves beyond training."""
    sheet = loss_sheet(frame[frame["mitigation"] == "none"])
    if sheet is None or "none" not in sheet.cells:
        return {"length": None, "verdict": "not measured", "threshold": None, "lengths": []}
    first, text = sheet.verdict("none")
    peak = sheet.peak("none")
    rows = []
    for length, cell in sorted(sheet.cells["none"].items()):
        beyond = peak is not None and length > (sheet.train_length or 0)
        fails = sum(not loss <= 2 * peak for loss in cell.samples) if beyond and peak is not None else 0
        rows.append({"length": length, "loss": cell.value, "stderr": cell.stderr, "slices": cell.n, "failing": fails})
    threshold = None if peak is None else 2 * peak
    return {"length": first, "verdict": text, "threshold": threshold, "peak": peak, "lengths": rows}


def context_gain(frame: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return, for none and some remedies, what reading everything gains over reading the last training length again: a
    row a length, nats a token, with its 95% interval."""
    sheet = loss_sheet(frame)
    if sheet is None or not sheet.recomputes():
        return []
    train_length = sheet.train_length or 0
    usual = f"recompute:last={max(2, train_length // 2 * 2)}"
    control = usual if usual in sheet.cells else sheet.recomputes()[0]
    rows = []
    for name in (name for name in names if name in sheet.cells):
        for length in sorted(n for n in sheet.cells[name] if n > train_length):
            if (gain := sheet.gain(control, name, length)) is not None:
                rows.append({"name": name, "control": control, "length": length} | gain._asdict())
    return rows


def recall_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row a task, remedy and length: the share of right answers, prompts, and the loss of the true answer."""
    rows = []
    answers: Any = frame[frame["metric"] == "answer_nats_per_token"].set_index(["task", "mitigation", "length"])[
        "value"
    ]
    for sheet in (s for s in sheets(frame) if s.kind == "accuracy"):
        for name, cells in sheet.cells.items():
            for length, cell in sorted(cells.items()):
                loss = answers.get((sheet.task, name, length), math.nan)
                row = {"task": sheet.task, "name": name, "length": length, "right": cell.value, "prompts": cell.n}
                rows.append(row | {"answer_loss": float(loss), "control": sheet.is_control(name)})
    return rows


def above_without_document(frame: pd.DataFrame, name: str) -> dict[str, Interval]:
    """Return, of every file of questions, how many more answers are right with the document than without it, at the
    longest length that both were asked at, with its 95% interval."""
    gains = {}
    tables = {sheet.task: sheet for sheet in sheets(frame) if sheet.kind == "accuracy"}
    for task, sheet in tables.items():
        other = tables.get(f"{task}-without-document")
        cells, blind = sheet.cells.get(name, {}), {} if other is None else other.cells.get("none", {})
        if lengths := cells.keys() & blind.keys():
            pair = cells[max(lengths)].samples, blind[max(lengths)].samples
            n = min(map(len, pair))
            if n:
                gains[task] = paired_bootstrap(pair[0][:n], pair[1][:n])
    return gains


def throughput(frame: pd.DataFrame, names: Sequence[str], length: int | None) -> list[dict[str, Any]]:
    """Return what reading and generating cost under some remedies."""
    rows = []
    for name in names:
        of_name: Any = frame[(frame["mitigation"] == name) & frame["depth"].isna()]
        if of_name.empty:
            continue
        speed, peak = _cost(frame, name, length) if length is not None else (math.nan, math.nan)
        answered = of_name[(of_name["metric"] == "accuracy") & of_name["next_token_seconds"].notna()]
        last = answered.sort_values("length").iloc[-1] if len(answered) else None
        rows.append(
            {
                "name": name,
                "tokens_per_second": speed,
                "peak_bytes": peak,
                "prompt_length": None if last is None else int(last["length"]),
                "first_token_seconds": math.nan if last is None else _float(last["first_token_seconds"]),
                "next_token_seconds": math.nan if last is None else _float(last["next_token_seconds"]),
            }
        )
    return rows


def onset(probed: Mapping[str, Any] | None, heads: pd.DataFrame | None, worst: int = 8) -> dict[str, Any] | None:
    """Return what a probe's files say: from which length on heads leave their range, the worst heads, in words; None:
    there was no probe."""
    if probed is None or heads is None:
        return None
    left = heads[heads["onset"].notna()]
    columns = [c for c in ("layer", "head", "onset", "ratio", "retained") if c in heads]
    return {
        "length": None if left.empty else float(left["onset"].min()),
        "heads": len(heads),
        "left": len(left),
        "read": probed["length"],
        "worst": heads[columns].head(worst).to_dict("records"),
        "verdict": probed["verdict"],
    }
