"""Data and scores of this library's lm-eval tasks. lm-eval calls the makers of data with its metadata."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import datasets

from rnn_longctx.data import load_tokenizer
from rnn_longctx.data.content import DAMAGED, lines
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.passkey import passkey_batch

Docs = dict[str, datasets.Dataset]


def passkey(tokenizer: str = "bytes", max_seq_lengths: Any = (4096,), limit: int = 60, seed: int = 0, **_: Any) -> Docs:
    """Return `limit` prompts of `rnn_longctx.tasks.passkey` at each length, their depths spread evenly.

    Lengths are in tokens of `tokenizer` ("bytes", a folder, a hub id), before the prompt is made text.
    """
    cutter = load_tokenizer(tokenizer)
    prompts = [(n, p) for n in max_seq_lengths for p in passkey_batch(cutter, n, limit, seed)]
    return _docs(
        [{"input": cutter.decode(p.ids), "answer": p.answer, "depth": p.depth, "length": n} for n, p in prompts]
    )


def passkey_results(doc: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """Return 1 for five right digits, and no sixth after them."""
    return {"exact_match": float(re.match(r"\d*", replies[0].strip())[0] == doc["answer"])}  # type: ignore[index]


def questions(data: str = "", **_: Any) -> Docs:
    rows = _lines(data, "rnn_longctx_qa", ("context", "question", "answers"))
    listed = [[r["answers"]] if isinstance(r["answers"], str) else list(r["answers"]) for r in rows]
    return _docs([r | {"answers": answers} for r, answers in zip(rows, listed)])


def question_results(doc: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """Return the best of word F1 and of equality over the answers, as SQuAD has them: without case and articles."""
    reply = _words(replies[0])
    answers = [_words(answer) for answer in doc["answers"]]
    return {"f1": max((f1(reply, answer) for answer in answers), default=0.0), "exact_match": float(reply in answers)}


def summaries(data: str = "", **_: Any) -> Docs:
    return _docs(_lines(data, "rnn_longctx_summary", ("document", "summary")))


def summary_results(doc: dict[str, Any], replies: list[str]) -> dict[str, float]:
    return {"rouge_l": rouge_l(replies[0], doc["summary"])}


def f1(reply: list[str], answer: list[str]) -> float:
    """Return the F-measure of the words that two texts have in common; 1 where both are empty."""
    if not reply or not answer:
        return float(reply == answer)
    return _harmonic(sum((Counter(reply) & Counter(answer)).values()), len(reply), len(answer))


def rouge_l(reply: str, summary: str) -> float:
    """Return the F-measure of the longest common subsequence of words (letters and digits, in lower case, not
    stemmed)."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reply, summary))
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return _harmonic(row[-1], len(a), len(b))


def _harmonic(common: int, first: int, second: int) -> float:
    return 2 * common / (first + second) if common else 0.0


def _words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _lines(path: str, task: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file, with `keys` alone."""
    if not path:
        raise InputError(f"{task} reads a JSONL file of {', '.join(keys)}: name it with --data")
    rows, number = [], 0
    try:
        for line in lines(Path(path)):
            number += 1
            if line.strip():
                row = json.loads(line)
                rows.append({key: row[key] for key in keys})
    except DAMAGED as error:
        raise InputError(f"{path} cannot be read after line {number}: {error}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}, line {number}: expected a JSON object with {', '.join(keys)}") from None
    if not rows:
        raise InputError(f"{path} holds no documents")
    return rows


def _docs(rows: list[dict[str, Any]]) -> Docs:
    return {"test": datasets.Dataset.from_list(rows)}
