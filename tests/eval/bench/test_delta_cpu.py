"""The delta rule against transformers' functions: the same numbers, whatever they take."""

from __future__ import annotations

import pytest

from rnn_longctx.eval.bench.delta_cpu import delta_cpu_rows


@pytest.mark.parametrize("decay", [0.1, 3.0])
def test_they_compute_the_same(decay):
    rows = list(delta_cpu_rows((2, 128, 2, 16), decay, 1))
    systems = ["transformers", "transformers, denormal numbers flushed", "rnn-longctx", "products alone"]
    assert [row["system"] for row in rows] == systems * 2 and {row["rule"] for row in rows} == {"gated-deltanet", "kda"}
    assert all(row["seconds"] > 0 for row in rows)
    assert all(row["error"] < 1e-4 for row in rows if row["system"] == "rnn-longctx")
