"""Runs that end early go on, bit for bit; runs that may not are refused."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import Killed, assert_same_run, rows, run_and_kill

import rnn_longctx
from rnn_longctx.config import to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.train import TrainConfig, starts, train
from rnn_longctx.train.config import EvaluateConfig, MixedText, OptimizerConfig, PassingConfig
from rnn_longctx.train.corpus import Batch, Corpus

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "previous": {"passing": PassingConfig(50, "all", "previous", 0.5), "amp": True},  # convolutions kept in bf16
    "noise": {"passing": PassingConfig(37, 1, "noise")},
    "fitted-noise": {"passing": PassingConfig(64, 0, "fitted-noise"), "evaluate": EvaluateConfig([112], 5, 2)},
    "stages": {
        "passing": PassingConfig(40, 2, "previous", 1.0),
        "train_length": "112:3,115:2:2,120:7:3",
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
    monkeypatch.setattr(starts, "FIT_EVERY", 3)
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
    new = ("init", "mitigation", "passing", "evaluate")
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
    run_and_kill(config, tmp_path / "config.yaml")
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
