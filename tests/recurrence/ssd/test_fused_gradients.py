"""Gradients of the Triton scan against those of the float64 definition; see test_fused.py."""

import math

import pytest
import torch

pytest.importorskip("triton")

from streams import DEVICE, POLICIES, H, N, P, documents, error, inputs, scan

from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd import fused, ops

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.recurrence.ssd.kernels import launch_grads

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize(("name", "decay"), [
    ("plain", 0.5), ("plain", 40.0), ("scaled, filtered", 40.0), ("cap every 16", 0.5), ("cap every token", 40.0),
    *(pytest.param(*case, marks=pytest.mark.slow)  # a kind's other decay
      for case in (("scaled, filtered", 0.5), ("cap every 16", 40.0), ("cap every token", 0.5))),
])  # fmt: skip
def test_gradients(name, decay):
    compare_gradients(name, decay)


@pytest.mark.parametrize(("name", "decay"), [
    ("plain", 40.0), ("scaled, filtered", 0.5),
    pytest.param("plain", 0.5, marks=pytest.mark.slow), pytest.param("scaled, filtered", 40.0, marks=pytest.mark.slow),
])  # fmt: skip
def test_gradients_of_documents(name, decay):  # with a cap they are PyTorch's
    compare_gradients(name, decay, reset=documents(75))


@pytest.mark.parametrize("decay", [0.5, pytest.param(40.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["plain", "growing", "reset", "two caps"])
def test_gradients_of_other_kinds(name, decay, monkeypatch):
    """A slab a segment, and D a channel."""
    monkeypatch.setattr(launch_grads, "SLAB", 1)
    compare_gradients(name, decay, D=torch.randn(H, P, device=DEVICE))


def test_gradients_with_padding():
    mask = torch.ones(2, 75, dtype=torch.bool)
    mask[1, :21] = False
    compare_gradients("plain", 0.5, mask=mask.to(DEVICE), position=0)


def compare_gradients(name, decay, reset=None, mask=None, D=None, position=5):
    """To every input and to the initial state, through outputs and the final state. A's and the bias's are sums of
    terms of both signs, far larger than what is left of them where heads forget at once: PyTorch's own rounding says
    what float32 can give. (Two rows where rows differ: they share A, the bias and D.)"""
    length, rows = 75, 1 if reset is None and mask is None else 2
    x, more = inputs(length, rows, decay)
    leaves = [*x.values(), more["dt_bias"], more["D"] if D is None else D, torch.randn(rows, H, P, N, device=DEVICE)]
    y_weight, state_weight = torch.randn(rows, length, H, P, device=DEVICE), torch.randn(rows, H, P, N, device=DEVICE)
    grads = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        own = [t.detach().to(dtype).requires_grad_() for t in leaves]
        log_decay = torch.zeros(rows, H, dtype=torch.float64, device=DEVICE)
        carry = ScanCarry(own[7], torch.full((rows,), position), log_decay)
        y, after = scan(
            *own[:5], dt_bias=own[5], D=own[6], dt_limit=(0.01, 2.0), carry=carry, policy=POLICIES[name],
            reset=reset, mask=mask, backend=backend,
        )  # fmt: skip
        loss = (y * y_weight.to(dtype)).sum() + (after.state * state_weight.to(dtype)).sum()
        grads.append(torch.autograd.grad(loss, own))
    names = ["x", "dt", "A", "B", "C", "dt_bias", "D", "initial state"]
    for what, ours, pytorchs, expected in zip(names, *grads):
        assert error(ours, expected) < max(1e-5, 10 * error(pytorchs, expected)), what


def test_gradients_of_rounded_operands():
    """Between the tokens of a chunk most of a forgetting head's gradient cancels, to what both sides were rounded to.
    float16 stands in for bfloat16, which the interpreter lacks."""
    dtype = torch.float16 if DEVICE == "cpu" else torch.bfloat16
    x, _ = inputs(128, 1)
    x["A"] = torch.full_like(x["A"], -10.0)
    x["dt"] = 0.05 + 0.1 * torch.rand_like(x["dt"])
    x |= {k: x[k].to(dtype).float() for k in ("x", "B", "C")}
    weight = torch.randn_like(x["x"]).to(dtype).float()
    table, start = fused.gate_table(ScanPolicy(), H, torch.device(DEVICE)), torch.zeros(1, H, P, N, device=DEVICE)

    def kernels(x, dt, A, B, C):
        x, B, C = (t.to(dtype) for t in (x, B, C))
        y, *_ = ops.scan(
            x, dt, A, B, C, None, None, start, table, None, None, None, 0.0, math.inf, False, 0, [], 0
        )  # fmt: skip
        return y

    def definition(x, dt, A, B, C):
        return scan(x, dt, A, B, C, dt_softplus=False, backend="torch")[0]

    found = []
    for run, wide in ((kernels, torch.float32), (definition, torch.float64)):
        leaves = [t.to(wide).detach().requires_grad_() for t in x.values()]
        found.append(torch.autograd.grad((run(*leaves).to(wide) * weight.to(wide)).sum(), leaves))
    rounding = 1 if dtype == torch.float16 else 8
    for name, ours, expected in zip(x, *found):
        assert error(ours, expected) < rounding * (3.4e-4 if name == "dt" else 1.5e-3), name
