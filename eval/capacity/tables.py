"""What the tables say: every finding from results.csv and models.csv alone.

`findings` has a line a model, remedy and question, `points` a line a shape: what is fitted and drawn. Lengths are in
tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median_low
from typing import Any

import pandas as pd

from rnn_longctx.config import format_length, home_path
from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import bound, models
from rnn_longctx.eval.capacity.recall import recall_of
from rnn_longctx.eval.forget import forget_of
from rnn_longctx.eval.results import KEY as ROW
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.stats import wilson
from rnn_longctx.eval.tables.sheets import Sheet, whole_sheets
from rnn_longctx.tasks.mqar import KINDS
from rnn_longctx.tasks.passkey import Passkey

KEY = ["shape", "mitigation", "quantity"]
_OF_ONE = ("model", "weights_hash", "train_length", "train_seed", "train_tokens")  # of one model, not of its shape
_MQAR = re.compile(rf"({'|'.join(KINDS)})(\d+)")
PLAIN = Passkey().label  # the task whose T_recall goes without its name, and is drawn by depth


def read(directory: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results and models, of a folder that a study or `rnn-longctx capacity MODEL` has written. Raises InputError."""
    return _once(Results.read(directory)), models.read(home_path(directory))


def _once(results: pd.DataFrame) -> pd.DataFrame:
    """A row for what was measured on several devices or in batches of several sizes, that of the most samples: a search
    that was begun so and ended otherwise is one search."""
    same = [c for c in ROW if c not in ("device", "backend", "batch") and c in results]
    return results.sort_values("n", ascending=False, kind="stable").drop_duplicates(same).sort_index()


def passes(study: Path, name: str, limit: int, text: str) -> bool:
    """Whether the model of that name, without a remedy, passed the test of forgetting up to `limit` on the text of that
    name: not beyond, and not on others that it was read on before. Raises InputError: it was not measured so."""
    frame = _once(Results(study).frame())
    for sheet in whole_sheets(frame[(frame["model"] == name) & (frame["text"] == text) & (frame["length"] <= limit)]):
        if sheet.kind == "loss" and "none" in sheet.cells and max(sheet.lengths) >= limit:
            return sheet.verdict("none").first_failing is None and not sheet.broken("none")
    raise InputError(f"{name} was not measured without a remedy at {format_length(limit)} tokens of {text}")


def findings(results: pd.DataFrame, about: pd.DataFrame, target: float) -> pd.DataFrame:
    """One line a model, remedy and quantity, with the columns of models.csv.

    quantity `forgets`: `passes` is the longest length read where the loss held, `fails` the shortest where it did not.
    quantity `T_recall`, or `T_recall of TASK` where the task is not the plain passkey: `passes` is it at `target`,
    `fails` the shortest length that is not shown; `right` of `asked`, and `worst`, the depth with the fewest right
    answers, at `passes` (at `fails` where nothing passes). `text` says it in words.
    """
    lines = []
    for sheet in whole_sheets(results[~results["task"].str.fullmatch(_MQAR)]):
        for name in sheet.cells:
            line = {"model": sheet.where["model"], "weights_hash": sheet.where["weights_hash"], "mitigation": name}
            lines.append(line | (_forgets(sheet, name) if sheet.kind == "loss" else _recall(sheet, name, target)))
    whole = ("passes", "fails", "right", "asked")
    columns = ["model", "weights_hash", "mitigation", "quantity", *whole, "worst", "text"]
    frame = pd.DataFrame(lines, columns=columns).astype(dict.fromkeys(whole, "Int64"))
    joined = about.merge(frame, on=["model", "weights_hash"], how="inner")
    joined.loc[joined["mitigation"] != "none", bound.COLUMN] = pd.NA  # some remedies carry more than the state
    order = ["state_elements", "shape", "train_length", "train_seed", "quantity", "mitigation"]
    return joined.sort_values(order, ignore_index=True)


def in_words(table: pd.DataFrame) -> list[str]:
    """A line a checkpoint (of no family: each is a shape of its own) and remedy: whether it forgets, its T_recall."""
    lines = []
    for (shape, mitigation), some in table.groupby(["shape", "mitigation"], sort=False):
        train = some["train_length"].iloc[0]
        trained = "" if pd.isna(train) else f", trained at {format_length(int(train))}"
        entries = sorted(zip(some["quantity"] != "forgets", some["quantity"], some["text"]))
        texts = [f"{quantity} {text}" if recalls else text for recalls, quantity, text in entries]
        lines.append(f"{shape}{trained}, {mitigation}: {'; '.join(texts)}")
    return lines


def _forgets(sheet: Sheet, name: str) -> dict[str, Any]:
    failing, text = sheet.verdict(name)
    judged = sheet.peak(name) is not None  # else nothing is known to have held
    held = [n for n in sheet.cells[name] if failing is None or n < failing] if judged else []
    return {"quantity": "forgets", "passes": max(held, default=None), "fails": failing, "text": text}


def _recall(sheet: Sheet, name: str, target: float) -> dict[str, Any]:
    recall = recall_of({n: (round(sum(c.samples)), c.n) for n, c in sheet.cells[name].items()}, target)
    assert recall is not None
    at = recall.passes or recall.fails
    depths = {d: cell.value for (n, d), cell in sheet.depths[name].items() if n == at}
    quantity = "T_recall" if sheet.task == PLAIN else f"T_recall of {sheet.task}"
    worst = min(depths, key=lambda d: (depths[d], d)) if depths else None
    return {"quantity": quantity, "worst": worst, "text": str(recall)} | recall._asdict()


def points(table: pd.DataFrame) -> pd.DataFrame:
    """One line a shape, remedy and quantity (T_forget, T_recall): the columns of models.csv that its models share, and
    what follows. A checkpoint that is of no family has no T_forget, which is a quantity of several training lengths.

    value: tokens. T_forget: the shortest training length above all whose models, by majority, fail. T_recall: the
        median over seeds, at the training length where that is longest, of those with the most seeds (the best of many
        single models would be the luckiest); `model` is the one it is of, `seeds` how many there were.
    bound: "" where `value` was found; "above" or "below" where only that is known: of T_recall, the longest length
        measured passes, or the shortest fails; of T_forget, the longest training length fails, or the shortest passes.
    low, high: T_forget lies above `low`, the longest training length that fails; the seeds' T_recalls lie within.
    fails: of T_recall, the shortest length that is not shown.
    """
    lines = []
    for (_, mitigation, quantity), group in table.groupby(KEY, sort=False):
        shared = {c: group[c].iloc[0] for c in models.COLUMNS if c not in _OF_ONE}
        line = shared | {"mitigation": mitigation, "models": len(group)}
        lines.append(line | (_t_forget(group) if quantity == "forgets" else {"quantity": quantity} | _t_recall(group)))
    frame = pd.DataFrame([line for line in lines if line.get("value") is not None])
    return frame.sort_values(["quantity", "mitigation", "state_elements"], ignore_index=True) if len(frame) else frame


def _t_forget(group: pd.DataFrame) -> dict[str, Any]:
    known = group.dropna(subset=["train_length"])
    if known["train_length"].nunique() < 2 and known["train_seed"].isna().all():  # a family's search may end after one
        return {"quantity": "T_forget", "value": None}
    seeds = known["train_seed"].fillna(0)
    reach = known["passes"].where(known["fails"].isna(), known["fails"])
    tested = (reach > known["train_length"]) | known["fails"].notna()
    models_tested = zip(known["train_length"][tested], seeds[tested], known["fails"][tested])
    outcomes = {(int(n), int(s)): bool(pd.isna(fails)) for n, s, fails in models_tested}
    forget = forget_of(outcomes)
    if forget is None:
        return {"quantity": "T_forget", "value": None}
    bound = "above" if forget.passes is None else "below" if forget.fails is None else ""
    value = forget.fails if forget.passes is None else forget.passes
    read = reach[tested & known["fails"].isna()].min()  # models that pass, as far as they were read
    text = str(forget) if forget.passes is None else f"{forget}; read to {format_length(int(read))}"
    return {
        "quantity": "T_forget",
        "value": value,
        "bound": bound,
        "low": forget.fails,
        "high": forget.passes,
        "text": text,
    }


def _t_recall(group: pd.DataFrame) -> dict[str, Any]:
    best: tuple[int, Any] | None = None
    trained = group.groupby("train_length", dropna=False)
    for train_length, some in trained:
        if len(some) < trained.size().max():
            continue
        reached = {i: 0 if pd.isna(p) else int(p) for i, p in some["passes"].items()}
        middle = median_low(sorted(reached.values()))
        if best is None or middle > best[0]:
            best = middle, (train_length, some, next(i for i, p in reached.items() if p == middle))
    assert best is not None
    middle, (train_length, some, index) = best
    one, lengths = some.loc[index], some["passes"].fillna(0)
    bound = "below" if not middle else "above" if pd.isna(one["fails"]) else ""
    of = {"model": one["model"], "weights_hash": one["weights_hash"], "train_length": train_length, "seeds": len(some)}
    value, low, high = middle or int(one["fails"]), int(lengths.min()), int(lengths.max())
    more = {"fails": None if pd.isna(one["fails"]) else int(one["fails"]), "text": one["text"]}
    return of | {"value": value, "bound": bound, "low": low, "high": high} | more


def same_size(points: pd.DataFrame, within: float = 1.1) -> pd.DataFrame:
    """Is the size of the state the right axis? One line a remedy, quantity and group of shapes whose states are of one
    size, to a factor of `within`: `spread` is the longest length over the shortest. Bounds are left out."""
    lines = []
    exact = points[points["bound"] == ""].sort_values("state_elements")
    for (mitigation, quantity), group in exact.groupby(["mitigation", "quantity"], sort=False):
        some: list[Any] = []
        for row in [*group.itertuples(), None]:
            if row is not None and (not some or row.state_elements <= within * some[0].state_elements):
                some.append(row)
                continue
            if len(some) > 1:
                values = [int(r.value) for r in some]
                lines.append(
                    {
                        "mitigation": mitigation,
                        "quantity": quantity,
                        "state_elements": some[0].state_elements,
                        "shapes": " ".join(r.shape for r in some),
                        "values": " ".join(map(str, values)),
                        "spread": max(values) / min(values),
                    }
                )
            some = [row]
    columns = ["mitigation", "quantity", "state_elements", "shapes", "values", "spread"]
    return pd.DataFrame(lines, columns=columns)


def associations(results: pd.DataFrame, about: pd.DataFrame) -> pd.DataFrame:
    """MQAR: the columns of models.csv, `pairs`, and `value` (the share of answers that are right) with its 95% interval
    `low` to `high`: Wilson's, of as many independent answers as have the standard error over sequences (of a sequence
    each where all are right, or wrong)."""
    rows = results[results["task"].str.fullmatch(_MQAR)]
    parts = rows["task"].str.extract(_MQAR)
    frame = rows[["model", "weights_hash", "value", "stderr", "n"]].assign(pairs=parts[1].astype("int64"))
    joined = about.merge(frame, on=["model", "weights_hash"], how="inner")
    ends = []
    for p, stderr, n in zip(joined["value"], joined["stderr"], joined["n"]):
        effective = max(n, p * (1 - p) / stderr**2) if stderr > 0 else n
        ends.append(wilson(p * effective, effective))
    joined["low"], joined["high"] = [e.low for e in ends], [e.high for e in ends]
    return joined.sort_values(["task", "state_elements", "pairs"], ignore_index=True)


def by_depth(results: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Passkey accuracy by length and depth of the models whose T_recall, without a remedy, stands in `points`: the
    columns of models.csv, length, depth, value and n."""
    one = points[(points["quantity"] == "T_recall") & (points["mitigation"] == "none")]
    rows = results[(results["task"] == PLAIN) & results["depth"].notna() & (results["mitigation"] == "none")]
    columns = ["model", "weights_hash", "length", "depth", "value", "n"]
    return one.drop(columns="value").merge(rows[columns], on=["model", "weights_hash"])
