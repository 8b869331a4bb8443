"""The gated MLP in one pass between its products, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from rnn_longctx.models.block import MLP
from rnn_longctx.models.kernels import choose
from rnn_longctx.recurrence import triton

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.models.kernels import swiglu


@pytest.fixture(autouse=True)
def fused_layers(monkeypatch):
    monkeypatch.setattr(choose, "FUSED_LAYERS", True)


DEVICE = "cpu" if triton.interpreted() else "cuda"


@pytest.mark.parametrize(("rows", "width"), [((2, 7), 45), ((1, 1), 1), ((9,), 300)])
def test_swiglu(rows, width):
    gate_up = 5 * torch.randn(*rows, 2 * width, device=DEVICE)
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(swiglu.swiglu(gate_up).double(), F.silu(gate) * up, rtol=1e-5, atol=1e-6)


def test_an_mlp_with_and_without_it(monkeypatch):
    """Without gradients; a gradient goes by PyTorch's way."""
    mlp, u = MLP(10, 27).to(DEVICE), torch.randn(2, 7, 10, device=DEVICE)
    calls = []
    monkeypatch.setattr(choose, "fits", lambda x: True)
    monkeypatch.setattr(swiglu, "swiglu", lambda t, make=swiglu.swiglu: calls.append(1) or make(t))
    expected = mlp(u)
    assert expected.requires_grad and not calls
    with torch.no_grad():
        torch.testing.assert_close(mlp(u), expected)
    assert calls


@pytest.mark.gpu
@torch.no_grad()
def test_an_mlp_in_bf16(monkeypatch):
    mlp, u = MLP(512, 1408).cuda().bfloat16(), torch.randn(1, 3000, 512, device="cuda", dtype=torch.bfloat16)
    exact, far = MLP(512, 1408).cuda().double(), []
    exact.load_state_dict(mlp.state_dict())
    expected = exact(u.double())
    for fused in (True, False):
        monkeypatch.setattr(choose, "fuses", lambda x, fused=fused: fused)
        far.append(float((mlp(u).double() - expected).norm() / expected.norm()))
    assert far[0] < 1.1 * far[1] and far[1] < 0.01, far
