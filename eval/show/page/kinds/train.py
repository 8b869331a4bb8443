"""The page of a training run's folder: losses, recall and states over the steps, and what it was evaluated at."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rnn_longctx.config import counted, format_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import INK, MUTED, Line, look, number
from rnn_longctx.eval.show.page.parts import KINDS, Figure, Kind, Page, Section, Table

LOG, EVALUATED, ONLINE = "log.csv", "eval.csv", "online.csv"
# Of each table: columns with a number in every row, and all that it must have.
PLACES = {LOG: ("step",), EVALUATED: ("step", "length"), ONLINE: ("update",)}
NEEDED = {LOG: ("step",), EVALUATED: ("step", "length", "loss"), ONLINE: ("update", "decision")}
SMOOTH = 10  # rows of the log that a mean is over
# Of each figure: its columns, its title and the axis of its values.
STEPS = (
    (("loss", "passkey_loss"), "Loss while training", "loss, nats per token"),
    (("state_norm", "state_norm_max"), "Norms of states at the end of a batch", "norm"),
    (("grad_norm",), "Norm of the gradient", "norm"),
    (("lr",), "Learning rate", "learning rate"),
    (("tokens_per_second",), "Speed", "tokens per second"),
    (("length",), "Length of a row", "tokens"),
)
NAMES = {
    "loss": "loss", "passkey_loss": "loss of answers", "state_norm": "mean of heads", "state_norm_max": "largest",
    "grad_norm": "gradient", "lr": "learning rate", "tokens_per_second": "speed", "length": "length",
}  # fmt: skip
NUMBERS = ("step", "update", "tokens", "seconds", "passkey_accuracy", "train_loss", "new_before", "new_after", *NAMES)
_CONFIG = {
    "data.text": "text", "train_length": "training length", "steps": "steps asked for",
    "batch_size": "rows a step, where a stage has none of its own",
    "optimizer.lr": "learning rate", "seed": "seed", "precision": "computed in",
}  # fmt: skip


def fits(path: Path) -> bool:
    return any((path / name).is_file() for name in (LOG, ONLINE))


def page(path: Path) -> Page:
    """Return the page of a run. Raises InputError: a table cannot be read."""
    log, evaluated, online = (read(path / name) for name in (LOG, EVALUATED, ONLINE))
    settings = _settings(path)
    parts = [
        Section("While training", steps(log)) if len(log) else None,
        Section("Evaluated on the way", evaluations(evaluated)) if len(evaluated) else None,
        Section("Updates on what arrived", updates(online)) if len(online) else None,
        Section("All that was logged", [Table(name, t) for name, t in
                ((LOG, log), (EVALUATED, evaluated), (ONLINE, online)) if len(t)]),
    ]  # fmt: skip
    header = {"run": path.resolve().name, **settings}
    if len(log):
        last = log.iloc[-1]
        header |= {"steps": f"{last['step']:,.0f}"}
        header |= {name: f"{last[name]:,.0f}" for name in ("tokens", "seconds") if name in log}
    return Page(f"Training of {path.resolve().name}", verdict(log, evaluated, online), header, [p for p in parts if p])


def read(path: Path) -> pd.DataFrame:
    """Return a log without a last row that is still being written, or an empty table where there is none. Raises
    InputError: it cannot be read, or lacks a column, or the numbers of one."""
    if not path.is_file():
        return pd.DataFrame()
    try:
        text = path.read_text(errors="replace")
        whole = text[: text.rfind("\n") + 1]
        table = pd.read_csv(io.StringIO(whole)) if whole.strip() else pd.DataFrame()
        return table if table.empty else _checked(table, path.name)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def _checked(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a table with whole lengths. Raises ValueError: a column is not there, or not of numbers."""
    for column in NEEDED[name]:
        if column not in table:
            raise ValueError(f"it has no column {column}")
    for column in (c for c in NUMBERS if c in table):
        values = pd.to_numeric(table[column], errors="coerce").astype(float)
        texts = table[column][values.isna() & table[column].notna()]
        if len(texts):
            raise ValueError(f"{str(texts.iloc[0])[:40]} in its column {column} is no number")
        if column in PLACES[name] and not np.isfinite(values).all():
            raise ValueError(f"its column {column} has rows without a number")
        table[column] = pd.to_numeric(table[column])
    if name == EVALUATED:
        if not (table["length"].between(1, 2**53) & (table["length"] % 1 == 0)).all():
            raise ValueError("its column length has rows without a whole number above 0")
        table["length"] = table["length"].astype(int)
    return table


def _settings(path: Path) -> dict[str, str]:
    """Return what the run's own config says of it, as far as it is one value a name."""
    try:
        config = json.loads((path / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    flat = {f"{k}.{n}": v for k, some in config.items() if isinstance(some, dict) for n, v in some.items()} | config
    return {name: str(flat[key]) for key, name in _CONFIG.items() if isinstance(flat.get(key), (str, int, float, list))}


def verdict(log: pd.DataFrame, evaluated: pd.DataFrame, online: pd.DataFrame) -> list[str]:
    """Return what the logs say: where the loss stands and how much it moves, recall by length, updates kept."""
    lines = []
    known = log["loss"].dropna() if "loss" in log else pd.Series(dtype=float)
    if len(known):
        end = known.tail(SMOOTH)
        moves = f" (it moves by {end.std():.3f} from row to row)" if len(end) > 2 else ""
        lines.append(
            f"The loss went from {known.iloc[0]:.3f} to {end.mean():.3f} nats per token, the mean of the last "
            f"{counted(len(end), 'row')} of the log{moves}."
        )
        if skipped := int(log["loss"].isna().sum()):
            lines.append(f"Without a loss: {counted(skipped, 'row')} of the log, whose steps were skipped.")
    if len(evaluated):
        last = evaluated[evaluated["step"] == evaluated["step"].max()]
        texts = []
        for _, row in last.iterrows():
            right = row.get("passkey_accuracy", math.nan)
            texts.append(
                f"{format_length(int(row['length']))} loss {number(row['loss'], '.3f')}"
                + ("" if pd.isna(right) else f", {right:.2f} of answers right")
            )
        lines.append(f"On held-out text at step {last['step'].iloc[0]:,.0f}: {'; '.join(texts)}.")
    if len(online):
        decisions = online["decision"].value_counts()
        lines.append("Updates: " + ", ".join(f"{n} {what}" for what, n in decisions.items()) + ".")
    return lines or ["Nothing is logged yet."]


def steps(log: pd.DataFrame) -> list[Figure]:
    """Return the figures of the log over its steps."""
    out = []
    for columns, title, what in STEPS:
        known = [c for c in columns if c in log and log[c].notna().any() and (c != "length" or log[c].nunique() > 1)]
        if not known:
            continue
        out.append(series(log, log["step"].tolist(), known, title, what, smooth=title.startswith("Loss")))
    return out


def series(
    table: pd.DataFrame, x: Sequence[float], columns: Sequence[str], title: str, what: str, smooth: bool = False
) -> Figure:
    """Return columns of a log over its steps, with running means of SMOOTH rows where they are noisy."""
    of, words = [], []
    for i, column in enumerate(columns):
        name, values = NAMES.get(column, column), table[column]
        style = {"colour": INK, "dash": "solid"} if i == 0 else look(i - 1)
        text = [f"step {s:,.0f}" for s in x]
        if smooth and len(values) > 3 * SMOOTH:
            thin = {"colour": MUTED, "dash": "solid"} if i == 0 else look(i - 1)
            of.append(Line(f"{name}, each row", x, values.tolist(), **(thin | {"symbol": ""}), width=0.8, text=text))
            values, name = values.rolling(SMOOTH, min_periods=1).mean(), f"{name}, mean of {SMOOTH} rows"
        of.append(Line(name, x, values.tolist(), **(style | {"symbol": ""}), text=text))
        last = table[column].dropna()
        words.append(f"{NAMES.get(column, column)} {number(float(last.iloc[-1]), '.4g')} at the end")
    log = None if smooth or "norm" in what else False
    y = figures.values_axis([v for line in of for v in line.y], what, log)
    frame = pd.DataFrame({"step": list(x), **{c: table[c].tolist() for c in columns}})
    axis = figures.steps_axis("step")
    return figures.lines(title, f"{'; '.join(words)}.".capitalize(), frame, of, axis, y, height=320)


def evaluations(evaluated: pd.DataFrame) -> list[Figure]:
    """Return held-out loss and recall over the steps, a line a length."""
    out = []
    for column, title, what in (
        ("loss", "Held-out loss by length", "loss, nats per token"),
        ("passkey_accuracy", "Right answers by length", "share of answers that are right"),
    ):
        if column not in evaluated or evaluated[column].isna().all():
            continue
        of = []
        for i, (length, some) in enumerate(evaluated.groupby("length")):
            text = [f"step {s:,.0f}" for s in some["step"]]
            name = f"{format_length(int(str(length)))} tokens"
            of.append(Line(name, some["step"].tolist(), some[column].tolist(), **look(i), text=text))
        y = figures.share_axis(what)
        y = y if column != "loss" else figures.values_axis([v for line in of for v in line.y], what)
        words = ", ".join(f"{number(line.y[-1], '.3f')} at {line.name}" for line in of)
        axis = figures.steps_axis("step")
        out.append(figures.lines(title, f"At the last evaluation {words}.", evaluated, of, axis, y, height=320))
    return out


def updates(online: pd.DataFrame) -> list[Figure]:
    """Return losses on new text before and after each update."""
    columns = [c for c in ("train_loss", "new_before", "new_after") if c in online and online[c].notna().any()]
    if not columns:
        return []
    names = {"train_loss": "while training", "new_before": "new text, before", "new_after": "new text, after"}
    of = [
        Line(names[c], online["update"].tolist(), online[c].tolist(), **look(i),
             text=[f"update {u}: {d}" for u, d in zip(online["update"], online["decision"])])
        for i, c in enumerate(columns)
    ]  # fmt: skip
    y = figures.values_axis([v for line in of for v in line.y], "loss, nats per token")
    ends = [number(float(online[c].dropna().iloc[-1]), ".3f") for c in columns]
    words = ", ".join(f"{line.name} {end}" for line, end in zip(of, ends))
    frame, axis = online[["update", "decision", *columns]], figures.steps_axis("update")
    return [figures.lines("Loss of each update", f"At the last update: {words}.", frame, of, axis, y, height=320)]


KINDS.register(Kind("train", fits, page))
