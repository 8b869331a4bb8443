"""What a model can do while it is trained: loss on the held-out text and recall at several lengths, kept in eval.csv,
and whether the next stage of a schedule of lengths may begin. Losses are in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from rnn_longctx.config import counted
from rnn_longctx.data import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.loggers import Write
from rnn_longctx.measure.answers import would_say
from rnn_longctx.measure.stream import stream_losses, stream_targets
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.progress import Say, silent
from rnn_longctx.tasks import Example, Task
from rnn_longctx.train.autocast import Autocast
from rnn_longctx.train.config import TrainConfig
from rnn_longctx.train.corpus import Corpus
from rnn_longctx.train.mix import measured_task
from rnn_longctx.train.snapshots import Log
from rnn_longctx.train.state import RunState

# passkey_accuracy: of whatever task the run is measured by
COLUMNS = ["step", "tokens", "length", "loss", "passkey_accuracy"]
SEGMENT = 4096  # tokens read at once
TOKENS = 2**18  # of held-out text read at one length, at most
WORSE = 1.05  # a stage is entered while the loss at the first length is within this factor of the best before it
ASK_EVERY = 20  # steps between two looks at a stage that may not begin yet


@torch.inference_mode()
@in_evaluation
def held_out_loss(
    model: LanguageModel, corpus: Corpus, length: int, rows: int, autocast: Autocast, since: int = 0, most: int = 1024
) -> float:
    """Return the mean loss at positions `since` + 1 to `length` of at most `most` held-out windows, `rows` at a time;
    NaN where the held-out text is shorter than one."""
    total, count = 0.0, 0
    for ids in corpus.validation(length, rows, most):
        with autocast():
            for _, losses in stream_losses(model, ids, segment=SEGMENT, since=since):
                total, count = total + float(losses.double().sum()), count + losses.numel()
    return total / count if count else math.nan


def late_loss(model: LanguageModel, corpus: Corpus, length: int, rows: int, autocast: Autocast) -> float:
    """Return the mean loss over the second half of the length, (length / 2, length]: of tokens that have a context to
    use."""
    return held_out_loss(model, corpus, length, rows, autocast, length // 2, max(1, TOKENS // length))


def examples_of(task: Task, tokenizer: Tokenizer, length: int, n: int, seed: int) -> list[Example]:
    """Return `n` examples of a task. Raises InputError when the length is too short for one."""
    return [task.example(length, i, n, task.generator(seed, length, i), tokenizer) for i in range(n)]


@torch.inference_mode()
@in_evaluation
def recall(
    model: LanguageModel, task: Task, examples: Sequence[Example], tokenizer: Tokenizer, rows: int, autocast: Autocast
) -> float:
    """Return the mean score of a model's likeliest answers to examples of one length, `rows` at a time. One pass over
    prompt and answer decides it, since greedy decoding gives an answer exactly if each of its tokens is the likeliest
    one after the true ones before it."""
    total = 0.0
    for i in range(0, len(examples), rows):
        some = examples[i : i + rows]
        with autocast():
            if task.generated:
                prompts = torch.stack([torch.from_numpy(e.prompt) for e in some])
                replies = [e.ids[e.answers] for e in some]
                total += float(would_say(model, prompts, replies, tokenizer, SEGMENT).sum())
            else:
                total += sum(_scores(model, task, some, tokenizer))
    return total / len(examples)


def _scores(model: LanguageModel, task: Task, examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[float]:
    """Yield the score of each example whose answers stand anywhere in it."""
    ids = torch.stack([torch.from_numpy(e.ids) for e in examples]).to(model.device)
    answers = torch.stack([torch.from_numpy(e.answers) for e in examples]).to(model.device)
    likeliest = torch.zeros_like(ids)  # the likeliest token in the place of every answer
    for position, hidden, targets in stream_targets(model, ids, segment=SEGMENT):
        places = slice(position + 1, position + 1 + targets.shape[1])
        here = answers[:, places]
        likeliest[:, places][here] = model.logits(hidden[here]).argmax(-1)
    for tokens, example in zip(likeliest.cpu().numpy(), examples, strict=True):
        yield task.right(tokens[example.answers], example, tokenizer)


class Evaluation:
    """eval.csv of a run: one row a length, for every step evaluated; and what else `writers` write to.

    Raises InputError for a length that the held-out text or an example of the task does not fit in.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        model: LanguageModel,
        out: Path,
        autocast: Autocast,
        writers: Sequence[Write] = (),
        say: Say = silent,
    ):
        assert config.evaluate is not None
        self.writers, self.say = writers, say
        self.config, self.corpus, self.model, self.autocast = config, corpus, model, autocast
        self.settings, self.task = config.evaluate, measured_task(config.data.mixed)
        for length in self.settings.lengths:
            if len(corpus.held_out) < length + 1:
                fits = f"the held-out text has {counted(len(corpus.held_out), 'token')}"
                raise InputError(f"evaluate.lengths: {length} is too long: {fits}; see data.held_out")
            if self.settings.passkeys:
                try:
                    self.task.check(length, self.settings.passkeys, config.seed, corpus.tokenizer)
                except InputError as error:
                    raise InputError(f"evaluate.lengths: {error}; or set evaluate.passkeys=0") from None
        self.file = out / "eval.csv"

    def due(self, step: int) -> bool:
        return step % self.settings.every == 0 or step == self.config.steps

    def __call__(self, step: int, tokens: int) -> list[float]:
        """Evaluate and write it down. Return what models are compared by, larger is better: mean recall, then mean
        loss, turned round."""
        losses, scores = [], []
        with closing(Log(self.file, step - 1, COLUMNS)) as log:  # what a killed process wrote from here on goes
            for length, loss, score in self.measure():
                losses.append(loss)
                scores.append(score)
                log.write({"step": step, "tokens": tokens, "length": length, "loss": loss, "passkey_accuracy": score})
                for write in self.writers:
                    write({f"eval/loss_{length}": loss, f"eval/passkey_accuracy_{length}": score}, step)
                self.say(f"step {step} at {length} tokens: loss {loss:.4f} {self.task.name} accuracy {score:.2f}")
        loss, n = sum(losses) / len(losses), len(scores)
        return [sum(scores) / n if self.settings.passkeys else 0.0, -loss if math.isfinite(loss) else -math.inf]

    def measure(self) -> Iterator[tuple[int, float, float]]:
        """Yield of each length in turn: tokens, late loss, and the share of its examples answered, NaN without any."""
        tokenizer, rows, n = self.corpus.tokenizer, self.config.fewest_rows, self.settings.passkeys
        for length in self.settings.lengths:
            loss, score = late_loss(self.model, self.corpus, length, rows, self.autocast), math.nan
            if n:
                examples = examples_of(self.task, tokenizer, length, n, self.config.seed)
                score = recall(self.model, self.task, examples, tokenizer, rows, self.autocast)
            yield length, loss, score


def stage_of(config: TrainConfig, state: RunState, loss: Callable[[], float], say: Say = silent) -> int:
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
    wait = step - sum(some.steps for some in config.stages[: stage + 1])
    if wait < 0 or wait % ASK_EVERY:
        return stage
    assert state.gate is not None
    now, least = loss(), state.gate
    first, here, there = (config.stages[i].length for i in (0, stage, stage + 1))
    if not now <= WORSE * least:
        reason = f"held-out loss at {first} is {now:.4f}, more than 5% above {least:.4f}"
        say(f"step {step}: stays at {here} tokens, not on to {there}: {reason}")
        return stage
    say(f"step {step}: on to {there} tokens; held-out loss at {first} is {now:.4f}")
    state.gate = min(now, least)
    return stage + 1


def final_metrics(
    config: TrainConfig, corpus: Corpus, model: LanguageModel, out: Path, autocast: Autocast
) -> dict[str, Any]:
    """Return losses, and the score of 100 examples of the first task that is mixed in: prompts end, with the longest of
    their answers, at the longest length trained on."""
    with (out / "log.csv").open() as file:
        losses_seen = [float(line.split(",")[2]) for line in list(file)[1:]]
    finite = [loss for loss in losses_seen if math.isfinite(loss)]
    metrics: dict[str, Any] = {"train_loss": finite[-1] if finite else None}
    metrics |= {"validation_loss": None, "passkey_accuracy": None}
    loss = held_out_loss(model, corpus, config.longest, config.fewest_rows, autocast)
    if not math.isnan(loss):
        metrics["validation_loss"] = loss
    if config.data.mixed and config.data.mixed[0].fraction:
        task = measured_task(config.data.mixed)
        examples = longest_examples(task, corpus.tokenizer, config.data.mixed[0].lengths[1], config.seed)
        scored = recall(model, task, examples, corpus.tokenizer, config.fewest_rows, autocast)
        metrics["passkey_accuracy"] = scored
    return metrics


def longest_examples(task: Task, tokenizer: Tokenizer, length: int, seed: int) -> list[Example]:
    """Return 100 examples of which, with its answer, none has more than `length` tokens, and one has as many."""
    if not task.generated:
        return examples_of(task, tokenizer, length, 100, seed)
    answer, longest, examples = 0, 1, []
    while answer < longest:  # prompts of another length have other answers
        answer = longest
        examples = examples_of(task, tokenizer, length - answer, 100, seed)
        longest = max(int(e.answers.sum()) for e in examples)
    return examples
