"""The benchmark of one layer of the delta rule: what it times, on a CPU, and what a token moves at the size timed."""

from __future__ import annotations

import sys

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.eval.bench import delta, delta_layer


def test_rows(monkeypatch):
    monkeypatch.setattr(delta, "MIXERS", {"gated-deltanet": "gated-deltanet:heads=2,head_dim=8", "kda": "kda:heads=2"})
    monkeypatch.setattr(delta, "SHAPE", delta.SHAPE | {"d_model": 16, "vocab_size": 9})
    monkeypatch.setattr(delta_layer, "ceilings", lambda: (1e3, 1e3))
    times = iter(range(130, 1, -10))

    def milliseconds(call):
        call()
        return float(next(times))

    monkeypatch.setattr(delta_layer, "milliseconds", milliseconds)
    monkeypatch.setitem(sys.modules, "fla", None)
    rows = list(delta_layer.layer_rows(70, ["gated-deltanet", "kda"], "cpu"))
    cases = [(name, system) for name in ("gated-deltanet", "kda") for system in ("", ", passes fused")]
    for (name, system), layer, passes in zip(cases, (130, 100, 70, 40), (-100, -70, -40, -10)):
        of = name, f"rnn-longctx{system}"
        ours = {row["what"]: row for row in rows if (row["mixer"], row["system"]) == of}
        assert {part: row["ms"] for part, row in ours.items()} == {
            "layer": layer, "scan": layer - 10, "products": layer - 20, "passes": passes,
        }  # fmt: skip
        assert ours["products"]["floor_ms"] > 0 and ours["passes"]["floor_ms"] > 0


@pytest.mark.parametrize(("name", "total"), [("gated-deltanet", 65072), ("kda", 68128)])
def test_what_a_token_moves(name, total):
    model = delta.model_of(name, "meta", n_layer=1)
    moved = delta_layer.moved(model)
    assert sum(moved.values()) == total
    assert moved["convolution, heads"] == 2 * 2 * 3072 and moved["norms"] == 2 * (4 + 4 + 2 + 2) * 1024
    weights = sum(linear.weight.numel() for linear in delta_layer._linears(model))
    expected = {"gated-deltanet": 1024 * (2 * 768 + 3 * 1536 + 2 * 6), "kda": 1024 * (4 * 1024 + 4 * 128 + 8)}
    assert weights == expected[name] + 3 * 1024 * 2816


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_needs_a_device():
    with pytest.raises(InputError, match="CUDA device"):
        delta_layer.bench_delta_layer()
    with pytest.raises(InputError, match="expected gated-deltanet or kda, got 'mamba2'"):
        delta_layer.bench_delta_layer(mixers="mamba2")
