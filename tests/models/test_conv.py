"""The causal convolution on a CPU, by the library and as a sum over taps, against its definition."""

import pytest
import torch

from rnn_longctx.models.conv import linear_conv


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("length", [1, 5, 127, 300])
def test_equals_definition(length, biased):
    channels, taps = 6, 4
    x, before = torch.randn(2, length, channels), torch.randn(2, channels, taps - 1)
    weight, bias = torch.randn(channels, 1, taps), torch.randn(channels) if biased else None
    whole = torch.cat([before.mT, x], 1).double()
    expected = torch.zeros(2, length, channels, dtype=torch.float64)
    for t in range(length):
        for k in range(taps):
            expected[:, t] += whole[:, t + k] * weight[:, 0, k]
    if bias is not None:
        expected += bias
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, after = linear_conv(x, weight, bias, before, None)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(after, whole[:, length:].mT.float())
