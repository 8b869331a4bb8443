"""The convolution and the norm on a CPU, with gradients and without: other code, the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.models import conv
from rnn_longctx.models.norm import RMSNorm

CHANNELS = 48


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("length", [1, 7, 300])  # the last by the library, where no gradient is asked for
def test_the_convolution_is_that_of_the_definition(length: int, grad: bool, biased: bool, monkeypatch) -> None:
    monkeypatch.setattr(conv, "LIBRARY_NUMBERS", 2 * 100 * CHANNELS)
    layer = torch.nn.Conv1d(CHANNELS, CHANNELS, 4, groups=CHANNELS, bias=biased)
    wide = torch.randn(2, length, CHANNELS + 5)
    x, before = wide[..., 3:-2], torch.randn(2, CHANNELS, 3)
    copy, left = x.clone(), torch.cat([before, x.transpose(1, 2)], 2).double()
    bias = layer.bias.double() if layer.bias is not None else None
    expected = F.silu(F.conv1d(left, layer.weight.double(), bias, groups=CHANNELS)).transpose(1, 2)
    with torch.set_grad_enabled(grad):
        y, after = conv.causal_conv(x, layer, before, None)
        cut = length // 2
        first, between = conv.causal_conv(x[:, :cut], layer, before, None)
        second, last = conv.causal_conv(x[:, cut:], layer, between, None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.double(), left[..., length:]) and torch.equal(last, after)
    assert torch.equal(x, copy)


def test_the_library_convolves_many_numbers_without_gradients(monkeypatch) -> None:
    calls = []
    library = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **settings: calls.append(1) or library(*args, **settings))
    monkeypatch.setattr(conv, "LIBRARY_NUMBERS", 20 * CHANNELS)
    layer = torch.nn.Conv1d(CHANNELS, CHANNELS, 4, groups=CHANNELS)
    here = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    for length, grad, expected in ((40, True, False), (8, False, False), (40, False, here)):
        calls.clear()
        with torch.set_grad_enabled(grad):
            conv.causal_conv(torch.randn(1, length, CHANNELS), layer, None, None)
        assert bool(calls) == expected


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_is_that_of_the_definition(dtype: torch.dtype, groups: int, grad: bool, gated: bool) -> None:
    norm = RMSNorm(CHANNELS, 1e-5, groups).to(dtype)
    norm.weight.data.uniform_(0.5, 2)
    x, z = (torch.randn(2, 5, CHANNELS + 3, dtype=dtype)[..., :CHANNELS] for _ in range(2))
    x[0, 0] = 0  # (its norm is 0)
    copies = x.clone(), z.clone()
    with torch.set_grad_enabled(grad):
        y = norm(x, z if gated else None)
    wide = x.double() * F.silu(z.double()) if gated else x.double()
    parts = wide.unflatten(-1, (groups, -1))
    expected = (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * norm.weight.double()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(x, copies[0]) and torch.equal(z, copies[1])
