"""The definitions against flash-linear-attention's own, its `naive.py` of each operator, where fla is installed: token
after token, from a state and on. A GPU is not needed. They compute in float32 whatever they are given, hence 1e-6."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.recurrence.delta import reference as delta
from rnn_longctx.recurrence.gates import DeltaGates, Gates, ScanInputs
from rnn_longctx.recurrence.ssd import reference as ssd

pytest.importorskip("fla")
pytest.importorskip("einops")

CLOSE = 1e-6
B, T, H, P, N = 2, 90, 3, 5, 8
ONE = torch.ones(B, T, H, dtype=torch.float64)


def naive(operator: str, name: str):
    return getattr(import_module(f"fla.ops.{operator}.naive"), name)


def draw(*shape: int) -> torch.Tensor:
    """Numbers that float32 holds exactly."""
    return torch.rand(*shape).double()


def unit() -> torch.Tensor:
    return F.normalize(torch.randn(B, T, H, N), dim=-1).double()


def gated_delta_rule(q, k, v, start):
    g, beta = -draw(B, T, H), 2 * draw(B, T, H)
    run = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    return DeltaGates(g, beta), v, run(q, k, v, beta, g, initial_state=start, output_final_state=True)


def kda(q, k, v, start):
    g, beta = -draw(B, T, H, N), 2 * draw(B, T, H)
    run = naive("kda", "naive_recurrent_kda")
    return DeltaGates(g, beta), v, run(q, k, v, g, beta, initial_state=start, output_final_state=True)


def delta_rule(q, k, v, start):
    beta = 2 * draw(B, T, H)
    heads_first = (t.transpose(1, 2) for t in (q, k, v, beta))
    y, state = naive("delta_rule", "delta_rule_recurrence")(*heads_first, initial_state=start.float())
    return DeltaGates(0 * ONE, beta), v, (y.transpose(1, 2), state)


def gdn2(q, k, v, start):
    g, erase, write = -draw(B, T, H, N), draw(B, T, H, N), draw(B, T, H, P)
    run = naive("gdn2", "naive_recurrent_gdn2")
    gates = DeltaGates(g, ONE, ONE, read=erase * k, along=k)
    return gates, write * v, run(q, k, v, g, erase, write, initial_state=start, output_final_state=True)


def general(q, k, v, start):  # RWKV-7's is one of these
    g, read, along = -draw(B, T, H, N), unit(), 0.5 * unit()
    heads_first = (t.transpose(1, 2).float() for t in (q, k, v, read, along, g))
    y, state = naive("generalized_delta_rule.dplr", "dplr_recurrence")(*heads_first, initial_state=start.float())
    return DeltaGates(g, ONE, -ONE, read, along, decay_first=False), v, (y.transpose(1, 2), state)


def gla(q, k, v, start):
    g = -draw(B, T, H, N)
    theirs = naive("gla", "naive_recurrent_gla")(q, k, v, g, initial_state=start, output_final_state=True)
    return Gates(g, ONE), v, theirs


def simple_gla(q, k, v, start):
    g = -draw(B, T, H)
    theirs = naive("simple_gla", "naive_recurrent_simple_gla")(q, k, v, g, initial_state=start.float())
    return Gates(g, ONE), v, theirs


@pytest.mark.parametrize("rule", [gated_delta_rule, kda, delta_rule, gdn2, general, gla, simple_gla])
def test_the_definition_is_theirs(rule):
    q, k, v = unit(), unit(), torch.randn(B, T, H, P).double()
    start = torch.randn(B, H, N, P).double()
    gates, written, (expected, expected_state) = rule(q, k, v, start)
    scan = delta.scan if isinstance(gates, DeltaGates) else ssd.scan
    inputs = ScanInputs(written, k, q / N**0.5)
    y, state, _ = scan(inputs, gates, state=start.mT, position=torch.ones(B, dtype=torch.long))
    for ours, theirs in ((y, expected), (state, expected_state.mT)):
        assert ours.shape == theirs.shape and float(ours.abs().max()) > 0.1
        assert float((ours - theirs).abs().max()) <= CLOSE * (1 + float(ours.abs().max()))
