"""Mistakes in a config or on the command line, and the configs that come along."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import TINY

from rnn_longctx.config import from_dict, load_yaml, to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.train import TrainConfig, spelled_out, train


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.text=[stdlib]", "never trained on"),
        ("data.passkey.lengths=[128,600]", r"longer than train_length 512; .* of at most 512 there, or fraction 0"),
        ("data.passkey.fraction=2", "data.passkey.fraction"),
        ("steps=0", "steps"),
        (["train_length=512:20,1k:3", "batch_size=0"], "batch_size: expected a positive number, got 0"),
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
        ("train_length=512:20:4:1,1k:3", "train_length: expected a length, or tokens:steps"),
        ("train_length=512:20:0,1k:3", "train_length: expected a length, or tokens:steps"),
        ("train_length=100:20,1k:3", "data.passkey.lengths: 128 is longer than train_length 100"),
        ("optimizer.lr=-1", "optimizer.lr: expected 0 or more, got -1"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay: expected 0 or more"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas: expected two from 0 to below 1"),
        ("optimizer.clip=0", "optimizer.clip: expected a norm above 0"),
        ("optimizer.clip=-1", "optimizer.clip: expected a norm above 0"),
        ("schedule.warmup=-3", "schedule.warmup: expected a number of steps, got -3"),
        ("schedule.min_lr=2", "schedule.min_lr: expected a share of lr"),
        ("data.passkey.answer_weight=nan", "data.passkey.answer_weight: expected 0 or more, got nan"),
        ("seed=-1", "seed: expected 0 or more, got -1"),
        ("model.A_init=[1,0.1]", r"model.A_init: expected a range above 0, its lower end first, got \[1.0, 0.1\]"),
        ("model.dt_init=[0,0.1]", "model.dt_init: expected a range above 0"),
        ("data.text=[{source: a, weight: 0}, b]", "data.text: b has no weight, but another text has"),
        ("model=null", "model: missing; give its shape, or init"),
        ("mitigation=a-floor", "mitigation: is folded into a checkpoint's weights; give init"),
    ],
)
def test_config_mistakes(override: str | list[str], words: str) -> None:
    file = Path(__file__).parents[2] / "configs" / "train" / "demo.yaml"
    with pytest.raises(InputError, match=words) as error:
        load_yaml(TrainConfig, file, [override] if isinstance(override, str) else override)
    assert "demo.yaml" in str(error.value) and "\n" not in str(error.value)


def test_short_settings() -> None:
    """A checkpoint by `model`, a text by `data`; what else `data` has stays, and shapes are set as ever."""
    file = Path(__file__).parents[2] / "configs" / "train" / "continual.yaml"
    plain, shape = load_yaml(TrainConfig, file), ["model.d_model=64", "data={text: [a]}", "model={d_model: 8}"]
    short = load_yaml(TrainConfig, file, spelled_out(["model=runs/a", "data=texts/", "train_length=16k"]))
    assert (short.init, short.model) == ("runs/a", None)
    assert short.data == replace(plain.data, text=["texts/"])
    assert load_yaml(TrainConfig, file, spelled_out(["data=[a, b]"])).data.text == ["a", "b"]
    assert spelled_out(shape) == shape
    fresh = load_yaml(TrainConfig, file.with_name("demo.yaml"), spelled_out(["model=demo"]))
    assert fresh.model is None, "the checkpoint's shape, not the file's"
    with pytest.raises(InputError, match="is not a YAML value"):
        load_yaml(TrainConfig, file, spelled_out(["model={a"]))


@pytest.mark.parametrize("name", ["demo", "prose", "continual"])
def test_the_configs_that_come_along(name: str) -> None:
    found = load_yaml(TrainConfig, Path(__file__).parents[2] / "configs" / "train" / f"{name}.yaml")
    assert (found.passing is None) == (name != "continual") == (found.init is None)
    assert from_dict(TrainConfig, to_dict(found)) == found


def test_a_stream_shorter_than_a_segment_is_one_segment() -> None:
    file = Path(__file__).parents[2] / "configs" / "train" / "continual.yaml"
    config = load_yaml(TrainConfig, file, ["train_length=2k:5,16k:5", "passing.segment=4096"])
    assert [config.at(stage).passing.segment for stage in (0, 1)] == [2048, 4096]
    with pytest.raises(InputError, match=r"passing\.segment: 16385 is longer than train_length 16384"):
        load_yaml(TrainConfig, file, ["train_length=2k:5,16k:5", "passing.segment=16385"])


def test_mistakes_before_any_work(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"model\.vocab_size: 100, tokenizer bytes has 256"):
        train(replace(config, model=replace(TINY, vocab_size=100)))
    with pytest.raises(InputError, match="device: expected auto"):
        train(replace(config, device="gpu"))
    with pytest.raises(InputError, match="device: expected auto"):
        train(replace(config, device="meta"))
    short = replace(config.data, passkey=replace(config.data.passkey, fraction=1e-9, lengths=(90, 120)))
    with pytest.raises(InputError, match=r"passkey\.lengths: 90 is too short for prompt and answer \(a headerless"):
        train(replace(config, data=short))  # and not at the first step that happens to draw one
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
    code, said, _ = run(str(file), "--set", "steps=2", "schedule.warmup=1", "--set", f"out={config.out}")
    assert code == 0 and said.splitlines()[-1] == f"saved {Path(config.out) / 'model'}"
    (tmp_path / "occupied").touch()
    for words, expected in (
        (["stepz=2"], "stepz"),
        (["steps=2", "stepz"], "expects key=value"),
        ([f"out={tmp_path}/occupied/x"], "cannot write to"),
        (["model=nowhere"], "init: 'nowhere' is neither a directory"),
        (["log_to=wand"], "log_to: unknown log 'wand'; did you mean \"wandb\""),
    ):
        code, _, error = run(str(file), "--set", *words)
        assert code == 2 and error.startswith("rnn-longctx: ") and error.count("\n") == 1 and expected in error
