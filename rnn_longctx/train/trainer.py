"""The training loop: next-token cross entropy on random windows or on streams that pass their states on, passkey
answers weighted up, exact resume.

Weights and optimizer state are float32; on CUDA the forward pass runs in bf16 autocast.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rnn_longctx.config import to_dict
from rnn_longctx.data import ByteTokenizer, load_tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.mamba2 import Mamba2LM
from rnn_longctx.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from rnn_longctx.train.corpus import Batch, Corpus, load_corpus
from rnn_longctx.train.evaluation import Context, Evaluation, final_metrics, late_loss, stage_of
from rnn_longctx.train.export import export
from rnn_longctx.train.passing import Starts, States, accumulate
from rnn_longctx.train.snapshots import Log, claim_folder, newest_snapshot, save_snapshot

# Settings that change where and how often things are written, not what is trained.
_NEUTRAL = ("out", "device", "log_every", "checkpoint_every", "export_every", "save_dtype", "licences")
BAD_STEPS = 20


class TrainingDiverged(RuntimeError):
    """Loss or gradient was not finite in 20 steps in a row."""


def train(config: TrainConfig) -> Path:
    """Train, or go on where a killed run of the same config stopped; returns the finished model's directory.

    `config.out` gets log.csv (losses in nats per token), snapshots/ and model/, and steps/STEP/ where models are to be
    kept on the way. With `config.evaluate` also eval.csv, last/, always the newest model, and best/, the one that
    answered most passkeys (of equals the one of least loss). Raises InputError (bad settings, a folder of another run,
    no text, no checkpoint to start from) and TrainingDiverged.
    """
    out = Path(config.out)
    device = _device(config.device)
    tokenizer = load_tokenizer(config.data.tokenizer)
    started = None if config.init is None else _started_from(config.init, tokenizer, device)
    if started is not None:
        label = f"{started.name}@{started.weights_hash}"  # no path: this is recorded with the finished model
        config = replace(config, model=started.config, init=label)
    assert config.model is not None
    if config.model.vocab_size < tokenizer.vocab_size:
        sizes = f"{config.model.vocab_size}, tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens"
        raise InputError(f"model.vocab_size: {sizes}")
    claim_folder(out, {k: v for k, v in to_dict(config).items() if k not in _NEUTRAL})
    began = time.monotonic()
    corpus = load_corpus(config.data, tokenizer, config.longest)
    names = ", ".join(f"{t['name']} ({t['hash']})" for t in corpus.texts)
    print(f"text: {names}: {len(corpus):,} tokens in {time.monotonic() - began:.0f} s", flush=True)
    if len(config.stages) > 1 and len(corpus.held_out) <= config.stages[0][0]:
        few = f"{len(corpus.held_out)} tokens are too few; see data.held_out"
        raise InputError(f"train_length: a schedule is gated on held-out text, and {few}")
    corpus = corpus.to(device)

    torch.manual_seed(config.seed)
    model: Any = Mamba2LM(config.model).to(device) if started is None else started
    model.train_length, model.name, model.tokenizer = config.longest, out.name, tokenizer
    optimizer = make_optimizer(model, config.optimizer)
    _fit(config, corpus, model, optimizer, out, device)
    metrics = final_metrics(config, corpus, model.eval(), out, partial(_autocast, config, device))
    export(config, corpus, model, out / "model", metrics)
    print(" ".join(f"{k} {v:.4g}" for k, v in metrics.items() if v is not None), flush=True)
    return out / "model"


def _started_from(init: str, tokenizer: Any, device: torch.device) -> Mamba2LM:
    """The checkpoint in float32, with where it comes from as its provenance."""
    try:
        model = checkpoint.load(init, device=device)
    except InputError as error:
        raise InputError(f"init: {error}") from None
    known = getattr(model.tokenizer, "spec", "bytes") is not None
    if known and isinstance(model.tokenizer, ByteTokenizer) != isinstance(tokenizer, ByteTokenizer):
        raise InputError(f"data.tokenizer: {tokenizer.name}, but that is not what {init} was trained with")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a float32 file is mapped: what becomes of it must not matter
    origin = {"name": model.name, "weights": model.weights_hash, "provenance": model.provenance}
    model.provenance = {"init": origin}
    return model


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


def batch_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss of all tokens, those that do not count taken as 0, mean loss of the answer tokens, 0 without any), in
    nats per token."""
    losses = model.losses(model(batch.ids[:, :-1], reset=batch.reset), batch.ids[:, 1:])
    if batch.counted is not None:
        losses = losses * batch.counted
    return losses.mean(), (losses * batch.answer).sum() / batch.answer.sum().clamp(min=1)


def _fit(
    config: TrainConfig,
    corpus: Corpus,
    model: Any,
    optimizer: torch.optim.Optimizer,
    out: Path,
    device: torch.device,
) -> None:
    """Run the steps that are left, from the newest snapshot."""
    starts = None if config.passing is None else Starts(model, config.passing, config.seed)
    context = partial(_autocast, config, device)
    texts = [t["hash"] for t in corpus.texts]
    state = _resume(config, texts, model, optimizer, starts, out, device)
    evaluation = None if config.evaluate is None else Evaluation(config, corpus, model, out, context)
    if evaluation is not None and state["step"] == 0:
        _keep_best(config, corpus, model, out, evaluation(0, 0), state)
    short_loss = partial(late_loss, model, corpus, config.stages[0][0], config.batch_size, context)
    model.train()
    began = time.monotonic() - state["seconds"]
    logged_tokens, logged_seconds = state["tokens"], state["seconds"]
    log_file = out / "log.csv"
    log = Log(log_file, state["step"], length=config.longest)
    with closing(log), _progress(config.steps, state["step"]) as show:
        for i in range(state["step"], config.steps):
            lr = config.optimizer.lr * learning_rate(config.schedule, i, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            stage = stage_of(config, i, state, short_loss)
            if starts is not None and stage != state["stage"]:
                starts.forget()
            state["stage"], at = stage, config.at(stage)
            optimizer.zero_grad(set_to_none=True)
            batch, loss, answer, final = _backward(at, corpus, model, starts, i, context)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            answer = torch.where(batch.answer.any(), answer, torch.nan)  # none in this batch: no value to log
            values: list[float] = torch.stack([loss.detach(), answer.detach(), norm]).tolist()
            step = state["step"] = i + 1
            state["tokens"] += batch.answer.numel()
            bad = not (math.isfinite(values[0]) and math.isfinite(values[2]))
            state["bad"] = state["bad"] + 1 if bad else 0
            if not bad:
                optimizer.step()
                state["window"].append(values)
            if starts is not None:
                starts.forget() if bad else starts.end(i, final)
            if bad or step % config.log_every == 0 or step == config.steps:
                state["seconds"] = time.monotonic() - began
                rows = [values] if bad else state["window"]
                row = {"step": step, "tokens": state["tokens"], "lr": lr, "seconds": state["seconds"]}
                row |= {"loss": _mean(rows, 0), "passkey_loss": _mean(rows, 1), "grad_norm": _mean(rows, 2)}
                elapsed = max(1e-9, state["seconds"] - logged_seconds)
                row |= {"tokens_per_second": (state["tokens"] - logged_tokens) / elapsed, "length": at.train_length}
                log.write(row)
                show(row | {"skipped": bad})
                logged_tokens, logged_seconds = state["tokens"], state["seconds"]
                if not bad:
                    state["window"] = []
            if state["bad"] == BAD_STEPS:
                raise TrainingDiverged(
                    f"loss or gradient not finite in {BAD_STEPS} steps in a row, at {step}; see {log_file}"
                )
            paused = time.monotonic()
            keep = step % config.checkpoint_every == 0 or step == config.steps
            if evaluation is not None and evaluation.due(step):
                _keep_best(config, corpus, model, out, evaluation(step, state["tokens"]), state)
            elif evaluation is not None and keep:
                export(config, corpus, model, out / "last", {"step": step}, envelope=False)
            logged_seconds += time.monotonic() - paused  # the speed logged is that of training
            if keep:
                state["seconds"] = time.monotonic() - began
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "texts": texts}
                if starts is not None:
                    parts["starts"] = starts.state_dict()
                save_snapshot(out / "snapshots", step, {**parts, "state": state})
            if config.export_every and step % config.export_every == 0:
                export(config, corpus, model, out / "steps" / str(step), {"step": step})


def _resume(config: TrainConfig, texts: list, model: Any, optimizer: torch.optim.Optimizer, starts: Starts | None,
            out: Path, device: torch.device) -> dict[str, Any]:  # fmt: skip
    """What the loop keeps between steps, as the newest snapshot has it; weights and the rest are put where they go."""
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "bad": 0, "window": [], "tokens": 0, "stage": 0}
    snapshot = newest_snapshot(out / "snapshots", device)
    if snapshot is None:
        return state
    if snapshot["texts"] != texts:
        raise InputError(f"{out}: the training text is not the one this run began with; set another out")
    model.load_state_dict(snapshot["model"])
    optimizer.load_state_dict(snapshot["optimizer"])
    if starts is not None:
        starts.load_state_dict(snapshot["starts"])
    # a snapshot of before there were stages does not say the tokens
    state["tokens"] = snapshot["state"]["step"] * config.batch_size * config.longest
    print(f"resumed from step {snapshot['state']['step']}", flush=True)
    return state | snapshot["state"]


def _backward(config: TrainConfig, corpus: Corpus, model: Any, starts: Starts | None, step: int,
              context: Context) -> tuple[Batch, torch.Tensor, torch.Tensor, States]:  # fmt: skip
    """The batch of a step, its losses and what its streams end with; the gradients are left in the parameters."""
    weight = config.data.passkey.answer_weight
    if starts is None:
        with context():
            batch = corpus.batch(config, step)
            loss, answer = batch_loss(model, batch)
        (loss + weight * answer).backward()
        return batch, loss, answer, []
    batch = corpus.batch(config, step)
    return batch, *accumulate(model, batch, starts.passing, starts.begin(step, batch), weight, context)


def _keep_best(config: TrainConfig, corpus: Corpus, model: Any, out: Path, score: list[float],
               state: dict[str, Any]) -> None:  # fmt: skip
    """The model just evaluated becomes last/, and best/ if its score is the largest so far."""
    metrics = {"step": state["step"]}
    export(config, corpus, model, out / "last", metrics, envelope=False)
    if "best" not in state or score > state["best"]:
        state["best"] = score
        export(config, corpus, model, out / "best", metrics, envelope=False)


def _mean(rows: list[list[float]], column: int) -> float:
    """Mean over the rows that have a value (no passkey in a batch gives NaN there)."""
    values = [row[column] for row in rows]
    finite = [v for v in values if not math.isnan(v)] or values
    return sum(finite) / len(finite) if finite else math.nan


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:0, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {name} was asked for, but there is no CUDA device here")
    return device


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    enabled = device.type == "cuda" if config.amp == "auto" else bool(config.amp)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def _progress(steps: int, done: int) -> Iterator[Any]:
    """A progress bar on a terminal, else one line a row."""
    if not sys.stdout.isatty():
        yield lambda row: print(_line(row, steps), flush=True)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()) as bar:
        task = bar.add_task(f"step {done}/{steps}", total=steps, completed=done)
        yield lambda row: bar.update(task, completed=row["step"], description=_line(row, steps, short=True))


def _line(row: dict[str, Any], steps: int, short: bool = False) -> str:
    text = f"step {row['step']}/{steps} loss {row['loss']:.3f} passkey {row['passkey_loss']:.3f}"
    text += f" {row['tokens_per_second'] / 1e3:.0f}K tok/s"
    if not short:  # what a bar leaves no room for
        text += f" lr {row['lr']:.2e} grad {row['grad_norm']:.3f} {row['seconds']:.0f} s"
    return text + (" SKIPPED (not finite)" if row["skipped"] else "")
