"""Rotary positions in one kernel against PyTorch's form, which tests/models hold to complex numbers."""

import random

import pytest
import torch

pytest.importorskip("triton")

from rnn_longctx.models import rotary
from rnn_longctx.recurrence import triton

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

DEVICE = "cpu" if triton.interpreted() else "cuda"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [6, 16, 200])
def test_turned(width, rows, monkeypatch):
    """Of a slice of a projection, at places of one row for all or of each its own, and far out; with the gradient."""
    heads, length = random.randrange(1, 4), random.randrange(1, 30)
    wide = torch.randn(rows, length, 3 * heads * width, device=DEVICE, requires_grad=True)
    x = wide.unflatten(-1, (3, heads, width))[:, :, 1]
    into = torch.randn(rows, length, heads, width, device=DEVICE)
    for places in (torch.arange(length), 1_000_000 + torch.arange(rows)[:, None] * 7 + torch.arange(length)):
        monkeypatch.setattr(rotary, "_fused", lambda x: False)
        expected = rotary.turned(x.double(), places)
        (gradient,) = torch.autograd.grad((expected * into.double()).sum(), wide, retain_graph=True)
        monkeypatch.setattr(rotary, "_fused", lambda x: True)
        y = rotary.turned(x, places)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(torch.autograd.grad((y * into).sum(), wide)[0], gradient, rtol=0, atol=5e-6)
        half = rotary.turned(x.bfloat16(), places)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), expected, rtol=0.01, atol=0.03)


@pytest.mark.gpu
def test_turned_on_a_gpu(monkeypatch):
    x, places = torch.randn(2, 3000, 4, 64, device="cuda", dtype=torch.bfloat16), torch.arange(3000)
    monkeypatch.setattr(rotary, "_fused", lambda x: x.is_cuda)
    torch.testing.assert_close(rotary.turned(x, places).cpu(), rotary.turned(x.cpu(), places), rtol=0.01, atol=0.03)
