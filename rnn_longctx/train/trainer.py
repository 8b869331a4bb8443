"""The training loop: next-token cross entropy on random windows or on streams that pass their states on, passkey
answers weighted up, exact resume, over one process or several (`rnn_longctx.train.team`).

Weights and optimizer state are float32; on CUDA the forward pass runs in bf16 autocast.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack, closing, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from rnn_longctx.config import home_path, to_dict
from rnn_longctx.data import ByteTokenizer, Tokenizer, load_tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.loggers import Write, library, scalars
from rnn_longctx.mitigations import fold
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.tasks.passkey import training_sequence
from rnn_longctx.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from rnn_longctx.train.corpus import Batch, Corpus, load_corpus
from rnn_longctx.train.evaluation import Context, Evaluation, final_metrics, late_loss, stage_of
from rnn_longctx.train.export import export, keep_best
from rnn_longctx.train.passing import Learner, Part, Starts, States, accumulate, state_norms
from rnn_longctx.train.progress import progress
from rnn_longctx.train.snapshots import Log, claim_folder, held, newest_snapshot, save_snapshot
from rnn_longctx.train.team import Team

# Settings that change where and how often things are written and how the work is cut, not what is trained.
_NEUTRAL = ("out", "device", "log_every", "checkpoint_every", "export_every", "save_dtype", "save_layout",
            "licences", "log_to", "accumulate", "sequence_parallel", "fsdp")  # fmt: skip
NOT_MEASURED: dict[str, Any] = {"state_norm": math.nan, "state_norm_max": math.nan}  # in the log of an older version
BAD_STEPS = 20
SPIKE = 2.0  # an update is skipped where its loss is over this times the median of the last
RECENT = 64  # updates of this stage (half as many are enough)


class TrainingDiverged(RuntimeError):
    """20 steps in a row were skipped: see `fault`."""


def train(config: TrainConfig) -> Path:
    """Train, or go on where a killed run of the same config stopped; returns the finished model's directory.

    `config.out` gets log.csv (losses in nats per token), snapshots/ and model/, and steps/STEP/ where models are to be
    kept on the way. With `config.evaluate` also eval.csv, last/, always the newest model, and best/, the one that
    answered most passkeys (of equals the one of least loss). Where `accelerate launch` or `torchrun` began several
    processes they train as one (`rnn_longctx.train.team`); rank 0 writes, and all must see `out`. Raises InputError
    (bad settings, a folder of another run, no text, no checkpoint to start from, no room to write) and
    TrainingDiverged.
    """
    if config.online is not None:
        raise InputError("online: is of text that arrives in a directory; name it with --stream, or set online=null")
    team = Team(config)
    with ExitStack() as stack:
        if team.rank:  # rank 0 says it
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        made = _train(config, team, stack)
    team.close()
    return made


def _train(config: TrainConfig, team: Team, stack: ExitStack) -> Path:
    config, corpus, model = prepare(config, team, stack)
    out = home_path(config.out)
    learner = team.spread(Learner(model, recorded=team.sequence == 1 and not team.sharded))
    optimizer = make_optimizer(model, config.optimizer)
    writers: list[Write] = []
    team.first(lambda: writers.append(stack.enter_context(scalars(config.log_to, out, out.name))))
    _fit(config, corpus, model, learner, optimizer, out, team, writers)
    plain = team.whole(model)

    def finish() -> None:
        print("measuring and saving the finished model", flush=True)
        metrics = final_metrics(config, corpus, plain.eval(), out, partial(autocast, config, team.device))
        export(config, corpus, plain, out / "model", metrics)
        print(" ".join(f"{k} {v:.4g}" for k, v in metrics.items() if v is not None), flush=True)

    team.first(finish)
    return out / "model"


def prepare(config: TrainConfig, team: Team, stack: ExitStack, online: bool = False) -> tuple[TrainConfig, Corpus, Any]:
    """The folder claimed until the stack ends, the text read, and the model to train, on the team's device; the config
    with that model's shape. Raises InputError, as `train` does."""
    out, device = home_path(config.out), team.device
    if device.type == "cuda":  # graphs and streams are made on the current card, and PyTorch keeps the first one's
        stack.enter_context(torch.cuda.device(device))
        torch.cuda.graph.default_capture_stream = None
    for kind in config.log_to if team.rank == 0 else []:  # before a text is read for hours
        library(kind)
    tokenizer = load_tokenizer(config.data.tokenizer)
    started = None if config.init is None else _started_from(config.init, tokenizer, device)
    if started is not None:
        label = f"{started.name}@{started.weights_hash}"  # no path: this is recorded with the finished model
        config = replace(config, model=started.config, init=label)
    assert config.model is not None
    if config.model.vocab_size < tokenizer.vocab_size:
        sizes = f"{config.model.vocab_size}, tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens"
        raise InputError(f"model.vocab_size: {sizes}")
    try:
        checkpoint.check_layout(config.model, config.save_layout)
    except InputError as error:
        raise InputError(f"save_layout: {error}") from None
    _check_stretches(config)
    _check_prompts(config, tokenizer)
    if started is not None and config.mitigation is not None:
        _fold(started, config.mitigation)
    claim = {k: v for k, v in to_dict(config).items() if k not in _NEUTRAL}
    claim["online"] = {k: v for k, v in claim["online"].items() if k != "poll"} if online else None

    def hold() -> None:
        claim_folder(out, claim)
        stack.enter_context(held(out))

    team.first(hold)
    print("reading the text", flush=True)
    began = time.monotonic()
    corpus = load_corpus(config.data, tokenizer, config.longest)
    names = ", ".join(f"{t['name']} ({t['hash']})" for t in corpus.texts)
    sizes = f"{len(corpus):,} tokens and {len(corpus.held_out):,} held out"
    print(f"text: {names}: {sizes}, in {time.monotonic() - began:.0f} s", flush=True)
    if team.first(lambda: names) != names:  # of another machine: each rank takes its rows of what it reads itself
        raise InputError(f"data.text: rank {team.rank} reads {names}, and that is not what rank 0 reads")
    if len(config.stages) > 1 and len(corpus.held_out) <= config.stages[0][0]:
        few = f"{len(corpus.held_out)} tokens are too few; see data.held_out"
        raise InputError(f"train_length: a schedule is gated on held-out text, and {few}")
    corpus = corpus.to(device)

    torch.manual_seed(config.seed)
    model: Any = Mamba2LM(config.model).to(device) if started is None else started
    model.train_length, model.name, model.tokenizer = config.longest, out.name, tokenizer
    return config, corpus, model


def _check_stretches(config: TrainConfig) -> None:
    """InputError where a segment leaves a rank of a lane too few tokens for its convolution's edge."""
    assert config.model is not None
    for length, _ in config.stages:
        segment = length if config.passing is None else config.passing.segment
        least, needed = min(segment, length % segment or segment), max(1, config.model.d_conv - 1)
        if config.sequence_parallel > 1 and least // config.sequence_parallel < needed:
            cut = f"a segment of {least} tokens over {config.sequence_parallel} ranks"
            raise InputError(f"sequence_parallel: {cut} leaves fewer than {needed} tokens a rank")


def _check_prompts(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """InputError where the shortest passkey prompt does not fit, which a run would meet at some step or other."""
    passkey = config.data.passkey
    for seed in range(200 if passkey.fraction else 0):  # keys differ in tokens
        try:
            training_sequence(tokenizer, passkey.lengths[0], np.random.default_rng(seed), passkey.style)
        except InputError as error:
            least = f"{passkey.lengths[0]} is too short for prompt and answer"
            raise InputError(f"data.passkey.lengths: {least} ({error} beside the answer)") from None


def _started_from(init: str, tokenizer: Any, device: torch.device) -> Mamba2LM:
    """The checkpoint in float32, with where it comes from as its provenance."""
    try:
        model = checkpoint.load(init, device=device)
    except InputError as error:
        raise InputError(f"init: {error}") from None
    own = getattr(model.tokenizer, "spec", "bytes")  # None: it does not say
    if own is not None and isinstance(model.tokenizer, ByteTokenizer) != isinstance(tokenizer, ByteTokenizer):
        wrong = f"{tokenizer.name}, but that is not what {init} was trained with"
        raise InputError(f"data.tokenizer: {wrong}; set data.tokenizer={own}")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a float32 file is mapped: what becomes of it must not matter
    model.tokenizer = tokenizer
    origin = {"name": model.name, "weights": model.weights_hash, "provenance": model.provenance}
    model.provenance = {"init": origin}
    return model


def _fold(model: Mamba2LM, mitigation: str) -> None:
    """Into the checkpoint, whose training length is still its own. A run that goes on takes its weights, folded once,
    from the snapshot."""
    try:
        fold(model, mitigation)
    except InputError as error:
        raise InputError(f"mitigation: {error}") from None


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate of update `step` (from 0) of `steps`, as a share of the peak."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "cosine":
        progress = (step - schedule.warmup) / max(1, steps - schedule.warmup)
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        falling = min(1.0, (steps - step) / max(1.0, schedule.decay * steps))
    return schedule.min_lr + (1 - schedule.min_lr) * falling


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; vectors and parameters flagged `_no_weight_decay` have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1 and not getattr(p, "_no_weight_decay", False)]
    chosen = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in chosen], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=parameters[0].is_cuda)


def _fit(
    config: TrainConfig,
    corpus: Corpus,
    model: Any,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    out: Path,
    team: Team,
    writers: list[Write],
) -> None:
    """Run the steps that are left, from the newest snapshot."""
    starts = None
    if config.passing is not None:
        starts = Starts(model, config.passing, config.seed, team.rows, team.sum_of_lanes)
    context = partial(autocast, config, team.device)
    texts = [t["hash"] for t in corpus.texts]
    state = _resume(config, texts, model, optimizer, starts, out, team)
    evaluation = None
    if config.evaluate is not None:
        evaluation = Evaluation(config, corpus, model, out, context, writers)

    def evaluate(step: int) -> None:
        assert evaluation is not None
        evaluation.model = plain = team.whole(model)

        def run() -> None:
            score = evaluation(step, state["tokens"])
            keep_best(config, corpus, plain, out, score, state)

        team.first(run)

    def short_loss() -> float:
        plain = team.whole(model)
        return team.first(lambda: late_loss(plain, corpus, config.stages[0][0], config.batch_size, context))

    if evaluation is not None and state["step"] == 0:
        evaluate(0)
    model.train()
    began = time.monotonic() - state["seconds"]
    logged_tokens, logged_seconds = state["tokens"], state["seconds"]
    log_file = out / "log.csv"
    with ExitStack() as stack:
        show: Any = None
        passed: Any = None
        if team.rank == 0:
            log = stack.enter_context(closing(Log(log_file, state["step"], length=config.longest, **NOT_MEASURED)))
            show, passed = stack.enter_context(progress(config.steps, state["step"]))
        for i in range(state["step"], config.steps):
            lr = config.optimizer.lr * learning_rate(config.schedule, i, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            stage = stage_of(config, i, state, short_loss)
            if stage != state["stage"]:
                state["recent"] = []  # a longer stream's loss is another
                if starts is not None:
                    starts.forget()
            state["stage"], at = stage, config.at(stage)
            optimizer.zero_grad(set_to_none=True)
            batch, losses, final = backward(at, corpus, model, learner, starts, i, context, team)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            losses[1] = torch.where(batch.answer.any(), losses[1], math.nan)  # none in this batch: no value to log
            values = team.agreed(losses, norm)
            step = state["step"] = i + 1
            state["tokens"] += batch.answer.numel()
            bad = fault(values[0], values[2], state["recent"])
            state["bad"] = state["bad"] + 1 if bad else 0
            if not bad:
                optimizer.step()
                state["window"].append(values)
                state["recent"] = [*state["recent"], values[0]][-RECENT:]
            if starts is not None:
                starts.forget() if bad else starts.end(i, final)
            if bad or step % config.log_every == 0 or step == config.steps:
                state["seconds"] = time.monotonic() - began
                rows = [values] if bad else state["window"]
                row = {"step": step, "tokens": state["tokens"], "lr": lr, "seconds": state["seconds"]}
                row |= {"loss": _mean(rows, 0), "passkey_loss": _mean(rows, 1), "grad_norm": _mean(rows, 2)}
                elapsed = max(1e-9, state["seconds"] - logged_seconds)
                row |= {"tokens_per_second": (state["tokens"] - logged_tokens) / elapsed, "length": at.train_length}
                norms = team.sum(state_norms(final)) / team.world  # lanes have as many rows each
                row |= {"state_norm": float(norms.mean()), "state_norm_max": float(norms.max())}

                def tell(row: dict[str, Any] = row, bad: str | None = bad) -> None:
                    log.write(row)
                    show(row | {"skipped": bad})
                    for write in writers:
                        write({f"train/{k}": float(v) for k, v in row.items() if k != "step"}, row["step"])

                team.first(tell)
                logged_tokens, logged_seconds = state["tokens"], state["seconds"]
                if not bad:
                    state["window"] = []
            elif passed is not None:
                passed(step, values[0])
            if state["bad"] == BAD_STEPS:
                raise TrainingDiverged(f"{BAD_STEPS} steps in a row were skipped, at {step}: {bad}; see {log_file}")
            paused = time.monotonic()
            keep = step % config.checkpoint_every == 0 or step == config.steps
            if evaluation is not None and evaluation.due(step):
                evaluate(step)
            elif evaluation is not None and keep:
                plain = team.whole(model)
                team.first(partial(export, config, corpus, plain, out / "last", {"step": step}, envelope=False))
            logged_seconds += time.monotonic() - paused  # the speed logged is that of training
            if keep:
                state["seconds"] = time.monotonic() - began
                parts = {"model": team.gathered(model.state_dict()), "texts": texts}
                parts["optimizer"] = team.gathered(optimizer.state_dict())
                if starts is not None:
                    parts["starts"] = starts.state_dict(team.all_rows)
                team.first(partial(save_snapshot, out / "snapshots", step, {**parts, "state": state}))
            if config.export_every and step % config.export_every == 0:
                plain = team.whole(model)
                team.first(partial(export, config, corpus, plain, out / "steps" / str(step), {"step": step}))


def fault(loss: float, norm: float, recent: list[float]) -> str | None:
    """Why an update is not made, or None: its loss or the norm of its gradient is not finite, or its loss is more than
    SPIKE times the median of the updates before it, of which there must be RECENT / 2 in this stage."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "not finite"
    if len(recent) >= RECENT // 2 and loss > SPIKE * median(recent):
        return f"loss {loss:.3f} is over {SPIKE:g} times the median {median(recent):.3f}"
    return None


def _resume(config: TrainConfig, texts: list, model: Any, optimizer: torch.optim.Optimizer, starts: Starts | None,
            out: Path, team: Team) -> dict[str, Any]:  # fmt: skip
    """What the loop keeps between steps, as the newest snapshot has it; weights and the rest are put where they go."""
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "bad": 0, "window": [], "recent": [], "tokens": 0, "stage": 0}
    snapshot = newest_snapshot(out / "snapshots")
    found = -1 if snapshot is None else snapshot["state"]["step"]
    if team.first(lambda: found) != found:
        raise InputError(f"out: rank {team.rank} does not see the snapshots in {out} that rank 0 does")
    if snapshot is None:
        return state
    if snapshot["texts"] != texts:
        raise InputError(f"{out}: the training text is not the one this run began with; set another out")
    team.load(model, optimizer, snapshot)
    if starts is not None:
        starts.load_state_dict(snapshot["starts"])
    # a snapshot of before there were stages does not say the tokens
    state["tokens"] = snapshot["state"]["step"] * config.batch_size * config.longest
    print(f"resumed from step {snapshot['state']['step']}", flush=True)
    return state | snapshot["state"]


def backward(config: TrainConfig, corpus: Corpus, model: Any, learner: nn.Module, starts: Starts | None, step: int,
              context: Context, team: Team) -> tuple[Batch, torch.Tensor, States]:  # fmt: skip
    """The batch of a step, its two losses, and what this rank's streams end with; the gradients of all ranks are left
    in the parameters."""
    batch = corpus.batch(config, step)
    own = batch.rows(team.rows)
    begun = None if starts is None else starts.begin(step, own)
    tokens, answers, each = batch.answer.numel(), batch.answer.sum(), len(own.ids) // config.accumulate
    losses, ends, weight = torch.zeros(2, device=batch.ids.device), [], config.data.passkey.answer_weight
    with team.reading(model):
        for first in range(0, len(own.ids), each):
            rows, last = slice(first, first + each), first + each == len(own.ids)
            start = None if begun is None else [(conv[rows], state[rows]) for conv, state in begun]
            around = partial(team.step, learner, last)
            part = Part(own.rows(rows), tokens, answers, team.world, team.stretch, around)
            loss, answer, end = accumulate(learner, part, config.passing, start, weight, context)
            losses = losses + torch.stack([loss, answer])
            ends.append(end)
    final = ends[0]
    if len(ends) > 1:
        final = [(torch.cat([c for c, _ in layer]), torch.cat([s for _, s in layer])) for layer in zip(*ends)]
    return batch, team.sum(losses), final


def _mean(rows: list[list[float]], column: int) -> float:
    """Mean over the rows that have a value (no passkey in a batch gives NaN there)."""
    values = [row[column] for row in rows]
    finite = [v for v in values if not math.isnan(v)] or values
    return sum(finite) / len(finite) if finite else math.nan


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    enabled = device.type == "cuda" if config.amp == "auto" else bool(config.amp)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
