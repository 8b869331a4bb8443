"""The kernel that caps states between chunks, against the definition: in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from delta_chunks import chunk_parts
from streams import DEVICE

from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.delta import reference
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.policy import Cap, ScanPolicy

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.recurrence.delta.kernels import states

B, T, H, G, P, N = 2, 150, 2, 1, 5, 6
C = states.CHUNK


@pytest.mark.parametrize("every", [64, 128])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_states_between_chunks(per_channel, every):
    key = torch.nn.functional.normalize(torch.randn(B, T, G, N, dtype=torch.float64), dim=-1)
    inputs = ScanInputs(torch.randn(B, T, H, P, dtype=torch.float64), key, torch.randn_like(key))
    decay = -0.05 * torch.rand(B, T, H, *([N] if per_channel else []), dtype=torch.float64)
    gates = DeltaGates(decay, torch.rand(B, T, H, dtype=torch.float64))
    start, caps = torch.randn(B, H, P, N, dtype=torch.float64), (1.5, 4.0)
    policy = ScanPolicy(caps=(Cap(caps, every),))
    k, w, u, g = (t.float().contiguous().to(DEVICE) for t in chunk_parts(inputs, gates, C))
    limits = torch.tensor(caps, device=DEVICE)
    h, _, end, factors = states.capped_states(k, w, u, g, start.float().to(DEVICE), limits, every // C - 1, every // C)
    position = torch.full((B,), every)  # the state is not a row's first, and stands where a cap was
    _, final, _ = reference.scan(inputs, gates, policy=policy, state=start, position=position)
    torch.testing.assert_close(end.cpu().double(), final, rtol=1e-4, atol=1e-4)
    for i in range(1, h.shape[1]):
        _, before, _ = reference.scan(
            inputs.tokens(0, i * C), gates.tokens(0, i * C), policy=policy, state=start, position=position
        )
        torch.testing.assert_close(h[:, i].cpu().double(), before, rtol=1e-4, atol=1e-4)
    assert bool((factors[:, every // C - 1] < 1).any()) and bool((factors[:, 2] == 1).all())
