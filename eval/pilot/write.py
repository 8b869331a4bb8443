"""What a pilot writes: results.csv and .parquet, pilot.json (all that the page needs), report.html; and what it prints.

Nothing of a document stands in it, nor of a question or an answer, unless the person asked for that (`--with-text`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text as Words

from rnn_longctx.config import counted, format_length
from rnn_longctx.data import Text, tokens
from rnn_longctx.eval.pilot.estimate import Estimate
from rnn_longctx.eval.pilot.findings import (
    above_without_document,
    alike,
    collapse,
    comparison,
    context_gain,
    most_read,
    onset,
    ranked,
    recall_rows,
    throughput,
)
from rnn_longctx.eval.pilot.limits import text_tokens
from rnn_longctx.eval.pilot.recommend import Recommendation, recommend
from rnn_longctx.eval.pilot.run import Pilot
from rnn_longctx.eval.show.page.page import write_page
from rnn_longctx.eval.show.page.parts import page_of
from rnn_longctx.eval.tune.budget import memory_text, time_text
from rnn_longctx.files import write_atomic
from rnn_longctx.mitigations import REMEDIES
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.segments import reads
from rnn_longctx.tasks.qa import QuestionAnswering

FILE, PAGE = "pilot.json", "report.html"
NAMED = 3  # remedies whose gains and costs stand beside those of none
EXCERPTS, EXCERPT = 4, 400  # of the text, where it may be shown: how many, and characters of each


def write_pilot(pilot: Pilot, estimate: Estimate) -> tuple[dict[str, Any], Recommendation]:
    """Write what is known of a pilot into its folder; return what pilot.json holds, and the recommendation."""
    pilot.results.gather()
    frame, c = pilot.frame(), pilot.config
    facts, advice = of_table(frame, about_model(pilot))
    fall = facts["collapse"]
    content = facts | {
        "model": _described(pilot.model),
        "text": documents(pilot.model, pilot.text, fall["length"]),
        "budget": {"seconds": c.budget, "spent": pilot.ledger.spent, "price_an_hour": c.price},
        "estimate": estimate.about(),
        "onset": _onset(pilot.folder, frame),
        "not_measured": pilot.not_measured,
        "not_applicable": pilot.not_applicable,
        "steps": pilot.ledger.steps,
        "excerpts": excerpts(pilot, fall["length"]) if c.with_text else None,
        "version": pilot.ledger.settings["version"],
    }
    content = plain(content)
    write_atomic(pilot.folder / FILE, json.dumps(content, indent=1, allow_nan=False).encode())
    write_page(page_of(pilot.folder), pilot.folder / PAGE)
    pilot.ledger.save()
    return content, advice


def of_table(frame: pd.DataFrame, about: dict[str, Any]) -> tuple[dict[str, Any], Recommendation]:
    """Return what a table says, by the keys of pilot.json, and the recommendation. about: see `recommend`."""
    advice, table = recommend(frame, about), most_read(frame)
    compared, everything = (
        comparison(some, wide, about.get("processor")) for some, wide in ((table, False), (frame, True))
    )
    best = [] if compared is None else [row.name for row in ranked(compared, NAMED)]
    names = list(dict.fromkeys(["none", *([advice.remedy] if advice.remedy else []), *best]))
    above = above_without_document(frame, advice.remedy or "none")
    facts = {
        "collapse": collapse(frame),
        "compared": None if compared is None else _compared(compared),
        "screened": None if everything is None else _compared(everything),
        "recall": recall_rows(table),
        "above_without_document": {task: gain._asdict() for task, gain in above.items()},
        "context_gain": context_gain(table, names),
        "throughput": throughput(table, names, None if compared is None else compared.length),
        "recommendation": asdict(advice),
    }
    return facts, advice


def about_model(pilot: Pilot) -> dict[str, Any]:
    """Return what the lines that use a remedy depend on."""
    ours = not isinstance(pilot.model, Adopted)
    return {
        "model": pilot.config.model,
        "text": pilot.config.text,
        "options": list(pilot.config.options),
        "tokenizer": _tokenizer(pilot),
        "train_length": pilot.train_length,
        "given_train_length": pilot.config.given_train_length,
        "adopted": not ours,
        "processor": pilot.speeds.processor,
        "foldable": [name for name, kind in REMEDIES.items() if kind.foldable] if ours else [],
        "per_length": [name for name, kind in REMEDIES.items() if kind.per_length],
    }


def _tokenizer(pilot: Pilot) -> str:
    """Return what names the model's tokenizer: bytes, what the person gave, what the checkpoint names, or the model,
    beside which it lies."""
    if pilot.model.tokenizer.name == "bytes":
        return "bytes"
    options = pilot.config.options
    named = dict(zip(options[::2], options[1::2])).get("--tokenizer")
    return named or str(getattr(pilot.model.tokenizer, "spec", None) or pilot.config.model)


def _described(model: LanguageModel) -> dict[str, Any]:
    state = model.state_size()
    return {
        "name": model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state": sum(state.fixed.values()),
        "state_a_token": state.per_token,
        "attends": model.attends,
        "train_length": model.train_length,
        "tokenizer": model.tokenizer.name,
        "device": str(model.device),
        "backend": model.backend,
        "reads": reads(model),
    }


def documents(model: LanguageModel, text: Text, collapses_at: int | None) -> dict[str, Any]:
    """Return how long the documents are, in tokens (about, by the rate of the text's beginning), and which share of
    them reaches beyond the training length, and to where the model collapses."""
    total, _ = text_tokens(model, text)
    sizes = np.array([len(document) for document in text.documents()]) * total / max(1, len(text))
    train_length = model.train_length or 0
    return {
        "name": text.name,
        "hash": text.hash,
        "documents": len(sizes),
        "tokens": total,
        "median": float(np.median(sizes)),
        "longest": float(sizes.max()),
        "beyond_training": float((sizes > train_length).mean()),
        "reach_collapse": None if collapses_at is None else float((sizes >= collapses_at).mean()),
    }


def _onset(folder: Path, frame: pd.DataFrame) -> dict[str, Any] | None:
    try:
        probed = json.loads((folder / "probe" / "probe.json").read_text())
        heads = pd.read_csv(folder / "probe" / "heads.csv")
    except (OSError, ValueError):
        return None
    hashes = set(frame["weights_hash"].dropna())
    return onset(probed, heads) if probed.get("weights_hash") in hashes or not hashes else None


def _compared(compared: Any) -> dict[str, Any]:
    best = [row.name for row in ranked(compared)]
    rows = [asdict(row) | {"place": best.index(row.name) + 1 if row.name in best else None} for row in compared.rows]
    for row, source in zip(rows, compared.rows):
        row["recall_gain"] = {task: gain._asdict() for task, gain in source.recall_gain.items()}
        gains = {"saved": source.saved, "gain": source.gain, "above": source.above}
        row |= {name: gain and gain._asdict() for name, gain in gains.items()}
    tied = [row.name for row in alike(compared)]
    return {"length": compared.length, "against": compared.against, "rows": rows, "not_told_apart": tied}


def excerpts(pilot: Pilot, collapses_at: int | None) -> dict[str, Any]:
    """Return text that the person wants to see: the beginnings of what is read where the model fails, and the questions
    with the answers that are right."""
    at = collapses_at or pilot.train_length
    shown = []
    for i in range(EXCERPTS):
        ids = tokens(pilot.text, pilot.model.tokenizer, i, at)[0][at // 2 :]
        shown.append(
            {"slice": i, "from": at // 2, "text": pilot.model.tokenizer.decode(ids[:EXCERPT].tolist())[:EXCERPT]}
        )
    files = [task.questions.asked for task in pilot.config.tasks if isinstance(task, QuestionAnswering)]
    return {
        "text": shown,
        "questions": [
            {"question": one.question, "answers": list(one.answers)} for questions in files for one in questions
        ],
    }


def plain(value: Any) -> Any:
    """Return what JSON can hold: numbers that are none as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- the terminal


def estimate_table(estimate: Estimate, budget: float) -> list[RenderableType]:
    """Return what is printed before anything is measured."""
    grid = Table(box=None, pad_edge=False)
    for i, head in enumerate(("", "steps", "tokens", "time")):
        grid.add_column(head, justify="right" if i else "left")
    for stage in estimate.stages:
        if stage["steps"]:
            steps = f"{stage['begun']}" if stage["begun"] == stage["steps"] else f"{stage['begun']} of {stage['steps']}"
            grid.add_row(stage["stage"], steps, f"{stage['tokens']:,}", time_text(stage["seconds"]))
    total = f"about {time_text(estimate.seconds)} of a budget of {time_text(budget)}"
    total += f", {memory_text(estimate.peak_bytes)} of memory"
    if estimate.price is not None:
        total += f", at a price of {estimate.price:.2f}"
    return [Words("What a pilot will take", style="bold"), grid, Words(total), Words("")]


def summary(content: Mapping[str, Any], advice: Recommendation) -> list[RenderableType]:
    """Return what is printed at the end: the ranking, what to do and how sure that is, and the lines that do it."""
    pieces: list[RenderableType] = []
    if content["compared"] is not None:
        pieces += [_ranking(content["compared"]), Words("")]
    if content["onset"] is not None:
        pieces.append(Words(f"Heads: {content['onset']['verdict']}."))
    pieces += [Words(word) for word in advice.words]
    pieces += [Words(f"- {word}", style="dim") for word in advice.uncertainty]
    if advice.python:
        pieces += [Words(""), Words(advice.python), Words(""), Words(advice.command)]
    for what, command in advice.next_steps:
        pieces += [Words(""), Words(f"{what}:"), Words(f"  {command}")]
    if content["not_measured"]:
        steps = content["not_measured"]
        took = time_text(sum(step["seconds"] for step in steps))
        first = ", ".join(step["step"] for step in steps[:2]) + (", ..." if len(steps) > 2 else "")
        pieces.append(Words(f"Not measured: {counted(len(steps), 'step')}, about {took} ({first})."))
    return pieces


def _ranking(compared: Mapping[str, Any]) -> RenderableType:
    tasks = list(dict.fromkeys(task for row in compared["rows"] for task in row["recall"]))
    grid = Table(box=None, pad_edge=False, title=f"Loss at {format_length(compared['length'])}", title_justify="left")
    grid.add_column("", overflow="fold", max_width=44)
    for head in ("loss", "over control", "n", *tasks, "speed"):
        grid.add_column(head, justify="right")
    for row in compared["rows"]:
        recall = [_number(row["recall"].get(task), ".2f") for task in tasks]
        name = Words(row["name"] + (" (control)" if row["control"] else ""))
        loss, over = _number(row["loss"], ".3f", "no number"), _number(row["over_control"], ".3f")
        grid.add_row(name, loss, over, str(row["n"]), *recall, _number(row["speed"], ".2f"))
    return grid


def _number(value: float | None, form: str, otherwise: str = "") -> str:
    return otherwise if value is None else format(value, form)
