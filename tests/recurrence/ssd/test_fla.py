"""fla's kernels for gated linear attention as a backend: what they refuse, and who reads instead; against the
definition in bfloat16 on a GPU (pytest -m gpu), and in float32 in Triton's interpreter where fla is installed."""

from dataclasses import replace

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import Backends, Call
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.fla import missing
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy, nested
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd import fla
from rnn_longctx.recurrence.ssd.scan import SSD

CALL = Call(torch.device("cuda"), torch.bfloat16, True, 64, 64, stepped=False)
ONE_A_HEAD = replace(CALL, per_channel=False)
LENGTH = 300
SIZES = 4, 2, 64, 32  # H, G, P, N
POLICIES = {"plain": PLAIN, "gates": ScanPolicy(mul=0.5, add=-0.01, gain=0.7), "reset": ScanPolicy(reset=100)}


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr("rnn_longctx.recurrence.fla.triton.interpreted", lambda: False)
    for policy in POLICIES.values():
        assert fla.refuses(policy, CALL) is None
        assert fla.refuses(policy, ONE_A_HEAD) is None
        assert fla.refuses(policy, replace(CALL, stepped=True)) is None
    for policy, call, reason in (
        (ScanPolicy(caps=(Cap(1.0, 64),)), CALL, "caps no states"),
        (ScanPolicy(window=100), CALL, "no window"),
        (PLAIN, replace(ONE_A_HEAD, stepped=True), "where gates are given"),
        (PLAIN, replace(CALL, headdim=1), "not 1 x 64"),
        (PLAIN, replace(ONE_A_HEAD, d_state=8), "not 64 x 8"),
        (PLAIN, replace(ONE_A_HEAD, headdim=65), "even number of channels, not 65 x 64"),
        (PLAIN, replace(ONE_A_HEAD, d_state=63), "even number of channels, not 64 x 63"),
        (PLAIN, replace(CALL, device=torch.device("cpu")), "runs on a GPU"),
        (PLAIN, replace(ONE_A_HEAD, dtype=torch.float32), "not float32"),
    ):
        assert reason in fla.refuses(policy, call)


def test_who_reads_what_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("rnn_longctx.recurrence.fla.triton.interpreted", lambda: False)
    monkeypatch.setattr("rnn_longctx.recurrence.ssd.fused.interpreted", lambda: False)
    backends = Backends()
    for name in ("triton", "fla", "torch"):
        backends.register(replace(SSD.backends.known[name], missing=lambda: None))
    start = ScanPolicy(start=nested(torch.zeros(1, 64, 64)))
    for policy, call, name in (
        (PLAIN, CALL, "fla"),
        (PLAIN, ONE_A_HEAD, "fla"),
        (start, ONE_A_HEAD, "fla"),
        (PLAIN, replace(ONE_A_HEAD, dtype=torch.float32), "torch"),
        (ScanPolicy(window=100), ONE_A_HEAD, "torch"),
        (PLAIN, replace(ONE_A_HEAD, stepped=True), "triton"),  # Mamba-2
        (start, replace(ONE_A_HEAD, stepped=True), "torch"),
    ):
        assert backends.choose(policy, None, call).name == name


@pytest.mark.skipif(not missing(), reason="fla is installed")
def test_a_missing_library_is_said():
    with pytest.raises(InputError, match=r"backend 'fla': needs (flash-linear-attention 0\.6|a CUDA device|Triton)"):
        SSD.scan(*stream(torch.float32, "cpu"), backend="fla")


def stream(dtype, device, per_channel=True, batch=2, length=LENGTH, sizes=SIZES, hardest=1.0):
    H, G, P, N = sizes
    x, key, query = (torch.randn(batch, length, *shape) for shape in ((H, P), (G, N), (G, N)))
    decay = -torch.rand(batch, length, H, *([N] if per_channel else [])) * hardest
    # rounded first, so that the definition reads the same numbers
    x, key, query = (t.to(dtype).to(device) for t in (x, key, query))
    scale = torch.rand(batch, length, H)
    return ScanInputs(x, key, query, torch.randn(H).to(device)), Gates(decay.to(device), scale.to(device))


def on_cpu(inputs, gates):
    return ScanInputs(*(t.cpu() for t in vars(inputs).values())), Gates(*(t.cpu() for t in gates.tensors))


def error(ours, theirs):
    return float((ours.cpu().double() - theirs).norm() / theirs.norm())


@pytest.fixture
def kernels(monkeypatch):
    """Tuning fla's kernels takes minutes; what they compute does not hang on it."""
    if missing():
        pytest.skip(missing())
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, _: self.configs[:1])


@pytest.fixture
def in_interpreter(kernels, monkeypatch):
    """A kernel's loop counts in numbers of Triton's, which have a `to`, and in the interpreter in Python's."""
    if not triton.interpreted():
        pytest.skip("Triton's kernels run on a GPU here")
    from fla.ops.common import chunk_h

    class Count(int):
        def to(self, dtype):
            return self

    monkeypatch.setattr(chunk_h, "range", lambda *ends: map(Count, range(*map(int, ends))), raising=False)


def in_pieces(inputs, gates, span, policy, cuts, carry=None):
    """Return the outputs, and the carry, of fla's kernels."""
    outputs = []
    for t, u in zip((0, *cuts), (*cuts, inputs.x.shape[1])):
        marks = Span(*(None if m is None else m[:, t:u].to(inputs.x.device) for m in (span.mask, span.reset)))
        read = inputs.tokens(t, u), gates.tokens(t, u), marks
        with torch.no_grad():
            y, carry = SSD.scan(*read, policy=policy, carry=carry, backend="fla")
        outputs.append(y)
    return torch.cat(outputs, 1), carry


@pytest.mark.gpu
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("hardest", [0.1, 30.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_definition(policy, hardest, per_channel, kernels):
    policy = POLICIES[policy]
    inputs, gates = stream(torch.bfloat16, "cuda", per_channel, hardest=hardest)
    reset = torch.zeros(2, LENGTH, dtype=torch.bool)
    reset[0, 130] = reset[1, 7] = reset[1, 8] = True
    expected, carry = SSD.reference(*on_cpu(inputs, gates), Span(reset=reset), policy, None)
    y, after = in_pieces(inputs, gates, Span(reset=reset), policy, (1, 70))
    assert error(y, expected) < 0.01 and error(after.state, carry.state) < 0.01
    torch.testing.assert_close(after.log_decay.cpu(), carry.log_decay, rtol=1e-5, atol=1e-5)


SMALL = {"length": 100, "sizes": (2, 1, 24, 18)}
# The hardest decay in nats, and how close: the sums of 64 log-decays are float32.
EXACT = {"never": (0.0, 1e-5), "hardly": (0.01, 1e-5), "soon": (1.0, 2e-5), "at once": (30.0, 2e-4)}
POLICIES_SMALL = {
    **POLICIES,
    "reset": ScanPolicy(reset=37),
    "growing": ScanPolicy(add=0.01),
    "start": ScanPolicy(start=nested(torch.linspace(-1, 1, 2 * 24 * 18).view(2, 24, 18))),
}


@pytest.mark.parametrize(
    ("policy", "forgets", "marks", "per_channel"),
    [("plain", forgets, False, False) for forgets in EXACT]
    + [(policy, "soon", True, False) for policy in POLICIES_SMALL]
    + [("plain", "soon", True, True)],
)
def test_the_definition_in_the_interpreter(policy, forgets, marks, per_channel, in_interpreter):
    (hardest, close), policy = EXACT[forgets], POLICIES_SMALL[policy]
    inputs, gates = stream(torch.float32, "cpu", per_channel, hardest=hardest, **SMALL)
    mask, reset = torch.ones(2, 100, dtype=torch.bool), torch.zeros(2, 100, dtype=torch.bool)
    if marks:
        mask[1, :5] = False
        reset[0, 30] = reset[0, 31] = reset[1, 97] = True
    span = Span(mask, reset)
    expected, carry = SSD.reference(inputs, gates, span, policy, None)
    y, after = in_pieces(inputs, gates, span, policy, (1, 36))
    assert error(y[mask], expected[mask]) < close and error(after.state, carry.state) < close
    torch.testing.assert_close(after.log_decay, carry.log_decay, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.position, carry.position) and after.state.dtype == torch.float32


def check_gradients(dtype, device, per_channel, hardest, close, marks=False, length=LENGTH, sizes=SIZES):
    """Those of everything that is read, the state before it too."""
    H, _, P, N = sizes
    inputs, gates = stream(dtype, device, per_channel, length=length, sizes=sizes, hardest=hardest)
    state, weight = torch.randn(2, H, P, N), torch.randn(2, length, H, P)
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[0, length // 3] = reset[1, length // 2] = reset[1, -3] = marks
    grads = []
    for place, wide, backend in ((device, None, "fla"), ("cpu", torch.float64, "torch")):
        leaves = [t.to(place, wide or t.dtype) for t in (*vars(inputs).values(), *gates.tensors, state)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        start = ScanCarry.start(2, H, P, N, per_channel=per_channel, device=place)
        before = ScanCarry(leaves[-1], start.position + 5, start.log_decay)
        read = ScanInputs(*leaves[:4]), Gates(*leaves[4:6]), Span(reset=reset.to(place))
        y, carry = SSD.scan(*read, carry=before, backend=backend)
        loss = (y.double() * weight.to(place)).sum() + carry.state.double().square().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, theirs in zip(*grads):
        assert error(ours, theirs) < close


@pytest.mark.parametrize("hardest", [0.1, 10.0])
@pytest.mark.parametrize("marks", [False, True])
def test_gradients_in_the_interpreter(marks, hardest, in_interpreter):
    check_gradients(torch.float32, "cpu", False, hardest, 2e-4, marks, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("hardest", [0.1, 10.0])
def test_gradients_that_fla_refuses(hardest, in_interpreter, monkeypatch):
    """As on Hopper with Triton 3.6: they are taken through the kernels for a decay a channel."""
    from fla import utils
    from fla.ops.common import chunk_o

    for module in (utils, chunk_o):
        for flag, value in (("IS_NVIDIA_HOPPER", True), ("TRITON_ABOVE_3_4_0", True), ("TRITON_ABOVE_3_7_1", False)):
            monkeypatch.setattr(module, flag, value)
    check_gradients(torch.float32, "cpu", False, hardest, 2e-4, marks=True, **SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients(per_channel, kernels):
    check_gradients(torch.bfloat16, "cuda", per_channel, hardest=1.0, close=0.03)
