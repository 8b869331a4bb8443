from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from training_runs import TINY, Killed, assert_same, assert_same_run, final, rows

import rnn_longctx
from rnn_longctx.config import from_dict, load_yaml, to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.models.mamba2 import Mamba2LM
from rnn_longctx.train import TrainConfig, TrainingDiverged, passing, train, trainer
from rnn_longctx.train.config import EvaluateConfig, MixedText, OptimizerConfig, PassingConfig, ScheduleConfig
from rnn_longctx.train.corpus import Batch, Corpus, load_corpus
from rnn_longctx.train.passing import Learner, Part, accumulate
from rnn_longctx.train.snapshots import COLUMNS, newest_snapshot


def test_a_run(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    directory = train(config)
    log = rows(config)
    assert directory == Path(config.out) / "model" and directory.is_dir()
    assert list(log[0]) == COLUMNS and [r["step"] for r in log] == [2, 4, 6, 8, 10, 12]
    assert log[-1]["tokens"] == 12 * 4 * 120 and log[-1]["loss"] < log[0]["loss"]
    assert abs(log[0]["loss"] - math.log(256)) < 1 and log[0]["passkey_loss"] > 3
    assert "step 12/12" in capsys.readouterr().out
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


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "previous": {"passing": PassingConfig(50, "all", "previous", 0.5), "amp": True},  # convolutions kept in bf16
    "noise": {"passing": PassingConfig(37, 1, "noise")},
    "fitted-noise": {"passing": PassingConfig(64, 0, "fitted-noise"), "evaluate": EvaluateConfig([112], 5, 2)},
    "stages": {
        "passing": PassingConfig(40, 2, "previous", 1.0),
        "train_length": "112:3,115:2,120:7",
        "evaluate": EvaluateConfig([111, 120], every=3, passkeys=2),
    },
    "mixed": {},
    "mixed streams": {"passing": PassingConfig(50, "all", "previous", 0.7), "train_length": "112:5,120:7"},
}


@pytest.fixture
def records(config: TrainConfig, tmp_path: Path) -> list[Path]:
    """Three files of records made of the config's text."""
    text = Path(str(config.data.text[0])).read_text()
    (tmp_path / "records").mkdir()
    for i in range(3):
        parts = [text[k : k + 400] for k in range(i * 10_000, i * 10_000 + 6_000, 400)]
        lines = [json.dumps({"body": part}) + "\n" for part in parts]
        (tmp_path / "records" / f"{i}.jsonl").write_text("".join(lines))
    return sorted((tmp_path / "records").iterdir())


def mixed(config: TrainConfig, records: list[Path]) -> TrainConfig:
    """Streamed records by weight beside a text that is held, documents apart."""
    parts: list[str | MixedText] = [
        MixedText(f"jsonl:{records[0].parent}:body", 2.0, 15_000),
        MixedText(str(config.data.text[0]), 1.0),
    ]
    return replace(config, data=replace(config.data, text=parts, min_document=100, mask_first=True, reset=True))


@pytest.mark.parametrize("mode", MODES)
def test_killed_anywhere_and_resumed_is_the_uninterrupted_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, records: list[Path]
) -> None:
    monkeypatch.setattr(passing, "FIT_EVERY", 3)
    config = replace(config, **MODES[mode])
    if mode.startswith("mixed"):
        config = mixed(config, records)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    batch = Corpus.batch
    for kill in sorted(random.sample(range(12), 3)):

        def killer(self: Corpus, c: TrainConfig, step: int, kill: int = kill) -> Batch:
            if step == kill:
                raise Killed
            return batch(self, c, step)

        monkeypatch.setattr(Corpus, "batch", killer)
        with pytest.raises(Killed):
            train(config)
    monkeypatch.setattr(Corpus, "batch", batch)
    train(config)
    assert_same_run(config, whole)
    if config.evaluate:
        for file in ("eval.csv", "best/model.safetensors", "last/model.safetensors"):
            assert (Path(config.out) / file).read_bytes() == (Path(whole.out) / file).read_bytes(), file


def test_without_passing_it_is_a_plain_loop(config: TrainConfig) -> None:
    """Bit for bit the run that these few lines are, as it was before there was any passing of states."""
    train(config)
    corpus = load_corpus(config.data, rnn_longctx.data.ByteTokenizer(), 120)
    torch.manual_seed(config.seed)
    model = Mamba2LM(TINY)
    optimizer = trainer.make_optimizer(model, config.optimizer)
    for i in range(config.steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 3e-3 * trainer.learning_rate(
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


def test_a_run_of_an_older_version_goes_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose log has no lengths, whose snapshots know of no stages and whose config of no passing."""
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    batch = Corpus.batch

    def killer(self: Corpus, c: TrainConfig, step: int) -> Batch:
        if step == 9:
            raise Killed
        return batch(self, c, step)

    monkeypatch.setattr(Corpus, "batch", killer)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    out = Path(config.out)
    log = (out / "log.csv").read_text().splitlines()
    (out / "log.csv").write_text("".join(line.rsplit(",", 3)[0] + "\n" for line in log))
    before = json.loads((out / "run.json").read_text())
    new = ("init", "passing", "evaluate")
    for key in ("min_document", "mask_first", "reset"):
        del before["data"][key]
    (out / "run.json").write_text(json.dumps({k: v for k, v in before.items() if k not in new}))
    for file in (out / "snapshots").iterdir():
        snapshot = torch.load(file)
        snapshot["state"] = {k: snapshot["state"][k] for k in ("step", "seconds", "bad", "window")}
        torch.save(snapshot, file)
    train(config)
    assert_same_run(config, whole, but=("state_norm", "state_norm_max"))
    assert {row["length"] for row in rows(config)} == {120}


@pytest.mark.parametrize("mode", ["plain", "stages", "mixed streams"])
def test_kill_9(config: TrainConfig, tmp_path: Path, mode: str, records: list[Path]) -> None:
    """A process killed by the system, in the middle of anything, loses no exactness."""
    config = replace(config, **MODES[mode])
    if mode.startswith("mixed"):
        config = mixed(config, records)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    slow = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from rnn_longctx import cli\n"
        "from rnn_longctx.train.corpus import Corpus\n"
        "batch = Corpus.batch\n"
        "Corpus.batch = lambda *a: (time.sleep(0.1), batch(*a))[1]\n"
        "sys.argv = ['rnn-longctx', 'train', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", slow, str(file)], env=environment, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not list((Path(config.out) / "snapshots").glob("step-*.pt")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.random() * 0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL and not (Path(config.out) / "model").exists()
    train(config)
    assert_same_run(config, whole)


def test_a_run_stopped_by_a_bad_shard_goes_on_when_it_is_mended(
    config: TrainConfig, records: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mixed(config, records)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    batch = Corpus.batch

    def killer(self: Corpus, c: TrainConfig, step: int) -> Batch:
        if step == 9:
            raise Killed
        return batch(self, c, step)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "batch", killer)
        with pytest.raises(Killed):
            train(config)
    held = {file: file.read_bytes() for file in Path(config.out).rglob("*") if file.is_file()}
    assert any(file.suffix == ".pt" for file in held)
    good = records[1].read_text()
    lines = good.splitlines(keepends=True)
    records[1].write_text("".join([*lines[:7], lines[7][:50] + "\n", *lines[8:]]))
    with pytest.raises(InputError, match=r"records/1\.jsonl:8: not JSON") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert held == {file: file.read_bytes() for file in Path(config.out).rglob("*") if file.is_file()}
    records[1].write_text(good.replace("def", "fed"))
    with pytest.raises(InputError, match="training text is not the one"):
        train(config)
    records[1].write_text(good)
    train(config)
    assert_same_run(config, whole)


def test_what_a_mixture_is_recorded_as(config: TrainConfig, records: list[Path], tmp_path: Path) -> None:
    config = mixed(config, records)
    model: Any = rnn_longctx.load(train(config))
    parts = model.provenance["recipe"]["data"]["text"]
    assert parts == [
        {"source": "jsonl:records:body", "weight": 2.0, "tokens": 15_000},
        {"source": "file:text.txt", "weight": 1.0},
    ]
    assert str(tmp_path) not in json.dumps(model.provenance), "no paths"
    assert [t["name"] for t in model.provenance["data"]["texts"]] == [p["source"] for p in parts]


def test_a_damaged_newest_snapshot_costs_time_only(config: TrainConfig, tmp_path: Path) -> None:
    whole = replace(config, out=str(tmp_path / "whole"))
    for c in (whole, config):
        train(c)
    newest = max((Path(config.out) / "snapshots").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    train(config)
    assert_same_run(config, whole)


def test_another_config_in_the_same_folder_is_refused(config: TrainConfig) -> None:
    train(config)
    other = replace(config, optimizer=OptimizerConfig(lr=1e-4))
    with pytest.raises(InputError, match=r"another config \(optimizer\.lr was 0\.003, is 0\.0001\)"):
        train(other)
    train(replace(config, log_every=3, checkpoint_every=5, save_dtype="float32"))  # not part of what is trained


def test_another_text_in_the_same_folder_is_refused(config: TrainConfig) -> None:
    train(config)
    file = Path(str(config.data.text[0]))
    file.write_text(file.read_text() + "more")
    with pytest.raises(InputError, match="training text is not the one"):
        train(config)


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
    assert trainer.fault(1.999 * middle, 1e9, recent) is None, "a large gradient is clipped"
    assert trainer.fault(2.001 * middle, 1.0, recent) == (
        f"loss {2.001 * middle:.3f} is over 2 times the median {middle:.3f}"
    )
    assert trainer.fault(1e9, 1.0, recent[:31]) is None
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)):
        assert trainer.fault(loss, norm, recent) == trainer.fault(loss, norm, []) == "not finite"


def test_a_spike_is_skipped_and_said(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, seen = Learner.forward, []

    def spiking(self: Learner, *given: Any) -> Any:
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        losses, states = read(self, *given)
        return losses * (3 if len(seen) in (2, 7) else 1), states

    monkeypatch.setattr(Learner, "forward", spiking)
    monkeypatch.setattr(trainer, "RECENT", 4)
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
    monkeypatch.setattr(trainer, "RECENT", 4)
    config = replace(config, train_length="112:6,120:6", log_every=1)
    train(config)
    assert [r["length"] for r in rows(config)] == [112] * 6 + [120] * 6
    assert final(config)["state"]["recent"] and final(config)["state"]["bad"] == 0


def test_a_full_disk_ends_a_run_with_one_line(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the second snapshot; the first is whole, and with room again the run goes on to where it would have been."""
    from rnn_longctx import cli

    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    save, out = torch.save, Path(config.out)

    def no_room(state: Any, file: Any) -> None:
        if state["state"]["step"] == 8:
            file.write(b"PK" * 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", no_room)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    monkeypatch.setattr(sys, "argv", ["rnn-longctx", "train", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "step-00000008.pt: No space left on device" in error
    assert [p.name for p in (out / "snapshots").iterdir()] == ["step-00000004.pt"]
    monkeypatch.undo()
    torch.set_num_threads(1)
    train(config)
    assert_same_run(config, whole)


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
        return accumulate(Learner(model), Part.of(Batch(ids, answer)), None, None, 1.0, nullcontext)

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
    optimizer = trainer.make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert len(decay) == len(names)
    for name, p in names.items():
        free = p.dim() == 1 or name == "backbone.layers.0.mixer.in_proj.weight"
        assert decay[id(p)] == (0.0 if free else 0.3), name


def test_learning_rate() -> None:
    cosine = ScheduleConfig("cosine", warmup=10, min_lr=0.1)
    rates = [trainer.learning_rate(cosine, i, 100) for i in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and rates[10] == 1
    assert (np.diff(rates[10:]) < 0).all() and rates[55] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.11
    wsd = ScheduleConfig("wsd", warmup=10, decay=0.2)
    rates = [trainer.learning_rate(wsd, i, 100) for i in range(100)]
    assert set(rates[9:81]) == {1.0} and rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.text=[stdlib]", "never trained on"),
        ("data.passkey.lengths=[128,600]", "longer than train_length 512"),
        ("data.passkey.fraction=2", "data.passkey.fraction"),
        ("steps=0", "steps"),
        ("schedule.name=cosin", 'did you mean "cosine"'),
        ("optimizer.lr=fast", "optimizer.lr: expected float"),
        ("passing.segment=513", "passing.segment: 513 is longer than train_length 512"),
        ("passing.bptt=-1", "passing.bptt: expected 0, more segment boundaries, or all, got -1"),
        ("passing.bptt=every", "passing.bptt: expected"),
        ("passing.carry=1.1", "passing.carry: expected a chance between 0 and 1"),
        ("passing.start=fited-noise", 'did you mean "fitted-noise"'),
        ("evaluate.lengths=512,4q", r"evaluate.lengths\[1\]: expected int, got str '4q'"),
        ("evaluate.lengths=[]", "evaluate.lengths: expected some"),
        ("evaluate.every=5", 'missing key "evaluate.lengths"'),
        ("evaluate={lengths: [512], every: 0}", "evaluate.every: expected a positive number"),
        ("train_length=512:20,1k", "train_length: expected a length, or tokens:steps"),
        ("train_length=512:20,1k:-3", "train_length: expected a length, or tokens:steps"),
        ("train_length=4q", "train_length: expected a length, or tokens:steps"),
        ("train_length=100:20,1k:3", "data.passkey.lengths: 128 is longer than train_length 100"),
        ("model=null", "model: missing; give its shape, or init"),
    ],
)
def test_config_mistakes(override: str, words: str) -> None:
    file = Path(__file__).parents[2] / "configs" / "train" / "demo.yaml"
    with pytest.raises(InputError, match=words) as error:
        load_yaml(TrainConfig, file, [override])
    assert "demo.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["demo", "prose", "continual"])
def test_the_configs_that_come_along(name: str) -> None:
    found = load_yaml(TrainConfig, Path(__file__).parents[2] / "configs" / "train" / f"{name}.yaml")
    assert (found.passing is None) == (name != "continual") == (found.init is None)
    assert from_dict(TrainConfig, to_dict(found)) == found


def test_mistakes_before_any_work(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"model\.vocab_size: 100, tokenizer bytes has 256"):
        train(replace(config, model=replace(TINY, vocab_size=100)))
    with pytest.raises(InputError, match="device: expected auto"):
        train(replace(config, device="gpu"))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            train(replace(config, device="cuda"))
    assert not Path(config.out).exists()


def test_command_line(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from rnn_longctx import cli

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", "train", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    code, said, _ = run(str(file), "--set", "steps=2", "--set", "schedule.warmup=1")
    assert code == 0 and said.splitlines()[-1] == f"saved {Path(config.out) / 'model'}"
    (tmp_path / "occupied").touch()
    for words, expected in ((["stepz=2"], "stepz"), ([f"out={tmp_path}/occupied/x"], "cannot write to")):
        code, _, error = run(str(file), "--set", *words)
        assert code == 2 and error.startswith("rnn-longctx: ") and error.count("\n") == 1 and expected in error


def test_bf16_autocast_trains(config: TrainConfig) -> None:
    train(replace(config, amp=True, steps=4))
    parts = newest_snapshot(Path(config.out) / "snapshots", torch.device("cpu"))
    assert parts is not None and all(v.dtype == torch.float32 for v in parts["model"].values())
