"""Every task can be trained on and measured, as a YAML file says; the tiny config learns induction."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from rnn_longctx import evaluate, load
from rnn_longctx.config import load_yaml
from rnn_longctx.errors import InputError
from rnn_longctx.spec import parse
from rnn_longctx.tasks import TASKS
from rnn_longctx.train import TrainConfig, train

ROOT = Path(__file__).parents[2]
TASKS_OF_ALL = [text for name, task in TASKS.items() for text in task.examples or (name,)]


def small(text: str) -> str:
    """The task in a vocabulary of a byte-level model."""
    return f"{text}{',' if ':' in text else ':'}vocab_size=64" if "mqar" in text else text


def test_every_task_is_trained_on_and_measured(tmp_path):
    names = [small(text) for text in TASKS_OF_ALL]
    length = 400  # several keys take some 330 bytes
    config = {
        "model": {"mixer": "gla:heads=2", "d_model": 16, "n_layer": 1, "vocab_size": 256},
        "data": {
            "text": ["builtin"],
            "mix": [{"task": name, "fraction": 1 / len(names), "lengths": [length, length]} for name in names],
            "answer_weight": 100,
        },
        **{"train_length": length, "batch_size": 2 * len(names), "steps": 1, "device": "cpu", "amp": False},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    train(load_yaml(TrainConfig, tmp_path / "run.yaml"), lambda line: None)
    model = load(tmp_path / "run" / "model")
    asked = [f"{name}{',' if ':' in name else ':'}n=2" for name in names]
    frame = evaluate(model, [length], asked, text="builtin")
    whole = frame[frame["depth"].isna() & (frame["metric"] == "accuracy")].set_index("task")
    for name in names:
        task = parse(name, TASKS, "task")
        assert 0 <= whole.loc[task.label, "value"] <= 1 and whole.loc[task.label, "n"] == 2
        chance = float("nan") if task.chance is None else task.chance  # (of questions of one's own nobody knows it)
        shown = whole.loc[task.label, "chance"]
        assert shown == pytest.approx(chance, nan_ok=True), "a table shows what a guess scores"


@pytest.mark.parametrize(
    "name", [name for name, task in TASKS.items() if "vocab_size" in {f.name for f in fields(task)}]
)
def test_a_vocabulary_larger_than_the_models_is_one_line(name, tmp_path):
    """In training and in measuring alike, before anything is read."""
    text = f"{name}:vocab_size=300"
    mix = {"mix": [{"task": text, "lengths": [100, 100]}]}
    config = {"model": {"mixer": "gla:heads=2", "d_model": 16, "n_layer": 1, "vocab_size": 256}, "train_length": 100}
    config |= {"data": {"text": ["builtin"], **mix}, "out": str(tmp_path / "run"), "device": "cpu"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    for refused in (
        lambda: train(load_yaml(TrainConfig, tmp_path / "run.yaml"), lambda line: None),
        lambda: evaluate(load("demo"), [100], [text], text="builtin"),
    ):
        with pytest.raises(InputError, match=f"{name}.* has 300 ids, .* 256") as error:
            refused()
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_tiny_model_learns_induction(tmp_path):
    config = load_yaml(TrainConfig, ROOT / "configs/train/tasks/induction.yaml", [f"out={tmp_path}/run"])
    train(config, lambda line: None)
    frame = evaluate(load(tmp_path / "run" / "model"), [32, 64], ["induction:n=100"], text="builtin")
    assert (frame.loc[frame["depth"].isna(), "value"] > 0.9).all()
