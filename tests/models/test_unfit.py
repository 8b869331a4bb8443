"""Settings of mixers that do not go with the length that is read: one clear line, and what is computed stays right."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import yaml

from rnn_longctx.config import load_yaml
from rnn_longctx.errors import InputError, warn_once
from rnn_longctx.eval.compare import growth, load_comparison, study
from rnn_longctx.eval.compare.config import CompareConfig
from rnn_longctx.eval.run import evaluate
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.testing.remedies import model_of
from rnn_longctx.train import TrainConfig, train

TOP = "block-sparse:heads=2,block=4,window=8,sinks=1,top={}"
LONGNET = "longnet:heads=2,segments=4/16,dilations=1/4"


@pytest.mark.parametrize("length", [9, 13, 16, 17, 40])
@pytest.mark.parametrize("text", [TOP, TOP.replace("sinks=1", "sinks=0"), "two-stage:heads=2,block=4,window=4,top={}"])
@torch.no_grad()
def test_the_blocks_are_counted_as_the_layer_finds_them(text, length):
    """The last token of a text chooses as many blocks as there are; one more is too many."""
    mixer = LM(ModelConfig(text.format(30), d_model=16, n_layer=1, vocab_size=9)).layers[0].mixer
    kept = mixer.kept(torch.randn(1, length, 16))
    chosen = int((kept.blocks[0, 0, -1, mixer.sinks :] >= 0).sum())
    if chosen:
        assert ModelConfig(text.format(chosen), d_model=16, n_layer=1).unfit(length) == []
    (line,) = ModelConfig(text.format(chosen + 1), d_model=16, n_layer=1).unfit(length)
    assert f"top = {chosen + 1} is more than the blocks of 4 that {length} tokens have beside the window" in line
    assert line.endswith(f", {chosen}: everything is read")


def test_a_list_of_mixers_says_a_line_each():
    config = ModelConfig([LONGNET, TOP.format(9), "mamba2:headdim=8", LONGNET], d_model=16, n_layer=4)
    assert [line.partition(":")[0] for line in config.unfit(17)] == ["longnet", "block-sparse"]
    assert [line.partition(":")[0] for line in config.unfit(16)] == ["block-sparse"] and config.unfit(99) == [
        "longnet: more is read than the longest segment holds, 16 tokens, and such layers carry nothing from one of "
        "those segments into the next"
    ]


def test_training_and_evaluation_warn_and_go_on(tmp_path):
    (tmp_path / "text.txt").write_text("def f(x): return x\n" * 300)
    data = {"text": [str(tmp_path / "text.txt")], "held_out": 0.2, "passkey": {"fraction": 0}}
    shape = {"mixer": TOP.format(9), "d_model": 16, "n_layer": 1, "vocab_size": 256}
    small = {"train_length": 32, "batch_size": 2, "steps": 1, "device": "cpu", "out": str(tmp_path / "run")}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"model": shape, "data": data, **small}))
    config = load_yaml(TrainConfig, tmp_path / "train.yaml")
    with pytest.warns(RuntimeWarning, match="block-sparse: top = 9 is more than the blocks of 4 that 32 tokens have"):
        train(config)
    model = model_of(LONGNET).float()
    with pytest.warns(RuntimeWarning, match="longnet: more is read than the longest segment holds, 16 tokens") as told:
        evaluate(model, [32], ["lm:slices=1,tokens=0"], ["none"], text=["builtin"])
    assert len({str(w.message) for w in told}) == 1


def test_the_same_words_are_said_once():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            warn_once("too long")
    assert [str(w.message) for w in told] == ["too long"]


def test_a_comparison_warns_of_each_entry_before_anything_runs(tmp_path, monkeypatch):
    entries = f'[{{name: full, mixer: "full-attention:heads=2"}}, {{name: long, mixer: "{LONGNET}"}}]'
    (tmp_path / "text.txt").write_text("def f(x): return x\n" * 300)
    (tmp_path / "c.yaml").write_text(
        f"{{entries: {entries}, learning_rates: [1e-3], out: {tmp_path / 'c'}, device: cpu, equal: null,"
        f" shape: {{d_model: 16, n_layer: 1}}, train: {{data: {{text: [{tmp_path / 'text.txt'}], held_out: 0.2,"
        " passkey: {fraction: 0}}, train_length: 16}, measure: {loss: {lengths: [16, 32]}, recall: null, probe: null,"
        " remedies: null}}"
    )
    (tmp_path / "g.yaml").write_text(
        f"{{measure: growth, entries: {entries}, lengths: [16, 32], shape: {{d_model: 16}}, device: cpu,"
        f" out: {tmp_path / 'g'}}}"
    )
    monkeypatch.setattr(study, "run_cells", lambda *_: None)
    monkeypatch.setattr(growth, "run_cells", lambda *_: None)
    for name in ("c", "g"):
        config = load_comparison(tmp_path / f"{name}.yaml")
        run = study.run_study if isinstance(config, CompareConfig) else growth.run_growth
        with pytest.warns(RuntimeWarning, match="^long: longnet: more is read") as told:
            run(config, say=lambda _: None)
        assert len(told) == 1


def test_a_causal_linformer_is_refused_with_what_to_take():
    with pytest.raises(InputError, match="have no causal form: for language take the mixer chunk-linformer"):
        ModelConfig("linformer:heads=2", d_model=16, n_layer=1)


def test_the_command_says_a_warning_on_one_line():
    code = "import warnings; from rnn_longctx.cli import program; program.app = lambda **_: warnings.warn('a\\n b'); "
    done = subprocess.run([sys.executable, "-c", code + "program.main()"], capture_output=True, text=True)
    assert done.stderr == "rnn-longctx: warning: a b\n" and done.returncode == 0
