"""A pilot of models of another library: a hybrid, whose parts are told apart, and a delta rule."""

from __future__ import annotations

import json
import time

import adopted_families
import pytest
import torch
import transformers

import rnn_longctx
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.eval.pilot import run as pilot_run
from rnn_longctx.eval.pilot.config import PilotConfig
from rnn_longctx.eval.pilot.run import Pilot
from rnn_longctx.eval.pilot.steps import Sizes
from rnn_longctx.eval.pilot.write import write_pilot


@pytest.mark.parametrize("family", ["bamba", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_what_does_not_fit_the_model_is_named(family, tmp_path, monkeypatch):
    monkeypatch.setitem(adopted_families.COMMON, "vocab_size", 256)
    monkeypatch.setattr(pilot_run, "other_steps", lambda *some: [])
    torch.set_num_threads(1)
    theirs = transformers.AutoModelForCausalLM.from_config(adopted_families.FAMILIES[family]()).eval()
    model = rnn_longctx.adopt(theirs, tokenizer=ByteTokenizer(), train_length=16)
    text = Text("file:letters", bytes(torch.randint(97, 122, (3000,)).tolist()))
    said: list[str] = []
    config = PilotConfig("folder", "letters", str(tmp_path), 1e6, lengths=(16, 32))
    pilot = Pilot(model, text, config, time.monotonic(), said.append)
    _, estimate = pilot.estimate()
    pilot.measure(Sizes((16, 32), (16, 32), (16, 32), 2, 1, 2, 1))
    content, found = write_pilot(pilot, estimate)
    measured = {row["name"] for row in content["compared"]["rows"]}
    assert {"none", "recompute:last=16", "reset:every=16,overlap=8"} <= measured
    assert {"attention-window:tokens=16", "reset-recurrence:every=16"} <= measured
    without_steps = family == "qwen3_next"
    assert ("a-floor" in content["not_applicable"]) == without_steps
    assert ("a-floor" in measured) != without_steps
    assert "rnn_longctx.adopt(theirs" in found.python and json.loads((tmp_path / "pilot.json").read_text()) == content
