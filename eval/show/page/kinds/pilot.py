"""The report of a pilot: what to do, then what that rests on. It reads pilot.json and the tables beside it alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rnn_longctx.config import counted, format_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.figures import (
    INK,
    Line,
    is_log,
    lengths_axis,
    level,
    look,
    number,
    upright,
    values_axis,
)
from rnn_longctx.eval.show.page.kinds import eval as of_results
from rnn_longctx.eval.show.page.kinds import probe as of_probe
from rnn_longctx.eval.show.page.parts import KINDS, Code, Kind, Page, Section, Table
from rnn_longctx.eval.show.style import size

FILE = "pilot.json"
_OUTCOMES = {
    "none needed": "no remedy is needed",
    "remedy": "use {remedy}",
    "last tokens": "give it the last tokens only",
    "insufficient": "no remedy suffices",
    "undecided": "too little was measured",
}


def page(path: Path) -> Page:
    """Return the page of a pilot. Raises InputError: its file cannot be read."""
    try:
        found = json.loads((path / FILE).read_text())
        return _page(path, found)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"cannot read the pilot in {path}: {' '.join(str(error).split())}") from None


def _page(path: Path, found: Mapping[str, Any]) -> Page:
    advice, train_length = found["recommendation"], int(found["model"]["train_length"])
    outcome = _OUTCOMES[advice["kind"]].format(remedy=advice["remedy"])
    parts = {
        "What to do": _advice(advice),
        "Where and how often it collapses": _collapse(found["collapse"], found["text"], train_length),
        "Remedies and controls": _remedies(found),
        "Questions and recall": _recall(found),
        "What reading everything gains": _gains(found["context_gain"], train_length),
        "Heads": _heads(found["onset"]),
        "Speed and memory": _cost(found["throughput"]),
        "What it took, and what was not measured": _took(found),
        "Text": _excerpts(found["excerpts"]),
    }
    sections = [Section(title, some) for title, some in parts.items() if some]
    if of_probe.fits(path / "probe"):
        sections += [Section(f"Probe: {part.title}", part.parts) for part in of_probe.page(path / "probe").sections]
    if of_results.fits(path):
        sections += [Section(f"Measured: {part.title}", part.parts) for part in of_results.sections(Results.read(path))]
    return Page(
        f"{found['model']['name']} on {found['text']['name']}: {outcome}", advice["words"], _header(found), sections
    )


def _header(found: Mapping[str, Any]) -> dict[str, str]:
    model, text, budget = found["model"], found["text"], found["budget"]
    lines = {
        "model": f"{model['name']}, {model['parameters']:,} parameters",
        "training length": format_length(int(model["train_length"])),
        "text": f"{text['name']}: {counted(text['documents'], 'document')}, about {text['tokens']:,} tokens",
        "runs on": f"{model['device']}, {model['backend']}",
        "time": f"{budget['spent']:.0f} s of a budget of {budget['seconds']:.0f} s",
    }
    if budget["price_an_hour"] is not None:
        lines["cost"] = f"{budget['price_an_hour'] * budget['spent'] / 3600:.2f}"
    return lines


def _advice(advice: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    if advice["python"]:
        parts += ["In Python:", Code(advice["python"]), "On the command line:", Code(advice["command"])]
    if advice["uncertainty"]:
        parts += ["How sure that is:", *advice["uncertainty"]]
    for what, command in advice["next_steps"]:
        parts += [f"Next step. {what}:", Code(command)]
    return parts


def _collapse(fall: Mapping[str, Any], text: Mapping[str, Any], train_length: int) -> list[Any]:
    rows = fall["lengths"]
    if not rows:
        return []
    frame = pd.DataFrame(rows)
    losses = [_float(row["loss"]) for row in rows]
    errors = [0.0 if row["stderr"] is None else row["stderr"] for row in rows]
    lengths = [row["length"] for row in rows]
    line = Line(
        "without a remedy", lengths, losses,
        [v - 2 * e for v, e in zip(losses, errors)], [v + 2 * e for v, e in zip(losses, errors)], INK,
    )  # fmt: skip
    axis = values_axis(losses, "loss, nats a token")
    marks = [upright(train_length, "training length")]
    if fall["threshold"] is not None:
        marks.append(level(fall["threshold"], "collapse", log=is_log(axis)))
    first, last = (f"{number(losses[i])} at {format_length(lengths[i])} tokens" for i in (0, -1))
    title, said = "Loss over length without a remedy", f"Without a remedy the loss is {first} and {last}."
    figure = figures.lines(title, said, frame, [line], lengths_axis(lengths, "tokens"), axis, marks)
    share = f"{text['beyond_training']:.0%} of the documents are longer than the training length"
    if text["reach_collapse"] is not None:
        share += f", {text['reach_collapse']:.0%} are long enough to reach the collapse by themselves"
    return [
        f"{fall['verdict'][:1].upper()}{fall['verdict'][1:]}. {share}.",
        figure,
        Table("Stretches that fail", frame),
    ]


def _remedies(found: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for key, title in (("compared", "The best, on all that was read"), ("screened", "All that were tried")):
        if (compared := found[key]) is None or (key == "screened" and compared == found["compared"]):
            continue
        note = f"At {format_length(compared['length'])} tokens, the lowest loss first"
        note += f"; over control: over {compared['against']}." if compared["against"] else "."
        parts.append(Table(title, pd.DataFrame([_row(row) for row in compared["rows"]]), note))
    return parts


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    saved, gain = row["saved"] or {}, row["gain"] or {}
    recall = {f"{task} right": value for task, value in row["recall"].items()}
    return {
        "remedy": row["name"] + (" (control)" if row["control"] else ""),
        "place": row["place"],
        "loss": row["loss"],
        "over control": row["over_control"],
        "slices": row["n"],
        "saves": saved.get("value"),
        "saves, from": saved.get("low"),
        "saves, to": saved.get("high"),
        "gain over control": gain.get("value"),
        "gain, from": gain.get("low"),
        "gain, to": gain.get("high"),
        **recall,
        "speed over none": row["speed"],
        "collapses at": row["fails_at"],
    }


def _recall(found: Mapping[str, Any]) -> list[Any]:
    if not found["recall"]:
        return []
    frame = pd.DataFrame(found["recall"]).dropna(axis=1, how="all")
    parts: list[Any] = []
    for task, gain in found["above_without_document"].items():
        low, high = gain["low"], gain["high"]
        interval = "one question has no interval" if low is None else f"95% {low:+.2f} to {high:+.2f}"
        parts.append(
            f"{task}: {gain['value']:+.2f} of the answers more are right with the document than without ({interval})."
        )
    return [*parts, Table("Share of right answers", frame)]


def _gains(rows: list[Mapping[str, Any]], train_length: int) -> list[Any]:
    if not rows:
        return []
    frame = pd.DataFrame(rows)
    lines, values = [], [0.0]
    for i, (name, some) in enumerate(frame.groupby("name", sort=False)):
        how = {"colour": INK} if name == "none" else look(i)
        some = some.astype({"gain": float, "low": float, "high": float})
        known = some["low"].notna().all()
        low, high = (some[c].tolist() if known else None for c in ("low", "high"))
        lines.append(Line(str(name), some["length"].tolist(), some["gain"].tolist(), low, high, **how))
        values += some["gain"].tolist()
    last = frame.iloc[-1]
    said = (
        f"Under {last['name']} at {format_length(int(last['length']))} tokens the loss is "
        f"{number(_float(last['gain']))} nats a token below that of {last['control']}."
    )
    axis = values_axis(values, "loss of the control minus loss, nats a token")
    lengths = sorted(set(frame["length"].tolist()))
    marks = [upright(train_length, "training length")]
    figure = figures.lines("Context gain over length", said, frame, lines, lengths_axis(lengths, "tokens"), axis, marks)
    return ["Above 0 the model uses text older than what the control reads again.", figure]


def _heads(onset: Mapping[str, Any] | None) -> list[Any]:
    if onset is None:
        return []
    return [
        f"{onset['verdict'][:1].upper()}{onset['verdict'][1:]}.",
        Table("Worst heads", pd.DataFrame(onset["worst"])),
    ]


def _cost(rows: list[Mapping[str, Any]]) -> list[Any]:
    if not rows:
        return []
    named = [
        row | {"peak_bytes": None if row["peak_bytes"] is None else size(row["peak_bytes"])} for row in map(dict, rows)
    ]
    return [Table("Reading and generating", pd.DataFrame(named).dropna(axis=1, how="all"))]


def _took(found: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = [Table("Estimate before it began", pd.DataFrame(found["estimate"]["stages"]))]
    steps = pd.DataFrame([{"step": name, **step} for name, step in found["steps"].items()])
    if len(steps):
        parts.append(Table("Steps, and what they took, in seconds", steps))
    if found["not_measured"]:
        parts.append(Table("Not measured", pd.DataFrame(found["not_measured"])))
    if found["not_applicable"]:
        rows = [{"remedy": name, "why": why} for name, why in found["not_applicable"].items()]
        parts.append(Table("Not applicable to this model", pd.DataFrame(rows)))
    return parts


def _excerpts(excerpts: Mapping[str, Any] | None) -> list[Any]:
    if excerpts is None:
        return []
    parts: list[Any] = []
    for some in excerpts["text"]:
        parts += [f"Slice {some['slice']}, from token {some['from']}:", Code(some["text"])]
    if excerpts["questions"]:
        asked = [{"question": one["question"], "answers": " | ".join(one["answers"])} for one in excerpts["questions"]]
        parts.append(Table("Questions", pd.DataFrame(asked)))
    return parts


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


KINDS.register(Kind("pilot", fits=lambda path: (path / FILE).is_file(), page=page, over=("eval", "probe")))
