"""Accuracy of a task's answers (`rnn_longctx.tasks`) over length and depth.

Answers are generated greedily after the prompt, or taken as the likeliest tokens in one pass over the whole example, as
the task says. Lengths are in the model's tokens; depths are evenly spaced.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.base import Job, Measuring, forget_peak, peak_bytes
from rnn_longctx.eval.results import Row
from rnn_longctx.models.generate import continuation, prefill
from rnn_longctx.models.modes import evaluating
from rnn_longctx.models.stops import unused_rows
from rnn_longctx.spec import canonical, quiet
from rnn_longctx.tasks.base import DEPTHS, Example, Task

ANSWER_LOSS = "answer_nats_per_token"  # the metric of the true answer's loss after its prompt

# what a model said in the places of the answers, a row an example; seconds to the first token and to each next one
Replies = tuple[list[np.ndarray], tuple[float, float] | None]


@dataclass(frozen=True)
class Counts:
    """n: examples at every length; tokens: fewer at long ones, down to `least`, while n * L is above; max: the longest
    length measured."""

    n: int = 60
    least: int = 10
    tokens: int = 256 * 1024
    max: int | None = quiet(None)

    def __post_init__(self) -> None:
        if self.n < 1 or self.least < 1:
            raise InputError(f"n and least must be at least 1, got n={self.n}, least={self.least}")

    def at(self, length: int) -> int:
        """Return the number of examples at a length."""
        fit = self.tokens // length
        return min(self.n, max(self.least, fit // DEPTHS * DEPTHS or fit))  # whole rounds of the depths


@dataclass(frozen=True)
class Recall(Job):
    """The share of a task's answers that are right."""

    kind = "accuracy"

    task: Task
    counts: Counts = field(default_factory=Counts)

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def label(self) -> str:
        return self.task.label

    @property
    def max(self) -> int | None:
        """The longest length measured."""
        return self.counts.max

    @property
    def reads_prompts(self) -> bool:
        return self.task.generated

    def examples(self, measuring: Measuring, length: int, n: int) -> list[Example]:
        """Return the `n` examples of a length. Raises InputError where the task makes them of another length."""
        task, tokenizer = self.task, measuring.model.tokenizer
        rngs = [task.generator(measuring.seed, length, i) for i in range(n)]
        examples = [task.example(length, i, n, rng, tokenizer) for i, rng in enumerate(rngs)]
        sizes = {len(e.prompt) if task.generated else len(e.ids) for e in examples}
        if sizes != {length}:
            raise InputError(f"{task.name} makes examples of {sorted(sizes)} tokens where {length} were asked for")
        return examples

    def check(self, measuring: Measuring, lengths: list[int]) -> None:
        task, model, shortest = self.task, measuring.model, min(lengths)
        if task.vocab_size is not None and task.vocab_size > model.vocab_size:
            ids = f"{task.vocab_size} ids, more than the vocabulary of {model.name}, {model.vocab_size}"
            raise InputError(f"{task.name} has {ids}")
        task.check(shortest, self.counts.at(shortest), measuring.seed, model.tokenizer)

    def cost(self, measuring: Measuring, lengths: list[int]) -> int:
        restart = measuring.model.restart if self.task.generated else None
        read = {n: n - (restart.block_start(n) if restart else 0) for n in self.todo(measuring, lengths)}
        return sum(self.counts.at(n) * tokens for n, tokens in read.items())

    def run(self, measuring: Measuring, lengths: list[int]) -> Iterator[Row]:
        for length in self.todo(measuring, lengths):
            yield from self._run(measuring, length)

    def key(self, measuring: Measuring, length: int, depth: float | None = None) -> Row:
        """Return the key of a cell."""
        return measuring.key(self.label, self.task.text, length, "accuracy", depth)

    def __str__(self) -> str:
        parameters = (canonical("", thing).partition(":")[2] for thing in (self.counts, self.task))
        return f"{self.name}:{','.join(filter(None, parameters))}"

    def todo(self, measuring: Measuring, lengths: list[int]) -> list[int]:
        return [n for n in lengths if not measuring.done(self.key(measuring, n), self.counts.at(n))]

    @torch.inference_mode()
    def _run(self, measuring: Measuring, length: int) -> Iterator[Row]:
        n, began, task = self.counts.at(length), time.perf_counter(), self.task
        examples = self.examples(measuring, length, n)
        forget_peak(measuring)
        scores: list[float] = []
        losses: list[float] | None = [] if task.generated and task.answer_loss else None
        times: list[tuple[float, float]] = []
        batch = min(n, measuring.batch)
        for i in range(0, n, batch):
            some = examples[i : i + batch]
            if task.generated:
                replies, seconds = generated(measuring, task, some, losses)
            else:
                replies, seconds = likeliest(measuring, task, some)
            scores += [float(task.right(r, e, measuring.model.tokenizer)) for r, e in zip(replies, some)]
            times += [] if seconds is None else [seconds]
        seconds_all = time.perf_counter() - began
        cost = {
            "seconds": seconds_all,
            "tokens_per_second": n * length / seconds_all,
            "peak_bytes": peak_bytes(measuring),
            "first_token_seconds": sum(first for first, _ in times) / len(times) if times else None,
            "next_token_seconds": sum(following for _, following in times) / len(times) if times else None,
            "tokens_read": length,
            "chance": task.chance,
        }
        for depth in sorted({e.depth for e in examples if e.depth is not None}):
            at = [score for score, e in zip(scores, examples) if e.depth == depth]
            yield measuring.row(self.key(measuring, length, depth), at, **cost)
        if losses is not None:
            key = measuring.key(self.label, self.task.text, length, ANSWER_LOSS)
            yield measuring.row(key, losses, **cost | {"chance": None})
        # the row of the whole length is written last: it says that the others are there
        yield measuring.row(self.key(measuring, length), scores, **cost)


def generated(measuring: Measuring, task: Task, examples: list[Example], losses: list[float] | None = None) -> Replies:
    """Let the model answer each prompt in its own tokens, greedily; `losses` gets those of the true answers."""
    model, size = measuring.model, len(examples)
    new = max(max(e.new_tokens, int(e.answers.sum())) for e in examples)
    ids = torch.from_numpy(np.stack([e.prompt for e in examples]))
    began = time.perf_counter()
    logits, cache = prefill(model, ids, segment=max(1, measuring.segment // size))
    logits.argmax(-1).cpu()  # waits for a GPU
    at_first = time.perf_counter()
    if losses is not None:
        losses += _answer_losses(model, logits, cache.clone(), examples)
        at_first, began = time.perf_counter(), began + time.perf_counter() - at_first
    tokens = continuation(model, logits, cache)
    replies = torch.stack([next(tokens) for _ in range(new)], 1).cpu()
    each = (time.perf_counter() - at_first) / max(1, new - 1)
    start = model.restart.block_start(ids.shape[1]) if model.restart else 0
    measuring.progress(size * (ids.shape[1] - start))
    return list(replies.numpy()), (at_first - began, each)


def _answer_losses(model: Any, logits: torch.Tensor, cache: Any, examples: list[Example]) -> list[float]:
    """Return the mean loss of each true answer after its prompt, nats a token; `cache` is read on with the answers."""
    answers = [torch.from_numpy(e.ids[e.answers]) for e in examples]
    ids = pad_sequence(answers, batch_first=True).to(logits.device)  # what stands behind an answer is not looked at
    with evaluating(model):
        after = [logits[:, None]] if ids.shape[1] == 1 else [logits[:, None], model.logits(model(ids[:, :-1], cache))]
    losses = F.cross_entropy(torch.cat(after, 1).transpose(1, 2).float(), ids, reduction="none").double().cpu()
    return [float(row[: len(answer)].mean()) for row, answer in zip(losses, answers)]


def likeliest(measuring: Measuring, task: Task, examples: list[Example]) -> Replies:
    """Read each example, and take the likeliest token at every answer."""
    model, size = measuring.model, len(examples)
    ids = torch.from_numpy(np.stack([e.ids for e in examples]))
    answers = torch.from_numpy(np.stack([e.answers for e in examples]))
    tokens = torch.zeros_like(ids)
    segment, length = max(1, measuring.segment // size), ids.shape[1]
    with evaluating(model):
        cache = model.new_cache()
        for t in range(0, length - 1, segment):
            u = min(t + segment, length - 1)
            hidden = model(ids[:, t:u].to(model.device), cache)
            here = answers[:, t + 1 : u + 1]
            logits = model.logits(hidden[here.to(hidden.device)])
            if task.vocab_size is None:
                unused = unused_rows(model.tokenizer, logits.shape[-1], logits.device)
                logits = logits if unused is None else logits.masked_fill(unused, -math.inf)
            tokens[:, t + 1 : u + 1][here] = logits.argmax(-1).cpu()
            measuring.progress((u - t) * size)
    return [row[where] for row, where in zip(tokens.numpy(), answers.numpy())], None
