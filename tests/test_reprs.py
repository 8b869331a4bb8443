"""What stands on a model says what it is where it is printed: the model, the remedy, and whether it is on."""

from __future__ import annotations

import copy

import pytest
import torch

from rnn_longctx import CollapseMonitor, mitigate
from rnn_longctx.testing.remedies import _MAMBA2, adopted_model, calibration_text, own_model


def test_a_handle():
    model = own_model()
    handle = mitigate(model, "rri:alpha=0.99,beta=1")
    assert repr(handle) == "<rri:alpha=0.99,beta=1 on own: on>"
    handle.remove()
    assert repr(handle) == "<rri:alpha=0.99,beta=1 on own: off>"
    handle.put()
    assert repr(handle).endswith("on own: on>")


def test_an_adopted_model():
    model = adopted_model("Mamba2", **_MAMBA2)
    about = "<Adopted Mamba2ForCausalLM 'Mamba2': 2 recurrent layers, trained at 32 tokens"
    assert repr(model) == f"{about}, no remedy on it>"
    with mitigate(model, "window:tokens=8"), mitigate(model, "rri:alpha=0.99,beta=1"):
        assert repr(model) == f"{about}, window:tokens=8+rri:alpha=0.99,beta=1 on it>"
        assert "window:tokens=8" in repr(copy.deepcopy(model))
    model.train_length = None
    assert "trained at an unknown length, no remedy" in repr(model)


@pytest.mark.filterwarnings("ignore")
def test_a_monitor_and_a_watch():
    model = own_model()
    monitor = CollapseMonitor.calibrated(model, calibration_text(), every=8)
    said = repr(monitor)
    assert said.startswith(
        "<CollapseMonitor of own: 12 heads in 3 layers, a look every 8 tokens, calibrated at 32 tokens"
    )
    assert len(said) < 200, "no tables of numbers"
    with monitor.on(model) as watch:
        assert repr(watch) == "<Watch of own, warn: on, nothing seen yet>"
        with torch.no_grad():
            model(torch.zeros(1, 16, dtype=torch.long))
        assert repr(watch).startswith("<Watch of own, warn: on, ") and repr(watch).endswith(" at 16>")
    assert repr(watch).startswith("<Watch of own, warn: off, ")
