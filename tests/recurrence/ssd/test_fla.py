"""fla's kernels for a decay a channel as a backend: what they refuse anywhere; against the definition on a GPU."""

from dataclasses import replace

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Call
from rnn_longctx.recurrence.fla import missing
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd import fla
from rnn_longctx.recurrence.ssd.scan import SSD

CALL = Call(torch.device("cuda"), torch.bfloat16, True, 64, 64, stepped=False)
LENGTH, H, G, P, N = 300, 4, 2, 64, 32
POLICIES = {"plain": PLAIN, "gates": ScanPolicy(mul=0.5, add=-0.01, gain=0.7), "reset": ScanPolicy(reset=100)}


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr("rnn_longctx.recurrence.fla.triton.interpreted", lambda: False)
    for policy in POLICIES.values():
        assert fla.refuses(policy, CALL) is None
    for policy, call, reason in (
        (ScanPolicy(caps=(Cap(1.0, 64),)), CALL, "caps no states"),
        (ScanPolicy(window=100), CALL, "no window"),
        (PLAIN, replace(CALL, per_channel=False), "one decay a channel"),
        (PLAIN, replace(CALL, headdim=1), "not 1 x 64"),
        (PLAIN, replace(CALL, device=torch.device("cpu")), "runs on a GPU"),
        (PLAIN, replace(CALL, dtype=torch.float32), "not float32"),
    ):
        assert reason in fla.refuses(policy, call)


@pytest.mark.skipif(not missing(), reason="fla is installed")
def test_a_missing_library_is_said():
    with pytest.raises(InputError, match=r"backend 'fla': needs (flash-linear-attention 0\.6|a CUDA device|Triton)"):
        SSD.scan(*stream(torch.float32, "cpu"), backend="fla")


def stream(dtype, device, batch=2, hardest=1.0):
    x, key, query = (torch.randn(batch, LENGTH, *shape) for shape in ((H, P), (G, N), (G, N)))
    decay = -torch.rand(batch, LENGTH, H, N) * hardest
    # rounded first, so that the definition reads the same numbers
    x, key, query = (t.to(dtype).to(device) for t in (x, key, query))
    scale = torch.rand(batch, LENGTH, H)
    return ScanInputs(x, key, query, torch.ones(H, device=device)), Gates(decay.to(device), scale.to(device))


def on_cpu(inputs, gates):
    return ScanInputs(*(t.cpu() for t in vars(inputs).values())), Gates(*(t.cpu() for t in gates.tensors))


def error(ours, theirs):
    return float((ours.cpu().double() - theirs).norm() / theirs.norm())


@pytest.fixture
def kernels(monkeypatch):
    """Tuning fla's kernels takes minutes; what they compute does not hang on it."""
    if missing():
        pytest.skip(missing())
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, _: self.configs[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("hardest", [0.1, 30.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_definition(policy, hardest, kernels):
    policy = POLICIES[policy]
    inputs, gates = stream(torch.bfloat16, "cuda", hardest=hardest)
    reset = torch.zeros(2, LENGTH, dtype=torch.bool)
    reset[0, 130] = reset[1, 7] = reset[1, 8] = True
    expected, carry = SSD.reference(*on_cpu(inputs, gates), Span(reset=reset), policy, None)
    outputs, after = [], None
    for t, u in ((0, 1), (1, 70), (70, LENGTH)):
        span = Span(reset=reset[:, t:u].cuda())
        with torch.no_grad():
            y, after = SSD.scan(
                inputs.tokens(t, u), gates.tokens(t, u), span, policy=policy, carry=after, backend="fla"
            )
        outputs.append(y)
    assert error(torch.cat(outputs, 1), expected) < 0.01 and error(after.state, carry.state) < 0.01
    torch.testing.assert_close(after.log_decay.cpu(), carry.log_decay, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gradients(kernels):
    inputs, gates = stream(torch.bfloat16, "cuda", batch=1)
    weight = torch.randn(1, LENGTH, H, P)
    grads = []
    for device, backend in (("cuda", "fla"), ("cpu", "torch")):
        i, g = (inputs, gates) if device == "cuda" else on_cpu(inputs, gates)
        leaves = [*vars(i).values(), *g.tensors]
        leaves = [(t if device == "cuda" else t.double()).detach().requires_grad_() for t in leaves]
        y, carry = SSD.scan(ScanInputs(*leaves[:4]), Gates(*leaves[4:]), backend=backend)
        loss = (y.double() * weight.to(device)).sum() + carry.state.double().square().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, theirs in zip(*grads):
        assert error(ours, theirs.double()) < 0.03
