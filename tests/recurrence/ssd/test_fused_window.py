"""The Triton scan with a sliding window against the float64 definition, in any cut and with calls of PyTorch's scan in
between. Without a GPU the kernels run in Triton's interpreter: float32, small blocks, short streams.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

import streams
from streams import DEVICE, error, on_cpu, reference_scan, scan

from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import Call, choose
from rnn_longctx.recurrence.carry import tree_map
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd import fused, fused_window, window
from rnn_longctx.recurrence.ssd.operands import Operands
from rnn_longctx.recurrence.ssd.window import window_state

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.recurrence.ssd.kernels import launch
from rnn_longctx.recurrence.ssd.kernels import window as kernels

H, P, G, N = 4, 12, 2, 20  # one block of P: the interpreter is slow
inputs = partial(streams.inputs, batch=1, sizes=(H, P, G, N))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many chunks and blocks in a short stream, with two chunks of the kernels in one of the carry."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(16, 16, 32, 4, 1))
        monkeypatch.setattr(launch, "segment_chunks", lambda *_: 2)
        monkeypatch.setattr(window, "CHUNK", 32)
        monkeypatch.setattr(kernels, "SPAN", 2)


def in_parts(x, more, cuts, backends, **settings):
    """The stream in several calls, the backends taken in turn."""
    carry, ys = None, []
    for i, (t, u) in enumerate(pairwise([0, *cuts, x["x"].shape[1]])):
        part = {k: v if k == "A" else v[:, t:u] for k, v in x.items()}
        y, carry = scan(**part, **more, carry=carry, backend=backends[i % len(backends)], **settings)
        ys.append(y)
    return torch.cat(ys, 1), carry


POLICIES = {
    "plain": ScanPolicy(),
    "rri": ScanPolicy(add=math.log(0.99), gain=0.75),
    "scaled, filtered": ScanPolicy(mul=(0.5, 1.0, 2.0, 0.1), min_dt=0.1, gain=(1.0, 0.5, 2.0, 1.0)),
    "never forget": ScanPolicy(mul=0.0),
    "growing": ScanPolicy(add=0.01),
}


def check(x, more, policy, *runs):
    """Each run, a list of cuts and the backends to take in turn, gives the definition's outputs and carry."""
    expected, state, total = reference_scan(**on_cpu(x), **on_cpu(more), policy=policy)
    for cuts, backends in runs:
        y, carry = in_parts(x, more, cuts, backends, policy=policy)
        assert error(y, expected) < 1e-5, (cuts, backends)
        assert error(window_state(carry), state) < 1e-5, (cuts, backends)
        torch.testing.assert_close(carry.log_decay.cpu(), total, rtol=1e-5, atol=1e-5)
        assert carry.log_decay.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "size"),
    [("plain", 48), ("plain", 37), ("rri", 37), ("scaled, filtered", 48), ("never forget", 37), ("growing", 48)],
)
def test_definition(name, size):
    """Whole chunks or not; one call, and parts that begin and end inside blocks."""
    x, more = inputs(110)
    check(x, more, ScanPolicy(window=size).then(POLICIES[name]), ([], ["triton"]), ([20, 101], ["triton"]))


@pytest.mark.parametrize("size", [32, 33, 64, 85, 500])
def test_any_cut_of_either_backend(size):
    """Calls of both backends go on from each other's carry; `size` may be longer than the stream."""
    length = 130
    x, more = inputs(length)
    cuts = sorted({17, *torch.randint(1, length, (3,)).tolist()})
    check(x, more, ScanPolicy(window=size), (cuts, ["torch", "triton"]), (cuts, ["triton", "torch"]))


@pytest.mark.parametrize("decay", [1e-4, 40.0, 1e3])
def test_decays_of_any_size(decay):
    x, more = inputs(120, decay=decay)
    check(x, more, ScanPolicy(window=50), ([], ["triton"]), ([70], ["triton"]))


def test_heads_that_hear_a_part_of_the_block_before():
    """Chunks beyond the horizon are left out, from either side; nothing changes."""
    c = launch.blocks(P, N, torch.float32, 0)
    size = 5 * c.Q
    x, more = inputs(2 * size)
    x["dt"].zero_()
    x["A"] = -torch.tensor([0.0, 0.3, 1.0, 4.0], device=DEVICE)
    settings = {"dt_softplus": False, "dt_limit": (0.9, 1.0), "D": None}
    check(x, {**more, **settings, "dt_bias": None}, ScanPolicy(window=size), ([], ["triton"]))
    table = fused.gate_table(ScanPolicy(), H, torch.device(DEVICE))
    rows = {k: x[k].view(2, size, *x[k].shape[2:]) for k in ("x", "dt", "B", "C")}
    numbers = {"low": 0.9, "high": 1.0, "softplus": False, "every": 0, "due": [], "position": 0}
    absent = dict.fromkeys(("D", "dt_bias", "initial", "pad", "drop", "caps"))
    o = Operands(**rows, A=x["A"], table=table, **absent, **numbers)
    spans = kernels.Spans(o, launch.prepare_chunks(o, c))
    step = 0.9 * x["A"].double() * c.Q
    chunks = size // c.Q
    expected = [chunks if s == 0 else min(chunks, math.floor(40 / -s) + 1) for s in step.tolist()]
    assert spans.near.tolist() == [expected] * 2
    assert spans.kept.tolist() == [[chunks - e for e in expected]] * 2
    order = torch.arange(chunks, device=DEVICE)
    torch.testing.assert_close(spans.until[0].double(), step[:, None] * order, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spans.rest[0].double(), step[:, None] * order.flip(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [33 * 3, 100], ids=["rows that are blocks", "rows that hold more"])
def test_batch(length):
    x, more = inputs(length, batch=2)
    check(x, more, ScanPolicy(window=33), ([], ["triton"]))


def test_more_blocks_than_are_read_at_once(monkeypatch):
    monkeypatch.setattr(fused_window, "ROWS", 2)
    x, more = inputs(170)
    check(x, more, ScanPolicy(window=33), ([], ["triton"]))


def test_strided_inputs():
    """Heads, groups and tokens of one wide projection, as a layer hands them on; more rows of the state than fit."""
    P = 20
    x, more = inputs(90, sizes=(H, P, G, N))
    wide = torch.cat([x[k].flatten(2) for k in ("x", "B", "C", "dt")], 2)
    parts = wide.split([H * P, G * N, G * N, H], 2)
    B, C = (part.unflatten(2, (G, N)) for part in parts[1:3])
    strided = {"x": parts[0].unflatten(2, (H, P)), "B": B, "C": C, "dt": parts[3], "A": x["A"]}
    check(strided, more, ScanPolicy(window=40), ([], ["triton"]), ([70], ["triton"]))


def test_a_kept_carry_is_not_changed():
    x, more = inputs(60)
    _, carry = scan(**x, **more, policy=ScanPolicy(window=40), backend="triton")
    kept = tree_map(torch.clone, carry)
    scan(**x, **more, policy=ScanPolicy(window=40), carry=carry, backend="triton")
    for value in x.values():
        value.zero_()  # the caller's own: no part of a carry
    pairs: list = []
    tree_map(lambda v: pairs.append(v), carry)
    others: list = []
    tree_map(lambda v: others.append(v), kept)
    assert len(pairs) == len(others) > 9
    assert all(torch.equal(a, b) for a, b in zip(pairs, others))


def test_documents_padding_and_gradients_are_pytorchs():
    x, more = inputs(90, batch=2)
    reset = torch.zeros(2, 90, dtype=torch.bool)
    reset[1, 50] = True
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :9] = False
    for marks in ({"reset": reset}, {"mask": mask.to(DEVICE)}, {}):
        policy = ScanPolicy(window=40, reset=None if marks else 33)
        y, carry = scan(**x, **more, **marks, policy=policy, backend="triton")
        expected, after = scan(**x, **more, **marks, policy=policy, backend="torch")
        assert torch.equal(y, expected) and torch.equal(carry.window.block, after.window.block)
    grads = []
    for backend in ("triton", "torch"):
        own = x["x"].clone().requires_grad_()
        y, _ = scan(**{**x, "x": own}, **more, policy=ScanPolicy(window=40), backend=backend)
        grads.append(torch.autograd.grad(y.square().sum(), own)[0])
    assert torch.equal(*grads)


def test_it_is_chosen():
    call = Call(torch.device(DEVICE), torch.float32, False, P, N)
    assert choose(ScanPolicy(window=100), "triton", call).name == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [(4, 64, 1, 128), (4, 32, 2, 64), (2, 128, 1, 256), (2, 48, 1, 20)])
def test_on_the_device(sizes, dtype, most):
    x, more = inputs(3333, dtype=dtype, sizes=sizes, decay=0.02)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in {**x, **more}.items()}
    for size in (512, 333, 1000):
        policy = ScanPolicy(window=size)
        expected, after = scan(**double, policy=policy, backend="torch")
        for cuts in ([], [100, 1501, 1600]):
            y, carry = in_parts(x, more, cuts, ["triton"], policy=policy)
            assert error(y, expected) < most, (size, cuts)
            assert error(window_state(carry), window_state(after)) < most, (size, cuts)
