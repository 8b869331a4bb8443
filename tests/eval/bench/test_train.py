"""The benchmark of training, at a size that a CPU has done in seconds."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rnn_longctx import cli
from rnn_longctx.eval.bench import train
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

TINY = Mamba2Config(d_model=32, n_layer=2, vocab_size=300, d_state=16, headdim=16)


def test_rows(monkeypatch):
    monkeypatch.setattr(train, "REPEATS", 1)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # beside what the machine has
    found = list(train.train_rows(TINY, [(2, 70)], [(1, 100), (3, 50)], [16, 33]))
    sizes = [(row["batch"], row["length"], row["segment"]) for row in found]
    assert sizes == [(2, 70, 70), (1, 100, 16), (1, 100, 33), (3, 50, 16), (3, 50, 33)]
    for row in found:
        tokens = row["batch"] * row["length"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"]) and row["note"] == ""
        done = tokens * train.operations(TINY) / row["seconds"]
        assert row["mfu"] == pytest.approx(done / (row["matrix_tflop_s"] * 1e12))
        assert math.isnan(row["peak_gib"]) != torch.cuda.is_available()


def test_operations_of_matrix_weights():
    """As PyTorch counts the products of a projection and its gradients, which are those that grow with its size."""
    counted = {}
    for width in (32, 64):
        shape = replace(TINY, d_model=width, headdim=width // 2, tie_embeddings=False)  # as many heads
        model = Mamba2LM(shape)
        with FlopCounterMode(display=False) as counter:
            for block in model.layers:
                x = torch.randn(1, 40, width, requires_grad=True)
                block.mixer.in_proj(x).sum().backward()
                y = torch.randn(1, 40, 2 * width, requires_grad=True)
                block.mixer.out_proj(y).sum().backward()
            hidden = torch.randn(1, 40, width, requires_grad=True)
            torch.nn.functional.linear(hidden, model.lm_head.weight).sum().backward()
        counted[width] = counter.get_total_flops() / 40
        scan = 12 * 2 * (2 * width) * 16  # layers, channels, d_state
        assert train.operations(shape) == counted[width] + scan


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "REPEATS", 1)
    words = "--whole 1x40 --streams 1x64 --segments 32 --layers 1 --d-model 32 --vocab 99"
    monkeypatch.setattr(sys, "argv", ["rnn-longctx", "bench", "train", *words.split(), "--out", f"{tmp_path}/t.csv"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["segment"] for row in rows if row["system"] == "rnn-longctx"] == ["40", "32"]
    assert "tokens_per_second" in capsys.readouterr().out and "--whole 1x40" in rows[0]["command"]
