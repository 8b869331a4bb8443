"""The kernels beside the scan against their PyTorch forms, which test_mamba2.py and the parity tests hold."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from rnn_longctx.models import layers
from rnn_longctx.ssd import fused

if fused.missing():
    pytest.skip(fused.missing(), allow_module_level=True)

from rnn_longctx.models import layer_kernels, matvec

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


@pytest.mark.parametrize(
    ("rows", "dim", "outs", "groups"), [(1, 45, 77, 1), (3, 45, 5, 3), (5, 600, 33, 1), (1, 64, 64, 2)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_norm_and_projection(rows, dim, outs, groups, bias, added):
    x, more = torch.randn(2, rows, dim, device=DEVICE).unbind(0)
    linear = torch.nn.Linear(dim, outs, bias, device=DEVICE)
    scale = torch.randn(dim, device=DEVICE)
    y, total = matvec.norm_linear(x, scale, linear.weight, linear.bias, 1e-5, groups, more if added else None)
    expected_total = x + more if added else x
    v = expected_total.unflatten(-1, (groups, -1)).double()
    normed = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * scale
    torch.testing.assert_close(y.double(), linear.double()(normed), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected_total)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "groups"), [(1024, 1), (2048, 2), (1000, 1)])
def test_norm_and_projection_in_half(dim, groups, dtype):
    """As two launches round: the norm to the weight's type, the sum and the product from float32."""
    x, more = torch.randn(2, dim, device=DEVICE), torch.randn(2, dim, device=DEVICE, dtype=dtype)
    norm = layers.RMSNorm(dim, 1e-5, groups).to(DEVICE, dtype)
    linear = torch.nn.Linear(dim, 333, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        normed, total = norm.add(x, more, in_fp32=True)
        expected = linear.double()(normed.double())
        linear = linear.to(dtype)
        y, ours = matvec.norm_linear(x, norm.weight, linear.weight, linear.bias, 1e-5, groups, more)
    assert torch.equal(ours, total)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


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
