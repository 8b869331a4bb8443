"""What a model can do while it is trained: loss on the held-out text and passkeys at several lengths, kept in eval.csv,
and whether the next stage of a schedule of lengths may begin. Losses are in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from rnn_longctx.data import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.loggers import Write
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.stops import unused_rows
from rnn_longctx.tasks.passkey import passkey_batch
from rnn_longctx.train.autocast import Autocast
from rnn_longctx.train.config import TrainConfig
from rnn_longctx.train.corpus import Corpus
from rnn_longctx.train.snapshots import Log
from rnn_longctx.train.state import RunState

COLUMNS = ["step", "tokens", "length", "loss", "passkey"]
SEGMENT = 4096  # tokens read at once
TOKENS = 2**18  # of held-out text read at one length, at most
WORSE = 1.05  # a stage is entered while the loss at the first length is within this factor of the best before it
ASK_EVERY = 20  # steps between two looks at a stage that may not begin yet


@torch.inference_mode()
@in_evaluation
def held_out_loss(model: Any, corpus: Corpus, length: int, rows: int, autocast: Autocast, since: int = 0,
                  most: int = 1024) -> float:  # fmt: skip
    """Mean loss at positions `since` + 1 to `length` of at most `most` held-out windows, `rows` at a time; NaN where
    the held-out text is shorter than one."""
    total, count = 0.0, 0
    for ids in corpus.validation(length, rows, most):
        cache = model.new_cache()
        for t in range(0, length, SEGMENT):
            goal = ids[:, t + 1 : t + 1 + SEGMENT]
            with autocast():
                losses = model.losses(model(ids[:, :-1][:, t : t + SEGMENT], cache), goal)
            losses = losses[:, max(0, since - t) :]
            total, count = total + float(losses.double().sum()), count + losses.numel()
    return total / count if count else math.nan


def late_loss(model: Any, corpus: Corpus, length: int, rows: int, autocast: Autocast) -> float:
    """Mean loss over the second half of the length, (length / 2, length]: of tokens that have a context to use."""
    return held_out_loss(model, corpus, length, rows, autocast, length // 2, max(1, TOKENS // length))


@torch.inference_mode()
@in_evaluation
def passkey_accuracy(model: Any, tokenizer: Tokenizer, length: int, n: int, seed: int, style: str, rows: int,
                     autocast: Autocast) -> float:  # fmt: skip
    """Share of `n` prompts of `length` tokens answered exactly. Greedy decoding gives the answer exactly if every
    answer token is the most likely one after the true ones before it, so one pass over prompt and answer decides it.
    Raises InputError when the length is too short for a prompt."""
    right, prompts = 0, passkey_batch(tokenizer, length, n, seed, style)
    for i in range(0, n, rows):
        some = prompts[i : i + rows]
        answers = [torch.from_numpy(p.reply) for p in some]
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1)  # some may be shorter
        ids = torch.cat([torch.stack([torch.from_numpy(p.ids) for p in some]), padded.clamp(min=0)], 1)
        ids, padded = ids.to(model.device), padded.to(model.device)
        cache = model.new_cache()
        with autocast():
            for piece in ids[:, : length - 1].split(SEGMENT, 1):
                model(piece, cache)
            logits = model.logits(model(ids[:, length - 1 : -1], cache))
        unused = unused_rows(tokenizer, logits.shape[-1], logits.device)
        said = (logits if unused is None else logits.masked_fill(unused, -math.inf)).argmax(-1)
        right += int(((said == padded) | (padded < 0)).all(1).sum())
    return right / n


class Evaluation:
    """eval.csv of a run: one row a length, for every step evaluated; and what else `writers` write to.

    Raises InputError for a length that the held-out text or a passkey prompt does not fit in.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, model: Any, out: Path, autocast: Autocast,
                 writers: Sequence[Write] = ()):  # fmt: skip
        assert config.evaluate is not None
        self.writers = writers
        self.config, self.corpus, self.model, self.autocast = config, corpus, model, autocast
        self.settings = config.evaluate
        for length in self.settings.lengths:
            if len(corpus.held_out) < length + 1:
                fits = f"the held-out text has {len(corpus.held_out)} tokens"
                raise InputError(f"evaluate.lengths: {length} is too long: {fits}; see data.held_out")
            if self.settings.passkeys:
                try:
                    n, style = self.settings.passkeys, config.data.passkey.style
                    passkey_batch(corpus.tokenizer, length, n, config.seed, style)  # all: they differ in tokens
                except InputError as error:
                    raise InputError(f"evaluate.lengths: {error}; or set evaluate.passkeys=0") from None
        self.file = out / "eval.csv"

    def due(self, step: int) -> bool:
        return step % self.settings.every == 0 or step == self.config.steps

    def __call__(self, step: int, tokens: int) -> list[float]:
        """Evaluate and write it down. Returns what models are compared by, larger is better: mean passkey accuracy,
        then mean loss, turned round."""
        losses, scores = [], []
        with closing(Log(self.file, step - 1, COLUMNS)) as log:  # what a killed process wrote from here on goes
            for length, loss, score in self.measure():
                losses.append(loss)
                scores.append(score)
                log.write({"step": step, "tokens": tokens, "length": length, "loss": loss, "passkey": score})
                for write in self.writers:
                    write({f"eval/loss_{length}": loss, f"eval/passkey_{length}": score}, step)
                print(f"step {step} at {length} tokens: loss {loss:.4f} passkey {score:.2f}", flush=True)
        loss, n = sum(losses) / len(losses), len(scores)
        return [
            sum(scores) / n if self.settings.passkeys else 0.0,
            -loss if math.isfinite(loss) else -math.inf,
        ]

    def measure(self) -> Iterator[tuple[int, float, float]]:
        """Of each length in turn: tokens, late loss, and the share of its passkeys answered, NaN without any."""
        c, rows, n = self.config, self.config.batch_size, self.settings.passkeys
        for length in self.settings.lengths:
            loss = late_loss(self.model, self.corpus, length, rows, self.autocast)
            seen = (self.model, self.corpus.tokenizer, length, n, c.seed, c.data.passkey.style, rows, self.autocast)
            yield length, loss, passkey_accuracy(*seen) if n else math.nan


def stage_of(config: TrainConfig, state: RunState, loss: Callable[[], float]) -> int:
    """Return the stage of the step after `state.step`: `state.stage`, or the one after it where that is due and may
    begin.

    A stage is due when the steps of those before it are over, and not entered while `loss()`, of the held-out text at
    the first stage's length, is more than 5% above the least at the start and at earlier entries, kept in
    `state.gate`. It is asked again every 20 steps; the wait is taken off the stage, the sum of steps stays.
    """
    step, stage = state.step, state.stage
    if stage + 1 == len(config.stages):
        return stage
    if step == 0:
        state.gate = loss()
    wait = step - sum(steps for _, steps in config.stages[: stage + 1])
    if wait < 0 or wait % ASK_EVERY:
        return stage
    assert state.gate is not None
    now, least = loss(), state.gate
    (first, _), (here, _), (there, _) = config.stages[0], config.stages[stage], config.stages[stage + 1]
    if not now <= WORSE * least:
        reason = f"held-out loss at {first} is {now:.4f}, more than 5% above {least:.4f}"
        print(f"step {step}: stays at {here} tokens, not on to {there}: {reason}", flush=True)
        return stage
    print(f"step {step}: on to {there} tokens; held-out loss at {first} is {now:.4f}", flush=True)
    state.gate = min(now, least)
    return stage + 1


def final_metrics(config: TrainConfig, corpus: Corpus, model: Any, out: Path, autocast: Autocast) -> dict[str, Any]:
    """Losses, and passkey accuracy of 100 prompts that end, with the longest of their answers, at the training
    length."""
    with (out / "log.csv").open() as file:
        losses_seen = [float(line.split(",")[2]) for line in list(file)[1:]]
    finite = [loss for loss in losses_seen if math.isfinite(loss)]
    metrics: dict[str, Any] = {"train_loss": finite[-1] if finite else None}
    metrics |= {"validation_loss": None, "passkey_accuracy": None}
    loss = held_out_loss(model, corpus, config.longest, config.batch_size, autocast)
    if not math.isnan(loss):
        metrics["validation_loss"] = loss
    if config.data.passkey.fraction:
        length, style = config.data.passkey.lengths[1], config.data.passkey.style
        answer, longest = 0, 1
        while answer < longest:  # prompts of another length have other answers
            answer = longest
            prompts = passkey_batch(corpus.tokenizer, length - answer, 100, config.seed, style)
            longest = max(len(p.reply) for p in prompts)
        seen = (model, corpus.tokenizer, length - answer, 100, config.seed, style, config.batch_size, autocast)
        metrics["passkey_accuracy"] = passkey_accuracy(*seen)
    return metrics
