"""The training loop: next-token cross entropy on random windows or on streams that pass their states on, answers
weighted up, exact resume, over one process or several (`rnn_longctx.train.team`).

Weights and optimizer state are float32; on CUDA the forward pass runs in bf16 autocast.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.loggers import Write, scalars
from rnn_longctx.models.cache import Cache
from rnn_longctx.progress import Say, to_stdout
from rnn_longctx.train.bptt import MicroBatch, accumulate
from rnn_longctx.train.carries import rows_of
from rnn_longctx.train.config import TrainConfig
from rnn_longctx.train.console import progress
from rnn_longctx.train.corpus import Batch
from rnn_longctx.train.evaluation import Evaluation, final_metrics, late_loss, stage_of
from rnn_longctx.train.export import export, keep_best
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.mix import measured_task, task_of
from rnn_longctx.train.optimizer import learning_rate, make_optimizer
from rnn_longctx.train.prepare import Run, prepare
from rnn_longctx.train.snapshots import Log, newest_snapshot, save_snapshot
from rnn_longctx.train.starts import Starts, state_norms
from rnn_longctx.train.state import RunState
from rnn_longctx.train.team import Team

NOT_MEASURED: dict[str, Any] = {"state_norm": math.nan, "state_norm_max": math.nan}  # in the log of an older version
BAD_STEPS = 20
SPIKE = 2.0  # an update is skipped where its loss is over this times the median of the last
RECENT = 64  # updates of this stage (half as many are enough)


class TrainingDiverged(RuntimeError):
    """20 steps in a row were skipped: see `fault`."""


def train(config: TrainConfig, say: Say = to_stdout) -> Path:
    """Train, or go on where a killed run of the same config stopped, and return the finished model's directory.

    `config.out` gets log.csv (losses in nats per token), snapshots/ and model/, and steps/STEP/ where models are to be
    kept on the way. With `config.evaluate` also eval.csv, last/, always the newest model, and best/, the one that
    answered most examples (of equals the one of lowest loss). Where `accelerate launch` or `torchrun` began several
    processes they train as one (`rnn_longctx.train.team`); rank 0 writes and speaks, and all must see `out`.

    Raises:
        InputError: bad settings, a folder of another run, no text, no checkpoint to start from, no room to write.
        TrainingDiverged: see there.
    """
    if config.online is not None:
        raise InputError("online: is of text that arrives in a directory; name it with --stream, or set online=null")
    team = Team(config)
    with ExitStack() as stack:
        run = prepare(config, team, stack, say)
        writers: list[Write] = []
        team.first(lambda: writers.append(stack.enter_context(scalars(config.log_to, run.out, run.out.name))))
        Loop(run, writers).finish(stack)
        _save_finished(run)
    team.close()
    return run.out / "model"


def _save_finished(run: Run) -> None:
    """Measure the finished model and write it. Collective."""
    whole = run.team.whole(run.model)

    def save() -> None:
        run.say("measuring and saving the finished model")
        metrics = final_metrics(run.config, run.corpus, whole.eval(), run.out, run.autocast)
        export(run.config, run.corpus, whole, run.out / "model", metrics)
        task = measured_task(run.config.data.mixed).name
        shown = {k.replace("passkey", task): v for k, v in metrics.items() if v is not None}
        run.say(" ".join(f"{k} {v:.4g}" for k, v in shown.items()))

    run.team.first(save)


@dataclass
class Update:
    """One step, made or skipped.

    Attributes:
        step: its number, from 1.
        config: that of its stage.
        losses: mean loss of all tokens, mean loss of the answer tokens (NaN without any), norm of the gradient.
        final: the cache that this rank's streams ended with.
        fault: why it was skipped, or None.
    """

    step: int
    config: TrainConfig
    lr: float
    losses: list[float]
    final: Cache
    fault: str | None


class Loop:
    """A run from its newest snapshot on; its methods are called by every rank."""

    def __init__(self, run: Run, writers: list[Write]):
        c, team = run.config, run.team
        self.run, self.writers = run, writers
        self.learner = team.spread(Learner(run.model, recorded=team.sequence == 1 and not team.sharded))
        self.optimizer = make_optimizer(run.model, c.optimizer)
        self.starts = None
        if c.passing is not None:
            self.starts = Starts(run.model, c.passing, c.seed, total=team.sum_of_lanes)
        self.state = _resume(run, self.optimizer, self.starts)
        self.evaluation = None
        if c.evaluate is not None:
            self.evaluation = Evaluation(c, run.corpus, run.model, run.out, run.autocast, writers, run.say)

    def finish(self, stack: ExitStack) -> None:
        """Make the steps that are left."""
        state, config, team = self.state, self.run.config, self.run.team
        if self.evaluation is not None and state.step == 0:
            self.evaluate()
        self.run.model.train()
        self.began = time.monotonic() - state.seconds
        self.shown_tokens, self.shown_seconds = state.tokens, state.seconds  # at the last row of the log
        if team.rank == 0:
            log = Log(self.run.out / "log.csv", state.step, length=config.longest, **NOT_MEASURED)
            self.log = stack.enter_context(closing(log))
            answers = "+".join(dict.fromkeys(task_of(mixed).name for mixed in config.data.mixed)) or "answer"
            shown = progress(config.steps, state.step, self.run.say, answers)
            self.show_row, self.show_step = stack.enter_context(shown)
        while state.step < config.steps:
            update = self.step()
            self.record(update)
            if state.bad == BAD_STEPS:
                skipped = f"{BAD_STEPS} steps in a row were skipped, at {state.step}: {update.fault}"
                raise TrainingDiverged(f"{skipped}; see {self.run.out / 'log.csv'}")
            self.keep()

    def step(self) -> Update:
        """Make the next update, or skip it where it has a fault."""
        state, run, i = self.state, self.run, self.state.step
        lr = run.config.optimizer.lr * learning_rate(run.config.schedule, i, run.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.enter_stage()
        config = run.config.at(state.stage)
        self.optimizer.zero_grad(set_to_none=True)
        batch, losses, final = backward(run, config, self.learner, self.starts, i)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.optimizer.clip)
        losses[1] = torch.where(batch.answer.any(), losses[1], math.nan)  # none in this batch: no value to log
        values = run.team.agreed(losses, norm)
        state.step = i + 1
        state.tokens += batch.answer.numel()
        skipped = fault(values[0], values[2], state.recent)
        if skipped is None:
            self.optimizer.step()
            state.bad = 0
            state.window.append(values)
            state.recent = [*state.recent, values[0]][-RECENT:]
        else:
            state.bad += 1
        if self.starts is not None:
            self.starts.end(i, final) if skipped is None else self.starts.forget()
        return Update(state.step, config, lr, values, final, skipped)

    def enter_stage(self) -> None:
        """Go on to the next stage where that is due and may begin."""
        stage = stage_of(self.run.config, self.state, self.short_loss, self.run.say)
        if stage != self.state.stage:
            self.state.stage, self.state.recent = stage, []  # a longer stream's loss is another
            if self.starts is not None:
                self.starts.forget()
                self.starts.rows = self.run.team.rows(self.run.config.at(stage))

    def short_loss(self) -> float:
        """Return the held-out loss at the first stage's length, which a stage is gated on."""
        c, corpus = self.run.config, self.run.corpus
        whole = self.run.team.whole(self.run.model)
        return self.run.team.first(
            lambda: late_loss(whole, corpus, c.stages[0].length, c.fewest_rows, self.run.autocast)
        )

    def record(self, update: Update) -> None:
        """Write a row of the log where one is due: the means over the updates since the last, or a skipped step."""
        state, config, team = self.state, self.run.config, self.run.team
        if not (update.fault or update.step % config.log_every == 0 or update.step == config.steps):
            if team.rank == 0:
                self.show_step(update.step, update.losses[0])
            return
        state.seconds = time.monotonic() - self.began
        loss, answer_loss, norm = (_mean([update.losses] if update.fault else state.window, i) for i in range(3))
        norms = team.sum(state_norms(self.run.model, update.final)) / team.world  # lanes have as many rows each
        row: dict[str, Any] = {
            "step": update.step,
            "tokens": state.tokens,
            "lr": update.lr,
            "seconds": state.seconds,
            "loss": loss,
            "passkey_loss": answer_loss,
            "grad_norm": norm,
            "tokens_per_second": (state.tokens - self.shown_tokens) / max(1e-9, state.seconds - self.shown_seconds),
            "length": update.config.train_length,
            "state_norm": float(norms.mean()),
            "state_norm_max": float(norms.max()),
        }

        def write() -> None:
            self.log.write(row)
            self.show_row(row | {"skipped": update.fault})
            for writer in self.writers:
                writer({f"train/{k}": float(v) for k, v in row.items() if k != "step"}, row["step"])

        team.first(write)
        self.shown_tokens, self.shown_seconds = state.tokens, state.seconds
        if not update.fault:
            state.window = []

    def keep(self) -> None:
        """Evaluate, save and export where the last step is one of those to do it at."""
        config, step = self.run.config, self.state.step
        snapshot = step % config.checkpoint_every == 0 or step == config.steps
        paused = time.monotonic()
        if self.evaluation is not None and self.evaluation.due(step):
            self.evaluate()
        elif self.evaluation is not None and snapshot:
            self.export(self.run.out / "last", envelope=False)
        self.shown_seconds += time.monotonic() - paused  # the speed logged is that of training
        if snapshot:
            self.save()
        if config.export_every and step % config.export_every == 0:
            self.export(self.run.out / "steps" / str(step))

    def evaluate(self) -> None:
        assert self.evaluation is not None
        evaluation, run, state = self.evaluation, self.run, self.state
        evaluation.model = whole = run.team.whole(run.model)

        def measure() -> None:
            score = evaluation(state.step, state.tokens)
            keep_best(run.config, run.corpus, whole, run.out, score, state)

        run.team.first(measure)

    def export(self, where: Path, envelope: bool = True) -> None:
        run, metrics = self.run, {"step": self.state.step}
        whole = run.team.whole(run.model)
        run.team.first(partial(export, run.config, run.corpus, whole, where, metrics, envelope))

    def save(self) -> None:
        """Write a snapshot."""
        state, run, team = self.state, self.run, self.run.team
        state.seconds = time.monotonic() - self.began
        parts = {"model": team.gathered(run.model.state_dict()), "texts": run.text_hashes}
        parts["optimizer"] = team.gathered(self.optimizer.state_dict())
        if self.starts is not None:
            parts["starts"] = self.starts.state_dict(team.all_rows)
        parts["state"] = state.to_dict()
        team.first(lambda: save_snapshot(run.out / "snapshots", state.step, parts))


def fault(loss: float, norm: float, recent: list[float]) -> str | None:
    """Return why an update is not made, or None: its loss or the norm of its gradient is not finite, or its loss is
    more than SPIKE times the median of the updates before it, of which there must be RECENT / 2 in this stage."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "not finite"
    if len(recent) >= RECENT // 2 and loss > SPIKE * median(recent):
        return f"loss {loss:.3f} is over {SPIKE:g} times the median {median(recent):.3f}"
    return None


def _resume(run: Run, optimizer: torch.optim.Optimizer, starts: Starts | None) -> RunState:
    """Return what the newest snapshot says of the run; weights and the rest are put where they go."""
    snapshot = newest_snapshot(run.out / "snapshots", say=run.say)
    step = -1 if snapshot is None else snapshot["state"]["step"]
    if run.team.first(lambda: step) != step:
        raise InputError(f"out: rank {run.team.rank} does not see the snapshots in {run.out} that rank 0 does")
    if starts is not None:
        starts.rows = run.team.rows(run.config.at(0))
    if snapshot is None:
        return RunState()
    if snapshot["texts"] != run.text_hashes:
        raise InputError(f"{run.out}: the training text is not the one this run began with; set another out")
    run.team.load(run.model, optimizer, snapshot)
    # a snapshot of before there were stages does not say the tokens
    state = RunState.from_dict({"tokens": step * run.config.batch_size * run.config.longest} | snapshot["state"])
    if starts is not None:
        starts.rows = run.team.rows(run.config.at(state.stage))
        starts.load_state_dict(snapshot["starts"])
    run.say(f"resumed from step {step}")
    return state


def backward(
    run: Run, config: TrainConfig, learner: nn.Module, starts: Starts | None, step: int
) -> tuple[Batch, Tensor, Cache]:
    """Return the batch of a step, its two losses, and what this rank's streams end with; the gradients of all ranks are
    left in the parameters. config: that of the stage."""
    team = run.team
    batch = run.corpus.batch(config, step)
    rows = batch.rows(team.rows(config))
    begun = None if starts is None else starts.begin(step, rows)
    tokens, answers, each = batch.answer.numel(), batch.answer.sum(), len(rows.ids) // config.accumulate
    losses, ends = torch.zeros(2, device=batch.ids.device), []
    with team.reading(run.model):
        for first in range(0, len(rows.ids), each):
            chosen, last = slice(first, first + each), first + each == len(rows.ids)
            start = None if begun is None else rows_of(begun, chosen)
            around = partial(team.step, learner, last)
            some = MicroBatch(rows.rows(chosen), tokens, answers, team.world, team.stretch, around)
            weight = config.data.weight_of_answers
            loss, answer_loss, end = accumulate(learner, some, config.passing, start, weight, run.autocast)
            losses = losses + torch.stack([loss, answer_loss])
            ends.append(end)
    end = ends[0] if len(ends) == 1 else Cache.concat(ends, list(range(len(rows.ids))))
    return batch, team.sum(losses), end


def _mean(rows: list[list[float]], column: int) -> float:
    """Return the mean over the rows that have a value (no answer in a batch gives NaN there)."""
    values = [row[column] for row in rows]
    finite = [v for v in values if not math.isnan(v)] or values
    return sum(finite) / len(finite) if finite else math.nan
