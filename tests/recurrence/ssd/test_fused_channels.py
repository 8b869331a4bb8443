"""The Triton scan of heads of headdim 1 with a decay a number (Mamba-1) against the float64 definition, and its
gradients; see test_fused.py."""

import math

import pytest
import torch

pytest.importorskip("triton")

from streams import DEVICE, error, on_cpu, reference_scan, scan

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import Call, choose
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.policy import Cap, ScanPolicy

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.recurrence.ssd.fused_channels import refuses
from rnn_longctx.recurrence.ssd.kernels import launch_channels
from rnn_longctx.recurrence.ssd.operands import ChannelOperands

H, G, N = 3, 1, 3  # part of every block lies outside
POLICIES = {
    "plain": ScanPolicy(),
    "filtered": ScanPolicy(mul=(0.5, 1.0, 2.0), add=-0.01, gain=(1.0, 0.5, 2.0), min_dt=0.3),
    "never forget": ScanPolicy(mul=0.0),
    "growing, reset": ScanPolicy(add=0.01, reset=7),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several chunks and tiles in a short stream."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch_channels, "BLOCK", 4)
        monkeypatch.setattr(launch_channels, "TILE", 4)
        monkeypatch.setattr(launch_channels, "chunk_tokens", lambda o, graded: 8)


def inputs(length, decay=0.5, dtype=torch.float32, heads=H, groups=G, d_state=N, batch=2):
    """x, dt, B and C as Mamba-1 cuts them out of wider projections, and A; the others."""
    wide = torch.randn(batch, length, 2 * heads, device=DEVICE).to(dtype)
    both = torch.randn(batch, length, 2 * groups * d_state + 3, device=DEVICE).to(dtype)
    B, C = both[..., 3:].unflatten(-1, (2, groups, d_state)).unbind(2)
    return {
        "x": wide[..., :heads, None],
        "dt": torch.randn(batch, length, heads, device=DEVICE).to(dtype),
        "A": -torch.rand(heads, d_state, device=DEVICE) * decay,
        "B": B,
        "C": C,
    }, {
        "dt_bias": torch.randn(heads, device=DEVICE) - 1,
        "dt_limit": (0.01, 2.0),
        "D": torch.randn(heads, device=DEVICE),
    }  # fmt: skip


def marks(length):
    """Padding before the second row, and documents: two within a chunk, one at a chunk's beginning."""
    mask, reset = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.bool)
    mask[1, :3] = False
    reset[0, 5] = reset[0, 6] = reset[1, 8] = True
    return mask, reset


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "never forget" else name for name in POLICIES]
)
def test_definition(name):
    """One call and many, with padding and new documents too."""
    length, policy = 17, POLICIES[name]
    for mask, reset in [marks(length)] if name != "plain" else [marks(length), (None, None)]:
        x, more = inputs(length)
        expected, state, total = reference_scan(**on_cpu(x), **on_cpu(more), policy=policy, mask=mask, reset=reset)
        real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
        for cuts in ([], [1, 10]):
            carry, ys = None, []
            for i, j in zip([0, *cuts], [*cuts, length]):
                part = {k: v if k == "A" else v[:, i:j] for k, v in x.items()}
                here = {} if mask is None else {"mask": mask[:, i:j].to(DEVICE), "reset": reset[:, i:j]}
                y, carry = scan(**part, **more, **here, policy=policy, carry=carry, backend="triton_channels")
                ys.append(y)
            assert error(torch.cat(ys, 1).cpu()[real], expected[real]) < 1e-5
            assert error(carry.state, state) < 1e-5
            torch.testing.assert_close(carry.log_decay.cpu(), total, rtol=1e-5, atol=1e-5)
            assert carry.state.shape == (2, H, 1, N) and carry.state.dtype == torch.float32


@pytest.mark.parametrize("decay", [1e-4, 40.0, 1e3])
def test_decays_of_any_size(decay):
    """From a state, after tokens that were read before; no bias, no D, steps as they are."""
    x, _ = inputs(9, decay=decay)
    x["dt"] = torch.rand_like(x["dt"])
    state, position = torch.randn(2, H, 1, N, device=DEVICE), torch.tensor([5, 9])
    carry = ScanCarry(state, position, -torch.rand(2, H, N, dtype=torch.float64, device=DEVICE))
    expected, after, total = reference_scan(**on_cpu(x), dt_softplus=False, state=state.cpu(), position=position)
    y, ours = scan(**x, dt_softplus=False, carry=carry, backend="triton_channels")
    assert error(y, expected) < 1e-5 and error(ours.state, after) < 1e-5
    torch.testing.assert_close(ours.log_decay, carry.log_decay + total.to(DEVICE), rtol=1e-5, atol=1e-5)
    assert ours.position.tolist() == [14, 18]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bits(dtype):
    """What is read and written is rounded, and nothing between."""
    x, more = inputs(9, dtype=dtype, heads=4, groups=2, batch=1)
    expected, state, _ = reference_scan(**on_cpu(x), **on_cpu(more))
    y, carry = scan(**x, **more, backend="triton_channels")
    assert y.dtype == dtype and error(y, expected) < torch.finfo(dtype).eps and error(carry.state, state) < 1e-5


def compare_gradients(policy, length=11, decay=0.5, with_marks=False, **sizes):
    """To every input and to the initial state, through outputs and the final state; with PyTorch's own rounding."""
    x, more = inputs(length, decay=decay, **sizes)
    batch, _, heads, _ = x["x"].shape
    d_state, dtype = x["B"].shape[3], x["x"].dtype
    initial = torch.randn(batch, heads, 1, d_state, device=DEVICE)
    leaves = [*x.values(), more["dt_bias"], more["D"], initial]
    y_weight, state_weight = torch.randn(x["x"].shape, device=DEVICE).to(dtype), torch.randn_like(initial)
    mask, reset = marks(length) if with_marks else (None, None)
    mask, position, grads = None if mask is None else mask.to(DEVICE), 0 if with_marks else 5, []
    for backend, wide in (("triton_channels", None), ("torch", None), ("torch", torch.float64)):
        own = [t.detach().to(wide or t.dtype).requires_grad_() for t in leaves]
        log_decay = torch.zeros(batch, heads, d_state, dtype=torch.float64, device=DEVICE)
        carry = ScanCarry(own[7], torch.full((batch,), position), log_decay)
        y, after = scan(
            *own[:5], dt_bias=own[5], D=own[6], dt_limit=(0.01, 2.0), carry=carry, policy=policy, mask=mask,
            reset=reset, backend=backend,
        )  # fmt: skip
        loss = (y * y_weight).double().sum() + (after.state * state_weight).double().sum()
        grads.append(torch.autograd.grad(loss, own))
    exact = 1e-5 if dtype == torch.float32 else 5e-3
    names = ["x", "dt", "A", "B", "C", "dt_bias", "D", "initial state"]
    for what, ours, pytorchs, expected in zip(names, *grads):
        assert ours.dtype == pytorchs.dtype and ours.shape == expected.shape
        assert error(ours, expected) < max(exact, 10 * error(pytorchs, expected)), what
    return grads[0]


@pytest.mark.parametrize("decay", [0.5, 40.0])
def test_gradients(decay):
    """A slab holds one chunk."""
    compare_gradients(POLICIES["plain"], decay=decay)


@pytest.mark.parametrize("name", ["filtered", pytest.param("growing, reset", marks=pytest.mark.slow)])
def test_gradients_of_documents(name, monkeypatch):
    monkeypatch.setattr(launch_channels, "SLAB", 1)
    compare_gradients(POLICIES[name], with_marks=True, heads=3, d_state=2)


def test_gradients_of_groups(monkeypatch):
    """Channels share B and C by groups, of two blocks each; one chunk."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch_channels, "BLOCK", 2)
    compare_gradients(ScanPolicy(), length=6, heads=6, groups=2, d_state=2, batch=1)


def test_what_it_refuses():
    device = torch.device(DEVICE)
    call = Call(device, torch.float32, True, 1, 16)
    assert choose(ScanPolicy(), "triton_channels", call).name == "triton_channels"
    # (Triton's interpreter is asked for by name only)
    assert choose(ScanPolicy(), None, call).name == ("torch" if DEVICE == "cpu" else "triton_channels")
    for policy, word in ((ScanPolicy(caps=(Cap(1.0),)), "norm caps"), (ScanPolicy(window=9), "window"),
                         (ScanPolicy(start=((0.0,),)), "initial state")):  # fmt: skip
        with pytest.raises(InputError, match=f"backend 'triton_channels': .*{word}"):
            choose(policy, "triton_channels", call)
    for wrong, word in (
        ({"dtype": torch.float64}, "float64"),
        ({"per_channel": False}, "a decay a head"),
        ({"headdim": 4}, "headdim 4"),
        ({"d_state": 65}, "65"),
        ({"stepped": False}, "gives them"),
    ):
        with pytest.raises(InputError, match=f"backend 'triton_channels': .*{word}"):
            choose(ScanPolicy(), "triton_channels", Call(**{**call.__dict__, **wrong}))
    assert refuses(ScanPolicy(), None) is None


def test_compile_sees_one_operator():
    """And the gradients are those of the kernels."""
    x, more = inputs(6, heads=2, d_state=2, batch=1)

    def run(x, dt, A, B, C):
        return scan(x, dt, A, B, C, **more, backend="triton_channels")[0]

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [v.clone().requires_grad_() for v in x.values()]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled)


def test_chunks_fill_a_device(monkeypatch):
    """Whole tiles; one chunk where rows and channels are many; none under SHORTEST tokens; a slab of a chunk fits."""
    monkeypatch.undo()
    monkeypatch.setattr(launch_channels.launch, "slots", lambda device: 264)

    def tokens(batch, length, heads, graded=False):
        x, B = torch.empty(batch, length, heads, 1, device="meta"), torch.empty(batch, length, 1, 16, device="meta")
        absent = dict.fromkeys(("A", "C", "D", "dt_bias", "initial", "table", "pad", "drop"))
        numbers = {"low": 0.0, "high": math.inf, "softplus": True}
        return launch_channels.chunk_tokens(ChannelOperands(x=x, dt=x[..., 0], B=B, **absent, **numbers), graded)

    assert tokens(64, 512, 1024) == 512 and tokens(64, 515, 1024) == 520
    assert tokens(1, 2**20, 1536) == 23832 and -(-(2**20) // 23832) * 48 >= 8 * 264 - 48
    assert tokens(1, 1000, 64) == 64
    many = tokens(64, 65536, 1536, graded=True)
    assert many % launch_channels.TILE == 0
    assert 64 * many * 1536 * 16 * 4 // launch_channels.TILE <= 1.05 * launch_channels.SLAB


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [(1536, 1, 16), (100, 1, 16), (96, 2, 10), (64, 1, 64)])
def test_on_the_device(sizes, dtype, most):
    heads, groups, d_state = sizes
    for length in (2, 500, 3001):
        x, more = inputs(length, dtype=dtype, heads=heads, groups=groups, d_state=d_state)
        double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in {**x, **more}.items()}
        expected, after = scan(**double, backend="torch")
        y, carry = scan(**x, **more, backend="triton_channels")
        assert error(y, expected) < most and error(carry.state, after.state) < most
        torch.testing.assert_close(carry.log_decay, after.log_decay, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slab", [1, 2**30])
def test_gradients_on_the_device(dtype, slab, monkeypatch):
    monkeypatch.setattr(launch_channels, "SLAB", slab)
    for length, with_marks in ((64, False), (1027, False), (1027, True)):
        sizes = {"heads": 200, "d_state": 16, "dtype": dtype}
        compare_gradients(ScanPolicy(), length=length, with_marks=with_marks, **sizes)


@pytest.mark.gpu
def test_the_same_gradients_again():
    leaves, more = inputs(1027, heads=200, d_state=16, dtype=torch.bfloat16)
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
    first, again = (
        torch.autograd.grad(scan(**leaves, **more, backend="triton_channels")[0].float().sum(), list(leaves.values()))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
def test_more_elements_than_int32():
    """x has more than 2^31 elements: the end of the stream is right."""
    length, first = 2**20 + 4321, 2**20
    x, more = inputs(length, batch=1, dtype=torch.bfloat16, heads=2048, d_state=16, decay=0.05)
    y, carry = scan(**x, **more, backend="triton_channels")
    _, middle = scan(
        **{k: v if k == "A" else v[:, :first] for k, v in x.items()}, **more, backend="triton_channels"
    )  # fmt: skip
    tail = {k: v if k == "A" else v[:, first:] for k, v in x.items()}
    expected, after = scan(**tail, **more, carry=middle, backend="torch")
    assert error(y[:, first:], expected) < 5e-3 and error(carry.state, after.state) < 5e-3
