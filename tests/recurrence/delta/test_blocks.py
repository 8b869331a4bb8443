"""States in two levels, blocks and chunks, against the definition: in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from delta_chunks import chunk_parts
from streams import DEVICE

from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.delta import reference
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.recurrence.delta.kernels import blocks, states

B, H, G, P, N = 2, 2, 1, 5, 6
C = states.CHUNK
CLOSE = {"rtol": 1e-4, "atol": 1e-4} if DEVICE == "cpu" else {"rtol": 5e-3, "atol": 5e-3}  # tf32 in a GPU's walks


def draw(length, per_channel):
    key = torch.nn.functional.normalize(torch.randn(B, length, G, N, dtype=torch.float64), dim=-1)
    inputs = ScanInputs(torch.randn(B, length, H, P, dtype=torch.float64), key, torch.randn_like(key))
    decay = -0.05 * torch.rand(B, length, H, *([N] if per_channel else []), dtype=torch.float64)
    gates = DeltaGates(decay, torch.rand(B, length, H, dtype=torch.float64))
    return inputs, gates, torch.randn(B, H, P, N, dtype=torch.float64)


def on_device(inputs, gates):
    return tuple(t.float().contiguous().to(DEVICE) for t in chunk_parts(inputs, gates, C))


@pytest.mark.parametrize(("length", "first"), [(100, 2), (5 * C, 1), (5 * C + 10, 2)])  # first: chunks
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_the_definition_and_one_walk(per_channel, capped, length, first):
    every = 2
    inputs, gates, start = draw(length, per_channel)
    caps = torch.tensor([0.8, 4.0])
    policy = ScanPolicy(caps=(Cap(tuple(caps.tolist()), every * C),)) if capped else PLAIN
    position = torch.full((B,), 10 * every * C - first * C)
    arguments = *on_device(inputs, gates), start.float().to(DEVICE), first
    ours = blocks.states_by_blocks(*arguments, every, caps.to(DEVICE) if capped else None)
    _, final, _ = reference.scan(inputs, gates, policy=policy, state=start, position=position)
    torch.testing.assert_close(ours[2].cpu().double(), final, **CLOSE)
    limits = caps if capped else torch.full((H,), torch.inf)
    one = states.capped_states(*arguments[:-1], limits.to(DEVICE), first - 1, every)
    for name, a, b in zip(("h", "v'", "end", "factors"), ours, one):
        if a is not None:
            torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    if ours[3] is not None and length >= first * C:
        assert bool((ours[3][:, first - 1] < 1).any())


def test_what_is_kept_passes_the_chain():
    """Nothing is written, erased or forgotten for 10 blocks: of 24 bits a state keeps 16, not the 10 of tf32."""
    inputs, gates, start = draw(10 * C, False)
    k, w, u, g = (torch.zeros_like(t) for t in on_device(inputs, gates))
    _, _, end, _ = blocks.states_by_blocks(k, w, u, g, start.float().to(DEVICE), 1, 1)
    torch.testing.assert_close(end.cpu().double(), start, rtol=2**-14, atol=1e-7)


def test_where_it_pays():
    few, many = (torch.empty(1, 8 * 16 * C, heads, 128, device="meta") for heads in (8, 64))
    assert blocks.pays(few, 16) and not blocks.pays(many, 16) and not blocks.pays(few[:, :-1], 16)
