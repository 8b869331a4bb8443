"""Passkey retrieval over length and depth (arXiv 2410.07145): five digits, greedy, exact match.

The prompt is the paper's, headerless below 1K tokens. Depths are evenly spaced and lengths are in the model's tokens.
Another haystack (`haystack`, a text) and another wording (`template`, a YAML file of header, key, with {0} for the
answer, and question) show whether a recall is more than one template's number.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from rnn_longctx.config import load_yaml
from rnn_longctx.data import Text, load_text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.base import Context, Task, forget_peak, peak_bytes
from rnn_longctx.eval.results import Row
from rnn_longctx.models.generate import continuation, prefill
from rnn_longctx.spec import quiet
from rnn_longctx.tasks.multikey import multikey_batch
from rnn_longctx.tasks.passkey import passkey_batch
from rnn_longctx.tasks.prompts import Prompt, Style
from rnn_longctx.tasks.words import words_batch


@dataclass(frozen=True)
class Passkey(Task):
    """n: prompts at every length; tokens: fewer at long ones, down to `least`, while n * L is above; max: the longest
    length measured; haystack: a text to hide the key in, instead of the paper's sentences; template: a YAML file with
    another wording."""

    name = "passkey"
    asks = True
    n: int = 60
    least: int = 10
    tokens: int = 256 * 1024
    max: int | None = quiet(None)
    haystack: str | None = quiet(None)
    template: str | None = quiet(None)

    def __post_init__(self) -> None:
        if self.n < 1 or self.least < 1:
            raise InputError(f"passkey: n and least must be at least 1, got n={self.n}, least={self.least}")
        if self.template:
            _style(self.template)

    @property
    def label(self) -> str:
        label = self.name
        if self.haystack:
            label += f"-in-{_slug(Path(self.haystack).name)}"
        if self.template:
            digest = hashlib.sha256(repr(_style(self.template)).encode()).hexdigest()[:6]
            label += f"-as-{_slug(Path(self.template).stem)}-{digest}"
        return label

    def text(self, context: Context) -> Text | str:
        """What rows name as their text: the haystack, or where it is the paper's the task's name."""
        spec = self.haystack
        return self.name if spec is None else context.memo(("text", spec), lambda: load_text(spec))

    def wording(self) -> Style | None:
        return _style(self.template) if self.template else None

    def hay(self, context: Context) -> Text | None:
        text = self.text(context)
        return text if isinstance(text, Text) else None

    def count(self, length: int) -> int:
        fit = self.tokens // length
        return min(self.n, max(self.least, fit // 10 * 10 or fit))  # whole rounds of the ten depths

    def prompts(self, context: Context, length: int, n: int) -> list[Prompt]:
        style, hay = self.wording() or "auto", self.hay(context)
        return passkey_batch(context.model.tokenizer, length, n, context.seed, style, hay)

    def right(self, said: str, answer: str) -> bool:
        return re.match(r"\d*", said)[0] == answer  # type: ignore[index]

    def check(self, context: Context, lengths: list[int]) -> None:
        shortest = min(lengths)
        self.prompts(context, shortest, 1)
        replace(self, haystack=None).prompts(context, shortest, self.count(shortest))  # answers differ in tokens

    def cost(self, context: Context, lengths: list[int]) -> int:
        restart = context.model.restart
        return sum(
            self.count(n) * (n - (restart.block_start(n) if restart else 0)) for n in self._todo(context, lengths)
        )

    def run(self, context: Context, lengths: list[int]) -> Iterator[Row]:
        for length in self._todo(context, lengths):
            yield from self._run(context, length)

    def _todo(self, context: Context, lengths: list[int]) -> list[int]:
        return [n for n in lengths if not context.done(self, self.text(context), n, "accuracy", self.count(n))]

    @torch.inference_mode()
    def _run(self, context: Context, length: int) -> Iterator[Row]:
        n, began = self.count(length), time.perf_counter()
        prompts = self.prompts(context, length, n)
        forget_peak(context)
        right: list[float] = []
        first = following = 0.0
        batch = min(n, context.batch)
        for i in range(0, n, batch):
            answers, seconds = _answer(context, prompts[i : i + batch])
            right += [float(self.right(a, p.answer)) for a, p in zip(answers, prompts[i : i + batch])]
            first, following = first + seconds[0], following + seconds[1]
        seconds_all = time.perf_counter() - began
        cost = {
            "seconds": seconds_all, "tokens_per_second": n * length / seconds_all, "peak_bytes": peak_bytes(context),
            "first_token_seconds": first / -(-n // batch), "next_token_seconds": following / -(-n // batch),
            "tokens_read": sum(len(p.ids) for p in prompts) // n,
        }  # fmt: skip
        for depth in sorted({p.depth for p in prompts}):
            at = [r for r, p in zip(right, prompts) if p.depth == depth]
            yield context.row(self, self.text(context), length, "accuracy", at, depth, **cost)
        # the row of the whole length is written last: it says that the others are there
        yield context.row(self, self.text(context), length, "accuracy", right, **cost)


@dataclass(frozen=True)
class MultiKey(Passkey):
    """`keys` labelled keys, one of which is asked for."""

    name = "multikey"
    keys: int = 4

    @property
    def label(self) -> str:
        return super().label.replace(self.name, f"{self.name}{self.keys}", 1)

    def prompts(self, context: Context, length: int, n: int) -> list[Prompt]:
        wording, hay = self.wording(), self.hay(context)
        return multikey_batch(context.model.tokenizer, length, n, context.seed, self.keys, wording, hay)


@dataclass(frozen=True)
class Words(Passkey):
    """The key is a word."""

    name = "words"

    def prompts(self, context: Context, length: int, n: int) -> list[Prompt]:
        return words_batch(context.model.tokenizer, length, n, context.seed, self.wording(), self.hay(context))

    def right(self, said: str, answer: str) -> bool:
        return re.match(r"\w*", said)[0] == answer  # type: ignore[index]


@cache
def _style(path: str) -> Style:
    return load_yaml(Style, path)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _answer(context: Context, prompts: list[Prompt]) -> tuple[list[str], tuple[float, float]]:
    """What the model says after each prompt, greedily, and seconds to the first token and to each next one."""
    model, tokenizer = context.model, context.model.tokenizer
    new = max(p.new_tokens for p in prompts)
    ids = torch.from_numpy(np.stack([p.ids for p in prompts]))
    began = time.perf_counter()
    logits, cache = prefill(model, ids, segment=max(1, context.segment // len(prompts)))
    logits.argmax(-1).cpu()  # waits for a GPU
    at_first = time.perf_counter()
    tokens = continuation(model, logits, cache)
    said = torch.stack([next(tokens) for _ in range(new)], 1).cpu()
    each = (time.perf_counter() - at_first) / max(1, new - 1)
    start = model.restart.block_start(ids.shape[1]) if model.restart else 0
    context.progress(len(prompts) * (ids.shape[1] - start))
    return [tokenizer.decode(row).strip() for row in said.tolist()], (at_first - began, each)
