"""fla's kernels as a backend: what they refuse anywhere; against the definition on a GPU (pytest -m gpu)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Call, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.delta import DELTA, fla, reference
from rnn_longctx.recurrence.fla import missing
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.observe import Looks
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.statistics import Statistics


@pytest.fixture(autouse=True)
def _one_configuration(monkeypatch):
    """Tuning fla's kernels takes minutes; what they compute does not hang on it."""
    if not missing():
        from triton.runtime.autotuner import Autotuner

        monkeypatch.setattr(Autotuner, "prune_configs", lambda self, _: self.configs[:1])


CALL = Call(torch.device("cuda"), torch.bfloat16, True, 64, 64, stepped=False)
LENGTH, H, G, P, N = 300, 4, 2, 64, 32
POLICIES = {
    "plain": PLAIN,
    "gates": ScanPolicy(add=-0.01, gain=0.7, erase=0.9),
    "caps": ScanPolicy(caps=(Cap((3.0, 4.0, 5.0, 900.0), 64),)),
    "reset": ScanPolicy(reset=100),
}


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr("rnn_longctx.recurrence.fla.triton.interpreted", lambda: False)
    general, wide = replace(CALL, simple=False), replace(CALL, headdim=256, d_state=256)
    assert fla.refuses(PLAIN, CALL) is None
    assert fla.refuses(ScanPolicy(caps=(Cap(1.0, 128),), gain=0.7, erase=0.5), CALL) is None
    for policy, call, reason in (
        (ScanPolicy(caps=(Cap(1.0, 1),)), CALL, "every 64 tokens"),
        (ScanPolicy(caps=(Cap(1.0, 64), Cap(1.0, 128))), CALL, "one cap"),
        (ScanPolicy(erase=0.0), CALL, "above nothing"),
        (ScanPolicy(erase=(1.0, 0.0)), CALL, "above nothing"),
        (ScanPolicy(least_erase=0.1), CALL, "above nothing"),
        (PLAIN, replace(CALL, device=torch.device("cpu")), "runs on a GPU"),
        (PLAIN, replace(CALL, dtype=torch.float32), "not float32"),
        (PLAIN, replace(CALL, d_state=512), "256 channels"),
        (ScanPolicy(caps=(Cap(1.0, 64),)), general, "general"),
        (ScanPolicy(caps=(Cap(1.0, 64),)), wide, "128 x 256"),
    ):
        assert reason in fla.refuses(policy, call)


@pytest.mark.skipif(not missing(), reason="fla is installed")
def test_a_missing_library_is_said():
    inputs, gates = stream(False, torch.float32, "cpu")
    with pytest.raises(InputError, match=r"backend 'fla': needs (flash-linear-attention 0\.6|a CUDA device|Triton)"):
        DELTA.scan(inputs, gates, backend="fla")


def stream(per_channel, dtype, device, general=False, batch=2, length=LENGTH):
    torch.manual_seed(3)
    key = F.normalize(torch.randn(batch, length, G, N), dim=-1)
    query = F.normalize(torch.randn(batch, length, G, N), dim=-1)
    decay = -0.1 * torch.rand(batch, length, H, *([N] if per_channel else []))
    scale = torch.rand(batch, length, H)
    x = torch.randn(batch, length, H, P)
    # rounded first, so that the definition reads the same numbers
    x, key, query = (t.to(dtype).to(device) for t in (x, key, query))
    decay, scale = decay.to(device), scale.to(device)
    if not general:
        return ScanInputs(x, key, query), DeltaGates(decay, scale)
    along = (key * torch.rand(batch, length, G, N).to(key)).to(dtype)
    ones = torch.ones_like(scale)
    return ScanInputs(x, key, query), DeltaGates(decay, scale, ones, key, along, decay_first=False)


def on_cpu(inputs, gates):
    moved = [None if t is None else t.cpu() for t in gates.tensors]
    return ScanInputs(inputs.x.cpu(), inputs.B.cpu(), inputs.C.cpu()), gates.from_tensors(*moved)


def error(ours, theirs):
    return float((ours.cpu().double() - theirs).norm() / theirs.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_definition(policy, per_channel, general):
    if missing():
        pytest.skip(missing())
    policy = POLICIES[policy]
    inputs, gates = stream(per_channel, torch.bfloat16, "cuda", general)
    reset = torch.zeros(2, LENGTH, dtype=torch.bool)
    if not policy.caps:
        reset[0, 130] = reset[1, 7] = reset[1, 8] = True
    elif general:
        pytest.skip("refused")
    span = Span(reset=reset.cuda())
    expected, state, total = reference.scan(*on_cpu(inputs, gates), Span(reset=reset), policy=policy)
    with torch.no_grad():
        y, carry = DELTA.scan(inputs, gates, span, policy=policy, backend="fla")
    assert error(y, expected) < 0.01 and error(carry.state, state) < 0.01
    torch.testing.assert_close(carry.log_decay.cpu(), total, rtol=1e-5, atol=1e-5)
    outputs, carry = [], None
    for t, u in ((0, 1), (1, 70), (70, 150), (150, LENGTH)):
        part = Span(reset=span.reset[:, t:u])
        with torch.no_grad():
            y, carry = DELTA.scan(
                inputs.tokens(t, u), gates.tokens(t, u), part, policy=policy, carry=carry, backend="fla"
            )
        outputs.append(y)
    assert error(torch.cat(outputs, 1), expected) < 0.01 and error(carry.state, state) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("every", [None, 128, 192])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_two_levels(per_channel, every, monkeypatch):
    if missing():
        pytest.skip(missing())
    from rnn_longctx.recurrence.delta.kernels import blocks

    read = blocks.states_by_blocks
    calls = []
    monkeypatch.setattr(blocks, "states_by_blocks", lambda *args: calls.append(args[5]) or read(*args))
    monkeypatch.setattr(fla, "BLOCK", 2)
    inputs, gates = stream(per_channel, torch.bfloat16, "cuda", length=2000)
    policy = PLAIN if every is None else ScanPolicy(caps=(Cap((3.0, 4.0, 5.0, 900.0), every),))
    expected, state, _ = reference.scan(*on_cpu(inputs, gates), policy=policy)
    outputs, carry = [], None
    for t, u in ((0, 900), (900, 2000)):  # the second call begins within a chunk
        with torch.no_grad():
            y, carry = DELTA.scan(inputs.tokens(t, u), gates.tokens(t, u), policy=policy, carry=carry, backend="fla")
        outputs.append(y)
    assert len(calls) == (1 if every is None else 2)
    assert error(torch.cat(outputs, 1), expected) < 0.01 and error(carry.state, state) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_gradients(per_channel, general):
    if missing():
        pytest.skip(missing())
    inputs, gates = stream(per_channel, torch.bfloat16, "cuda", general, batch=1)
    weight = torch.randn(1, LENGTH, H, P)
    grads = []
    for device, backend in (("cuda", "fla"), ("cpu", "torch")):
        i, g = (inputs, gates) if device == "cuda" else on_cpu(inputs, gates)
        wide = (lambda t: t) if device == "cuda" else lambda t: t.double()
        leaves = {n: wide(t.detach()).requires_grad_() for n, t in vars(i).items() if t is not None}
        moved = [None if t is None else wide(t.detach()).requires_grad_() for t in g.tensors]
        y, carry = DELTA.scan(ScanInputs(**leaves), g.from_tensors(*moved), backend=backend)
        loss = (y.double() * weight.to(device)).sum() + carry.state.double().square().sum()
        wanted = [*leaves.values(), *(t for t in moved if t is not None)]
        grads.append(torch.autograd.grad(loss, wanted))
    for ours, theirs in zip(*grads):
        assert error(ours, theirs.double()) < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_statistics_from_inside(per_channel):
    if missing():
        pytest.skip(missing())

    class Seen:
        every, whole = 64, False

        def __init__(self):
            self.looks = []

        def __call__(self, statistics):
            self.looks.append(statistics)

    inputs, gates = stream(per_channel, torch.bfloat16, "cuda")
    ours, theirs = Seen(), Seen()
    carry = None
    for t, u in ((0, 50), (50, LENGTH)):  # the second call begins between two looks
        with torch.no_grad():
            _, carry = DELTA.scan(inputs.tokens(t, u), gates.tokens(t, u), carry=carry, backend="fla", observer=ours)
    DELTA.scan(*on_cpu(inputs, gates), backend="torch", observer=theirs)
    (expected,) = theirs.looks
    for name, bound in (("square", 0.01), ("peak", 0.02), ("log_decay", 1e-6)):
        seen = torch.cat([getattr(look, name) for look in ours.looks], -1)
        assert error(seen, getattr(expected, name).double()) < bound, name
    assert torch.cat([look.position for look in ours.looks]).tolist() == expected.position.tolist()


@pytest.mark.parametrize("length", [30, 64, 200])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_the_total_of_chunk_sums(per_channel, length):
    log_decay = -torch.rand(2, length, H, *([N] if per_channel else []))
    chunks = [chunk.cumsum(1) for chunk in log_decay.split(fla.CHUNK, 1)]
    before = -torch.rand(2, *log_decay.shape[2:], dtype=torch.float64)
    total = fla._total(before, torch.cat(chunks, 1) * fla.LOG2_E)
    torch.testing.assert_close(total, before + log_decay.double().sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length, every", [(256, 128), (300, 64), (320, 64), (128, 128)])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_statistics_of_the_states_between_chunks(per_channel, length, every):
    """Those of the states that the kernels leave before each chunk, and of the last one, by the definition of each."""
    inputs, gates = stream(per_channel, torch.float32, "cpu", length=length)
    chunks = [chunk.cumsum(1) for chunk in gates.log_decay.split(fla.CHUNK, 1)]
    h, end = torch.randn(2, len(chunks), H, P, N), torch.randn(2, H, P, N)
    before = -torch.rand(2, *gates.log_decay.shape[2:], dtype=torch.float64)
    carry = ScanCarry(torch.zeros(2, H, P, N), torch.tensor([every, every]), before)
    looks = Looks(every)
    fla._look(Reading(inputs, gates, PLAIN, carry, looks=looks), h, end, torch.cat(chunks, 1) * fla.LOG2_E)
    (seen,) = looks.seen
    after = torch.cat([h, end[:, None]], 1) if length % fla.CHUNK == 0 else h
    expected = []
    for t in range(every, length + 1, every):
        log_decay = before + gates.log_decay[:, :t].double().sum(1)
        expected.append(Statistics.of(after[:, t // fla.CHUNK], torch.tensor(every + t), log_decay))
    whole = Statistics.join(expected)
    for name in ("position", "total", "square", "peak", "log_decay"):
        torch.testing.assert_close(getattr(seen, name), getattr(whole, name), rtol=1e-5, atol=1e-4)
