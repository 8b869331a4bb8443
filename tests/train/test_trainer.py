from __future__ import annotations

import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import TINY, assert_same, final, rows

import rnn_longctx
from rnn_longctx.config import to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.train import TrainConfig, TrainingDiverged, loop, train
from rnn_longctx.train.bptt import MicroBatch, accumulate
from rnn_longctx.train.config import EvaluateConfig, OptimizerConfig, PassingConfig, ScheduleConfig
from rnn_longctx.train.corpus import Batch, load_corpus
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.optimizer import learning_rate, make_optimizer
from rnn_longctx.train.snapshots import COLUMNS, newest_snapshot


def test_a_run(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    directory = train(config)
    log = rows(config)
    assert directory == Path(config.out) / "model" and directory.is_dir()
    assert list(log[0]) == COLUMNS and [r["step"] for r in log] == [2, 4, 6, 8, 10, 12]
    assert log[-1]["tokens"] == 12 * 4 * 120 and log[-1]["loss"] < log[0]["loss"]
    assert abs(log[0]["loss"] - math.log(256)) < 1 and log[0]["passkey_loss"] > 3
    said = capsys.readouterr().out
    assert "step 12/12" in said and said.startswith("reading the text\n") and "\nstep 1/12 loss " in said
    before = (Path(config.out) / "log.csv").read_bytes()
    train(config)
    assert (Path(config.out) / "log.csv").read_bytes() == before, "a finished run is not trained again"


def test_the_finished_model(config: TrainConfig) -> None:
    from rnn_longctx.models import checkpoint

    directory = train(config)
    model = checkpoint.load(directory)
    assert model.train_length == 120 and model.config == config.model
    found = model.state_dict()
    for name, weight in final(config)["model"].items():
        assert torch.allclose(found[name].float(), weight, rtol=0.01, atol=1e-6), name
    facts = model.provenance
    assert facts["recipe"]["optimizer"]["lr"] == config.optimizer.lr and facts["seed"] == config.seed
    assert facts["data"]["texts"][0]["name"] == "file:text.txt" and facts["torch"] == torch.__version__
    assert "standard library" in facts["data"]["excluded"] and "file:text.txt" in facts["data"]["excluded"]
    assert 0 < facts["metrics"]["validation_loss"] < 6 and 0 <= facts["metrics"]["passkey_accuracy"] <= 1
    assert str(Path(config.out).parent) not in json.dumps(to_dict(facts)), "no path of this machine"


def test_models_kept_on_the_way_change_nothing(config: TrainConfig, tmp_path: Path) -> None:
    plain = load_file(train(config) / "model.safetensors")
    kept = load_file(train(replace(config, export_every=5, out=str(tmp_path / "b"))) / "model.safetensors")
    assert all(torch.equal(plain[k], kept[k]) for k in plain)
    assert sorted(p.name for p in (tmp_path / "b" / "steps").iterdir()) == ["10", "5"]
    early = rnn_longctx.load(tmp_path / "b" / "steps" / "5")
    assert early.train_length == 120 and early.calibration is not None
    assert not all(
        torch.equal(plain[k], v) for k, v in load_file(tmp_path / "b" / "steps" / "5" / "model.safetensors").items()
    )


def batch_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss of all tokens, mean loss of the answer tokens, 0 without any)."""
    losses = model.losses(model(batch.ids[:, :-1]), batch.ids[:, 1:])
    return losses.mean(), (losses * batch.answer).sum() / batch.answer.sum().clamp(min=1)


def test_without_passing_it_is_a_plain_loop(config: TrainConfig) -> None:
    """Bit for bit the run that these few lines are, as it was before there was any passing of states."""
    train(config)
    corpus = load_corpus(config.data, rnn_longctx.data.ByteTokenizer(), 120)
    torch.manual_seed(config.seed)
    model = Mamba2LM(TINY)
    optimizer = make_optimizer(model, config.optimizer)
    for i in range(config.steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 3e-3 * learning_rate(
            config.schedule, i, config.steps
        )
        rng = np.random.default_rng([config.seed, i])
        starts = rng.integers(0, len(corpus.train) - 120, 4)
        batch = corpus.batch(config, i)
        text = corpus.train[torch.from_numpy(starts)[:, None] + torch.arange(121)].long()
        assert torch.equal(batch.ids[2:], text[2:]) and batch.carried is None  # at most two rows have a passkey
        loss, answer = batch_loss(model, batch)
        optimizer.zero_grad()
        (loss + answer).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert_same(final(config)["model"], model.state_dict())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    read, seen = Learner.forward, []

    def sometimes(self: Learner, *given: Any) -> Any:
        losses, states = read(self, *given)
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        if len(seen) in (5, 6):
            # sqrt(0) has a finite value and an infinite gradient.
            zero = (self.model.lm_head.weight * 0).sum()
            losses = losses * math.nan if what == "loss" else losses + zero.abs().sqrt()
        return losses, states

    monkeypatch.setattr(Learner, "forward", sometimes)
    train(config)
    assert_same(seen[4], seen[5])
    assert_same(seen[4], seen[6])
    assert not torch.equal(seen[6]["lm_head.weight"], seen[7]["lm_head.weight"])
    log = rows(config)
    assert [r["step"] for r in log] == [2, 4, 5, 6, 8, 10, 12]
    bad = [r["step"] for r in log if not (math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]))]
    assert bad == [5, 6]
    assert all(torch.isfinite(v).all() for v in final(config)["model"].values())


def test_twenty_bad_steps_in_a_row_stop_the_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = Learner.forward, []

    def diverged(self: Learner, *given: Any) -> Any:
        calls.append(1)
        losses, states = read(self, *given)
        return (losses * math.inf if len(calls) > 3 else losses), states

    monkeypatch.setattr(Learner, "forward", diverged)
    with pytest.raises(TrainingDiverged, match="20 steps in a row were skipped, at 23: not finite"):
        train(replace(config, steps=50))
    assert len(calls) == 23


def test_faults() -> None:
    """A step is skipped where a number is not finite, or its loss is over twice the median of the last 64; with fewer
    than 32 there is no telling."""
    recent = [float(v) for v in np.random.default_rng().uniform(1.0, 2.0, 32)]
    middle = float(np.median(recent))
    assert loop.fault(1.999 * middle, 1e9, recent) is None, "a large gradient is clipped"
    assert loop.fault(2.001 * middle, 1.0, recent) == (
        f"loss {2.001 * middle:.3f} is over 2 times the median {middle:.3f}"
    )
    assert loop.fault(1e9, 1.0, recent[:31]) is None
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)):
        assert loop.fault(loss, norm, recent) == loop.fault(loss, norm, []) == "not finite"


def test_a_spike_is_skipped_and_said(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, seen = Learner.forward, []

    def spiking(self: Learner, *given: Any) -> Any:
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        losses, states = read(self, *given)
        return losses * (3 if len(seen) in (2, 7) else 1), states

    monkeypatch.setattr(Learner, "forward", spiking)
    monkeypatch.setattr(loop, "RECENT", 4)
    train(config)
    changed = [not torch.equal(a["lm_head.weight"], b["lm_head.weight"]) for a, b in zip(seen, seen[1:])]
    assert changed == [i != 7 for i in range(1, 12)], "the second step has too few before it"
    assert [r["step"] for r in rows(config)] == [2, 4, 6, 7, 8, 10, 12]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "SKIPPED" in line]
    assert re.match(r"step 7/12 loss 1\d\.\d+ .*SKIPPED: loss 1\d\.\d+ is over 2 times the median 5\.\d+", said)


def test_a_longer_stage_has_its_own_median(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is normal there may be far above what was normal before."""
    read = Learner.forward

    def higher(self: Learner, ids: torch.Tensor, *given: Any) -> Any:
        losses, states = read(self, ids, *given)
        return (losses * 3 if ids.shape[1] == 120 else losses), states

    monkeypatch.setattr(Learner, "forward", higher)
    monkeypatch.setattr(loop, "RECENT", 4)
    config = replace(config, train_length="112:6,120:6", log_every=1)
    train(config)
    assert [r["length"] for r in rows(config)] == [112] * 6 + [120] * 6
    assert final(config)["state"]["recent"] and final(config)["state"]["bad"] == 0


def test_the_norms_of_states(config: TrainConfig) -> None:
    """At a learning rate of 0: those after the last batch, the mean of all heads and the largest head's."""
    c = replace(config, optimizer=OptimizerConfig(lr=0.0), passing=PassingConfig(50, 0, "zero"), save_dtype="float32")
    model, corpus = rnn_longctx.load(train(c)), load_corpus(c.data, rnn_longctx.data.ByteTokenizer(), 120)
    cache = model.new_cache()
    with torch.no_grad():
        model(corpus.batch(c, 11).ids[:, :-1], cache)
    norms = np.array(
        [[layer.scan.state[:, h].flatten(1).norm(dim=1).mean() for h in range(4)] for layer in cache.layers]
    )
    last = rows(c)[-1]
    assert last["state_norm"] == pytest.approx(norms.mean(), rel=1e-4)
    assert last["state_norm_max"] == pytest.approx(norms.max(), rel=1e-4)


def test_logs_elsewhere(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the libraries, which need not be installed."""
    seen: list[Any] = []

    class Run:
        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def __enter__(self) -> Run:
            return self

        def __exit__(self, *error: Any) -> None:
            seen.append("closed")

        def log(self, values: dict[str, float], step: int) -> None:
            seen.append((step, values))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            seen.append((step, {key: value}))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Run))
    c = replace(config, log_to=["wandb", "tensorboard"], evaluate=EvaluateConfig([112], 6, 0))
    train(c)
    assert seen[-2:] == ["closed", "closed"]
    for row in rows(c):
        for key in ("loss", "lr", "grad_norm", "tokens_per_second", "state_norm_max"):
            told = [v[f"train/{key}"] for step, v in seen[:-2] if step == row["step"] and f"train/{key}" in v]
            assert told == pytest.approx([row[key]] * 2, rel=1e-5)
    assert [step for step, v in seen[:-2] if "eval/loss_112" in v] == [0, 0, 6, 6, 12, 12]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed"):
        train(c)
    train(replace(c, log_to=[]))  # how a run is logged is not part of it


def test_answer_loss(config: TrainConfig) -> None:
    """The answer's loss is the mean over its tokens, and 0 with no answer."""
    model = Mamba2LM(TINY)
    ids, answer = torch.randint(0, 256, (3, 41)), torch.rand(3, 40) < 0.2

    def found(answer: torch.Tensor) -> tuple:
        return accumulate(Learner(model), MicroBatch.of(Batch(ids, answer)), None, None, 1.0, nullcontext)

    loss, answer_loss, _ = found(answer)
    expected = nn.functional.cross_entropy(
        model.logits(model(ids[:, :-1])).transpose(1, 2), ids[:, 1:], reduction="none"
    ).detach()
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(answer_loss, expected[answer].mean())
    assert found(torch.zeros_like(answer))[1] == 0


def test_the_answer_weight_matters(config: TrainConfig, tmp_path: Path) -> None:
    heavy = replace(config.data, passkey=replace(config.data.passkey, answer_weight=5.0))
    other = replace(config, data=heavy, out=str(tmp_path / "other"))
    for c in (config, other):
        train(c)
    assert not torch.equal(final(config)["model"]["lm_head.weight"], final(other)["model"]["lm_head.weight"])


def test_weight_decay_groups() -> None:
    model = Mamba2LM(TINY)
    model.backbone.layers[0].mixer.in_proj.weight._no_weight_decay = True
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert len(decay) == len(names)
    for name, p in names.items():
        free = p.dim() == 1 or name == "backbone.layers.0.mixer.in_proj.weight"
        assert decay[id(p)] == (0.0 if free else 0.3), name


def test_learning_rate() -> None:
    cosine = ScheduleConfig("cosine", warmup=10, min_lr=0.1)
    rates = [learning_rate(cosine, i, 100) for i in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and rates[10] == 1
    assert (np.diff(rates[10:]) < 0).all() and rates[55] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.11
    wsd = ScheduleConfig("wsd", warmup=10, decay=0.2)
    rates = [learning_rate(wsd, i, 100) for i in range(100)]
    assert set(rates[9:81]) == {1.0} and rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


def test_bf16_autocast_trains(config: TrainConfig) -> None:
    train(replace(config, amp=True, steps=4))
    parts = newest_snapshot(Path(config.out) / "snapshots", torch.device("cpu"))
    assert parts is not None and all(v.dtype == torch.float32 for v in parts["model"].values())
