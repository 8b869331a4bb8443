"""A model of a shape trained on multi-query associative recall, and its accuracy by the number of pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnn_longctx.config import counted
from rnn_longctx.devices import device_name
from rnn_longctx.eval.capacity.config import MQARConfig, StudyCell
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.stats import mean_stderr
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.lm import LM
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.progress import Say, silent
from rnn_longctx.tasks.mqar import KINDS, mqar_batch
from rnn_longctx.train.config import OptimizerConfig, ScheduleConfig
from rnn_longctx.train.optimizer import learning_rate, make_optimizer
from rnn_longctx.train.snapshots import newest_snapshot, save_snapshot
from rnn_longctx.version import __version__

EVERY = 200  # steps between snapshots
WARMUP = 0.1  # share of the steps


def train_mqar(cell: StudyCell, c: MQARConfig, folder: Path, device: torch.device, say: Say = silent) -> LanguageModel:
    """Train on the answers alone, a number of pairs drawn for every step; goes on from the newest snapshot. The batch
    of a step follows from the cell's seed and the step."""
    torch.manual_seed(cell.seed)
    model: Any = LM(replace(cell.model, vocab_size=c.vocab_size)).to(device)
    optimizer = make_optimizer(model, OptimizerConfig(lr=c.lr))
    schedule = ScheduleConfig(warmup=max(1, round(WARMUP * c.steps)))
    snapshot = newest_snapshot(folder / "snapshots", device)
    if snapshot is not None:
        model.load_state_dict(snapshot["model"])
        optimizer.load_state_dict(snapshot["optimizer"])
    for step in range(snapshot["step"] if snapshot else 0, c.steps):
        rng = np.random.default_rng([cell.seed, step])
        logits, goal = _answers(model, *_batch(rng, c.batch_size, int(rng.choice(c.pairs)), cell, c, device))
        loss = torch.nn.functional.cross_entropy(logits, goal)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = c.lr * learning_rate(schedule, step, c.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % EVERY == 0 or done == c.steps:
            say(f"step {done}/{c.steps} loss {loss.item():.3f}")
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            save_snapshot(folder / "snapshots", done, parts)
    model.name = cell.name
    return model.eval()


@torch.inference_mode()
@in_evaluation
def measure_mqar(model: LanguageModel, cell: StudyCell, c: MQARConfig, results: Results, say: Say = silent) -> None:
    """A row for every number of pairs: the share of answers that are right, one sample a sequence. `length` is that of
    the sequences, in tokens."""
    weights = model.weights_hash
    for pairs in c.pairs:
        rng = np.random.default_rng([2**32 - 1, cell.seed, pairs])  # no step of the training has this seed
        ids, answers = _batch(rng, c.samples, pairs, cell, c, model.device)
        right: list[float] = []
        for some, where in zip(ids.split(c.batch_size), answers.split(c.batch_size)):
            logits, goal = _answers(model, some, where)
            right += (logits.argmax(-1) == goal).view(len(some), -1).double().mean(1).tolist()
        value, stderr = mean_stderr(right)
        results.put(
            {
                "model": model.name,
                "weights_hash": weights,
                "mitigation": "none",
                "task": f"{cell.task}{pairs}",
                "text": cell.task,
                "length": ids.shape[1],
                "metric": "accuracy",
                "batch": c.batch_size,
                "dtype": "float32",
                "backend": model.backend,
                "device": device_name(model.device),
                "seed": cell.seed,
                "value": value,
                "stderr": stderr,
                "n": len(right),
                "samples": right,
                "version": __version__,
            }
        )
        say(f"{cell.name}: {counted(pairs, 'pair')} {value:.3f}")


def _batch(
    rng: np.random.Generator, rows: int, pairs: int, cell: StudyCell, c: MQARConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    ids, answers = mqar_batch(rng, rows, pairs, c.vocab_size, KINDS[cell.task].forgetting)
    return torch.from_numpy(ids).to(device), torch.from_numpy(answers).to(device)


def _answers(model: Any, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (answers, vocab) before every answer, and the answers. bf16 in training on a GPU, as in the trainer."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda and model.training):
        logits = model.logits(model(ids[:, :-1])[answers[:, 1:]])
    return logits.float(), ids[answers]
