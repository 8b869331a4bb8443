"""The training loop: next-token cross entropy on random windows, passkey answers weighted up, exact resume.

Weights and optimizer state are float32; on CUDA the forward pass runs in bf16 autocast.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rnn_longctx.config import to_dict
from rnn_longctx.data import Tokenizer, load_tokenizer, passkey_batch
from rnn_longctx.errors import InputError
from rnn_longctx.models.mamba2 import Mamba2LM
from rnn_longctx.probes.envelope import SLICES, measure_envelope
from rnn_longctx.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from rnn_longctx.train.corpus import Batch, Corpus, load_corpus
from rnn_longctx.train.snapshots import Log, claim_folder, newest_snapshot, save_snapshot

# Settings that change where and how often things are written, not what is trained.
_NEUTRAL = ("out", "device", "log_every", "checkpoint_every", "export_every", "save_dtype", "licences")
BAD_STEPS = 20


class TrainingDiverged(RuntimeError):
    """Loss or gradient was not finite in 20 steps in a row."""


def train(config: TrainConfig) -> Path:
    """Train, or go on where a killed run of the same config stopped; returns the finished model's directory.

    `config.out` gets log.csv (losses in nats per token), snapshots/ and model/, and steps/STEP/ where models are to be
    kept on the way. Raises InputError (bad settings, a folder of another run, no text) and TrainingDiverged.
    """
    out = Path(config.out)
    device = _device(config.device)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        sizes = f"{config.model.vocab_size}, tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens"
        raise InputError(f"model.vocab_size: {sizes}")
    claim_folder(out, {k: v for k, v in to_dict(config).items() if k not in _NEUTRAL})
    began = time.monotonic()
    corpus = load_corpus(config.data, tokenizer, config.train_length)
    names = ", ".join(f"{t['name']} ({t['hash']})" for t in corpus.texts)
    print(f"text: {names}: {len(corpus.train):,} tokens in {time.monotonic() - began:.0f} s", flush=True)
    corpus = corpus.to(device)

    torch.manual_seed(config.seed)
    model: Any = Mamba2LM(config.model).to(device)
    model.train_length, model.name, model.tokenizer = config.train_length, out.name, tokenizer
    optimizer = make_optimizer(model, config.optimizer)
    _fit(config, corpus, model, optimizer, out, device)
    metrics = _final_metrics(config, corpus, model.eval(), out)
    _export(config, corpus, model, out / "model", device, metrics)
    print(" ".join(f"{k} {v:.4g}" for k, v in metrics.items() if v is not None), flush=True)
    return out / "model"


def _export(config: TrainConfig, corpus: Corpus, model: Any, where: Path, device: torch.device,
            metrics: dict[str, Any]) -> None:  # fmt: skip
    """A checkpoint that `rnn_longctx.load` reads, with what it is made of and how far its states go."""
    from rnn_longctx.models import checkpoint

    model.eval()
    provenance, calibration = _provenance(config, corpus, device, metrics), _envelope(config, corpus, model)
    dtype = getattr(torch, config.save_dtype)
    checkpoint.save(model, where, dtype=dtype, provenance=provenance, calibration=calibration)
    model.train()


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
    """(mean loss of all tokens, mean loss of the answer tokens, 0 without any), in nats per token."""
    losses = model.losses(model(batch.ids[:, :-1]), batch.ids[:, 1:])
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
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "bad": 0, "window": []}
    texts = [t["hash"] for t in corpus.texts]
    snapshot = newest_snapshot(out / "snapshots", device)
    if snapshot is not None:
        if snapshot["texts"] != texts:
            raise InputError(f"{out}: the training text is not the one this run began with; set another out")
        model.load_state_dict(snapshot["model"])
        optimizer.load_state_dict(snapshot["optimizer"])
        state = snapshot["state"]
        print(f"resumed from step {state['step']}", flush=True)
    began = time.monotonic() - state["seconds"]
    tokens_per_step = config.batch_size * config.train_length
    logged_step, logged_seconds = state["step"], state["seconds"]
    model.train()
    log_file = out / "log.csv"
    with closing(Log(log_file, state["step"])) as log, _progress(config.steps, state["step"]) as show:
        for i in range(state["step"], config.steps):
            lr = config.optimizer.lr * learning_rate(config.schedule, i, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with _autocast(config, device):
                batch = corpus.batch(config, i)
                loss, answer = batch_loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            (loss + config.data.passkey.answer_weight * answer).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            answer = torch.where(batch.answer.any(), answer, torch.nan)  # none in this batch: no value to log
            values: list[float] = torch.stack([loss.detach(), answer.detach(), norm]).tolist()
            step = state["step"] = i + 1
            bad = not (math.isfinite(values[0]) and math.isfinite(values[2]))
            state["bad"] = state["bad"] + 1 if bad else 0
            if not bad:
                optimizer.step()
                state["window"].append(values)
            if bad or step % config.log_every == 0 or step == config.steps:
                state["seconds"] = time.monotonic() - began
                rows = [values] if bad else state["window"]
                row = {"step": step, "tokens": step * tokens_per_step, "lr": lr, "seconds": state["seconds"]}
                row |= {"loss": _mean(rows, 0), "passkey_loss": _mean(rows, 1), "grad_norm": _mean(rows, 2)}
                elapsed = max(1e-9, state["seconds"] - logged_seconds)
                row["tokens_per_second"] = (step - logged_step) * tokens_per_step / elapsed
                log.write(row)
                show(row | {"skipped": bad})
                logged_step, logged_seconds = step, state["seconds"]
                if not bad:
                    state["window"] = []
            if state["bad"] == BAD_STEPS:
                raise TrainingDiverged(
                    f"loss or gradient not finite in {BAD_STEPS} steps in a row, at {step}; see {log_file}"
                )
            if step % config.checkpoint_every == 0 or step == config.steps:
                state["seconds"] = time.monotonic() - began
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_snapshot(out / "snapshots", step, {**parts, "state": state, "texts": texts})
            if config.export_every and step % config.export_every == 0:
                _export(config, corpus, model, out / "steps" / str(step), device, {"step": step})


def _mean(rows: list[list[float]], column: int) -> float:
    """Mean over the rows that have a value (no passkey in a batch gives NaN there)."""
    values = [row[column] for row in rows]
    finite = [v for v in values if not math.isnan(v)] or values
    return sum(finite) / len(finite) if finite else math.nan


@torch.inference_mode()
def _final_metrics(config: TrainConfig, corpus: Corpus, model: Any, out: Path) -> dict[str, Any]:
    """Losses in nats per token; passkey accuracy (greedy, exact) of 100 prompts that end at the training
    length."""
    device = next(model.parameters()).device
    with (out / "log.csv").open() as file:
        losses_seen = [float(line.split(",")[2]) for line in list(file)[1:]]
    finite = [loss for loss in losses_seen if math.isfinite(loss)]
    metrics: dict[str, Any] = {"train_loss": finite[-1] if finite else None}
    metrics |= {"validation_loss": None, "passkey_accuracy": None}
    total, count = 0.0, 0
    with _autocast(config, device):
        for ids in corpus.validation(config.train_length, config.batch_size):
            losses = model.losses(model(ids[:, :-1]), ids[:, 1:])
            total, count = total + float(losses.double().sum()), count + losses.numel()
        if count:
            metrics["validation_loss"] = total / count
        if config.data.passkey.fraction:
            metrics["passkey_accuracy"] = _passkey_accuracy(config, model, corpus.tokenizer, device)
    return metrics


def _passkey_accuracy(
    config: TrainConfig, model: Any, tokenizer: Tokenizer, device: torch.device, n: int = 100
) -> float:
    """Greedy decoding gives the answer exactly if every answer token is the most likely one after the true
    ones before it, so one pass over prompt and answer decides it."""
    length = config.data.passkey.lengths[1] - 6
    right = 0
    for prompt in passkey_batch(tokenizer, length, n, config.seed, config.data.passkey.style):
        answer = torch.from_numpy(tokenizer.encode(f" {prompt.answer}")).to(device)
        ids = torch.cat([torch.from_numpy(prompt.ids).to(device), answer])[None]
        logits = model.logits(model(ids[:, :-1])[:, -len(answer) :])
        right += bool((logits.argmax(-1)[0] == answer).all())
    return right / n


def _envelope(config: TrainConfig, corpus: Corpus, model: Any) -> dict[str, Any] | None:
    """How far the states of the finished model go within the training length, on the held-out text."""
    windows = next(corpus.validation(config.train_length, SLICES, most=SLICES), None)
    if windows is None or len(windows) == 0:
        return None
    ids = windows[:, :-1]
    digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
    names = "+".join(str(t["name"]) for t in corpus.texts)
    return measure_envelope(model, ids, f"{names} (held out)", digest).to_dict()


def _provenance(config: TrainConfig, corpus: Corpus, device: torch.device, metrics: dict[str, Any]) -> dict[str, Any]:
    """What the finished model is made of. No paths: texts go by their canonical names."""
    recipe = {k: v for k, v in to_dict(config).items() if k not in ("out", "device", "licences")}
    recipe["data"]["text"] = [t["name"] for t in corpus.texts]
    others = [t["name"] for t in corpus.texts if t["name"] != "site-packages"]
    excluded = "Python's standard library: not in the training text, nor is any installed file that has more than "
    excluded += "20% of its longer lines in common with it"
    if others:
        excluded += f" (not checked in {', '.join(map(str, others))})"
    return {
        "recipe": recipe,
        "seed": config.seed,
        "data": {"texts": corpus.texts, "licences": config.licences, "excluded": excluded},
        "metrics": metrics,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


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
