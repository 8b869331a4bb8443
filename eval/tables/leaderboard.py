"""Every remedy against the two controls, per length: what it loses, what it recalls, what it costs; and who gains.

A remedy `wins` at a length where its loss is surely below that of every control measured there, or its recall on a task
surely above theirs: the 95% interval of the difference, paired by slice or prompt, lies above 0. One that wins nothing
only forgets: the last few hundred tokens would have done as well. Models without a measured loss are left out.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from rnn_longctx.eval.stats import paired_bootstrap
from rnn_longctx.eval.tables.sheets import SETTING, Sheet, placed, sheets

LEADERBOARD = [
    *("model", "text", "length", "mitigation", "control", "loss", "gain", "gain_low", "gain_high"),
    *("change_short", "speed", "memory", "wins"),
]
NO_NUMBER = "its loss is no number"


def leaderboard(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a model, text, length and mitigation, best first. What of a model was measured in other ways too (another
    dtype, other weights) is ranked by itself: its name then says how.

    gain: the loss of the best control at that length minus the loss, nats per token, with its 95% interval;
    change_short: loss minus that of no remedy at the longest length within the training length; speed, memory: tokens a
    second and (on a GPU) peak bytes over those of no remedy, in reading prompts where a remedy has no loss; a column of
    accuracy for each recall task; wins: what it beats the controls at.
    """
    rows: list[dict[str, Any]] = []
    frame = placed(frame)
    everything = sheets(frame)
    losses = [s for s in everything if s.kind == "loss"]
    for sheet in losses:
        recalls = [s for s in everything if s.kind == "accuracy" and all(s.where[c] == sheet.where[c] for c in SETTING)]
        model = _told_apart(sheet, losses)
        for length in sheet.lengths:
            rows += [{"model": model} | row for row in _rows(frame, sheet, recalls, length)]
    board = pd.DataFrame(rows)
    if board.empty:
        return board
    order = LEADERBOARD + [c for c in board if c not in LEADERBOARD]
    return board.reindex(columns=order).sort_values(
        ["model", "text", "length", "loss"], na_position="last", ignore_index=True
    )


def _told_apart(sheet: Sheet, sheets: list[Sheet]) -> str:
    """The model's name, with what tells its sheet from others of that model and text: they are ranked apart."""
    alike = [s.where for s in sheets if all(s.where[c] == sheet.where[c] for c in ("model", "text"))]
    differ = [c for c in sheet.where if any(where[c] != sheet.where[c] for where in alike)]
    return f"{sheet.where['model']}" + (f" [{', '.join(f'{c}={sheet.where[c]}' for c in differ)}]" if differ else "")


def _rows(frame: pd.DataFrame, sheet: Sheet, recalls: list[Sheet], length: int) -> list[dict[str, Any]]:
    here = {n: row[length] for n, row in sheet.cells.items() if length in row}
    controls = [n for n in here if sheet.is_control(n)]
    rivals = {s.task: [r[length] for n, r in s.cells.items() if s.is_control(n) and length in r] for s in recalls}
    # remedies that read a prompt otherwise have recall alone
    names = [*here, *dict.fromkeys(n for s in recalls for n, row in s.cells.items() if length in row and n not in here)]
    rated = [c for c in controls if math.isfinite(here[c].value)]  # one that blew up is beaten, and has no interval
    best = sheet.lowest(controls, length)
    short = max((k for k in sheet.lengths if sheet.train_length and k <= sheet.train_length), default=None)
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "text": sheet.where["text"],
            "length": length,
            "mitigation": name,
            "control": name in controls,
            "loss": here[name].value if name in here else math.nan,
        }
        wins = []
        if name in here and best in rated:
            against = [paired_bootstrap(*_paired(here[c].samples, here[name].samples)) for c in rated]
            gain = against[rated.index(best)]
            row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            if name not in controls and all(g.low > 0 for g in against):
                wins.append("loss")
        if short is not None and name in sheet.cells and "none" in sheet.cells:
            cell, bare = sheet.cells[name].get(short), sheet.cells["none"].get(short)
            row["change_short"] = cell.value - bare.value if cell and bare else math.nan
        for recall in recalls:
            cell = recall.cells.get(name, {}).get(length)
            row[recall.task] = cell.value if cell else math.nan
            others = rivals[recall.task]
            alike = cell is not None and all(o.n == cell.n for o in others)  # else they were asked other prompts
            surer = [paired_bootstrap(*_paired(cell.samples, o.samples)) for o in others] if cell and alike else []
            if surer and name not in controls and all(g.low > 0 for g in surer):
                wins.append(recall.task)
        # without a loss by the last task's prompts: at the first one's kernels may be compiled
        row |= next((c for s in (sheet, *reversed(recalls)) if (c := _cost(frame, s, name, length))), {})
        row["wins"] = ", ".join(wins) if controls else "not compared"
        if name in here and not math.isfinite(here[name].value):
            row["wins"] = NO_NUMBER
        rows.append(row)
    return rows


def _paired(a: list[float], b: list[float]) -> tuple[list[float], list[float]]:
    n = min(len(a), len(b))
    return a[:n], b[:n]


def _cost(frame: pd.DataFrame, sheet: Sheet, name: str, length: int) -> dict[str, float]:
    """What a remedy cost on a sheet over what no remedy did; empty where one of the two was not measured."""
    at: Any = frame[(frame["task"] == sheet.task) & (frame["length"] == length) & frame["depth"].isna()]
    at = at[at["metric"].isin(["nats_per_token", "accuracy"])]
    for column in (*SETTING, "text", "text_hash", "seed", "device", "batch"):  # others were not read as these were
        value = sheet.where.get(column)
        if column in at and (value is not None or column in SETTING):
            at = at[at[column].isna() if value is None else at[column] == value]
    mitigation, calibration = sheet.mitigations.get(name, (name, None))
    remedy, bare = at[at["mitigation"] == mitigation], at[at["mitigation"] == "none"]
    remedy = remedy[remedy["calibration"].isna() if calibration is None else remedy["calibration"] == calibration]
    if remedy.empty or bare.empty:
        return {}
    remedy, bare = remedy.iloc[0], bare.iloc[0]
    speeds = [
        row["tokens_per_second"] if sheet.kind == "loss" else 1 / (row["first_token_seconds"] or math.nan)
        for row in (remedy, bare)
    ]
    return {
        "speed": speeds[0] / (speeds[1] or math.nan),
        # of a process the system knows only the highest mark so far, whoever set it
        "memory": remedy["peak_bytes"] / bare["peak_bytes"] if remedy["device"] != "cpu" else math.nan,
    }
