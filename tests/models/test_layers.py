"""The kernels beside the scan against their PyTorch forms, which test_mamba2.py and the parity tests hold."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from rnn_longctx.models import layers
from rnn_longctx.ssd import fused

if fused.missing():
    pytest.skip(fused.missing(), allow_module_level=True)

from rnn_longctx.models import layer_kernels

DEVICE = "cpu" if fused.interpreted() else "cuda"


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(taps, bias):
    conv = torch.nn.Conv1d(20, 20, taps, groups=20, bias=bias, device=DEVICE)
    wide = torch.randn(2, 75, 33, device=DEVICE)
    x = wide[..., 5:25]  # a slice of a projection
    with torch.no_grad():
        expected, after = layers.causal_conv(x.cpu(), conv.cpu(), None, None)
        conv = conv.to(DEVICE)
        ys, before = [], None
        for part in x.split([1, 2, 40, 32], 1):
            y, before = layer_kernels.conv_silu(part, conv.weight[:, 0], conv.bias, before)
            ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1).cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(before.cpu(), after)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_norm(groups, gated, added):
    x, more = torch.randn(2, 2, 7, 45, device=DEVICE).unbind(0)
    gate = torch.randn(2, 7, 60, device=DEVICE)[..., 3:48] if gated else None
    weight = torch.randn(45, device=DEVICE)
    y, total = layer_kernels.norm(x, weight, 1e-5, groups, gate, more if added else None)
    expected_total = x + more if added else x
    v = (expected_total * F.silu(gate) if gated else expected_total).unflatten(-1, (groups, -1)).double()
    expected = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected_total)


@pytest.mark.gpu
def test_a_model_reads_alike_with_and_without_kernels():
    from rnn_longctx.models import Mamba2Config, Mamba2LM

    with torch.device("cuda"):
        model = Mamba2LM(Mamba2Config(d_model=64, n_layer=2, d_state=32, headdim=32)).eval()
    ids = torch.randint(256, (2, 777), device="cuda")
    with torch.no_grad():
        fast = torch.cat(list(model.stream(ids, segment=100)), 1)
    slow = torch.cat([h.detach() for h in model.stream(ids, segment=100)], 1)  # gradients on: PyTorch's forms
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
