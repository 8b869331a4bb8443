"""The Triton scan against the float64 definition: any cut of the stream, documents, padding.

Without a GPU the kernels run in Triton's interpreter: float32, small blocks, short streams. On a GPU the same tests run
on it, and those marked `gpu` beside them: pytest -m gpu tests/recurrence
"""

import math
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from streams import DEVICE, POLICIES, G, H, N, P, documents, error, inputs, on_cpu, reference_scan, scan, worst

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import Call, OutputGate, choose
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.recurrence.rows import row_counts
from rnn_longctx.recurrence.ssd import fused, ops, pytorch
from rnn_longctx.recurrence.ssd.operands import Operands

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.recurrence.ssd.kernels import launch, launch_caps

pytestmark = pytest.mark.usefixtures("small_blocks")


def drawn_cuts():
    """One call and many, in either order: one for a stream as it is, the other for one with padding and documents."""
    return random.sample([[], [1, 37]], 2)


@pytest.mark.parametrize("name", POLICIES)
def test_definition(name):
    """One call and many, with padding and new documents too."""
    length = 61
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :7] = False
    for (m, r), cuts in zip(((None, None), (mask, documents(length))), drawn_cuts()):
        x, more = inputs(length)
        expected, state, total = reference_scan(**on_cpu(x), **on_cpu(more), policy=POLICIES[name], mask=m, reset=r)
        whole = {"mask": None if m is None else m.to(DEVICE), "reset": r}
        expected_position = scan(**x, **more, **whole, backend="torch")[1].position.tolist()
        carry, ys = None, []
        for i, j in zip([0, *cuts], [*cuts, length]):
            part = {k: v if k == "A" else v[:, i:j] for k, v in x.items()}
            marks = {"mask": None if m is None else m[:, i:j].to(DEVICE), "reset": None if r is None else r[:, i:j]}
            y, carry = scan(**part, **more, **marks, policy=POLICIES[name], carry=carry, backend="triton")
            ys.append(y)
        real = torch.ones(2, length, dtype=torch.bool) if m is None else m
        assert worst(torch.cat(ys, 1).cpu()[real], expected[real], 1) < 1e-5
        assert worst(carry.state, state, 1) < 1e-5
        torch.testing.assert_close(carry.log_decay.cpu(), total, rtol=1e-5, atol=1e-5)
        assert carry.position.tolist() == expected_position


@pytest.mark.parametrize(("name", "headdim"), [
    ("plain", 20), pytest.param("rri", 32, marks=pytest.mark.slow), pytest.param("reset", 64, marks=pytest.mark.slow),
])  # fmt: skip
def test_gate(name, headdim):
    """y times silu(z) and weight, and the squares between; one head is wild. A single token is left as it is."""
    length, inner = 61, H * headdim
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :7] = False
    x, more = inputs(length, sizes=(H, headdim, G, N))
    x["A"][1] = -200.0
    z = torch.randn(2, length, 3 * inner, device=DEVICE)[..., 5 : 5 + inner].unflatten(-1, (H, headdim))
    weight = torch.randn(inner, device=DEVICE)
    for (m, r), cuts in zip(((None, None), (mask, documents(length))), drawn_cuts()):
        y, state, _ = reference_scan(**on_cpu(x), **on_cpu(more), policy=POLICIES[name], mask=m, reset=r)
        product = y * F.silu(z.cpu().double())
        expected, squares = product * weight.view(H, headdim).cpu(), product.square().sum((2, 3))
        real = torch.ones(2, length, dtype=torch.bool) if m is None else m
        carry, made, sums = None, [], []
        for i, j in zip([0, *cuts], [*cuts, length]):
            part = {k: v if k == "A" else v[:, i:j] for k, v in x.items()}
            marks = {"mask": None if m is None else m[:, i:j].to(DEVICE), "reset": None if r is None else r[:, i:j]}
            gate = OutputGate(z[:, i:j], weight)
            settings = {"policy": POLICIES[name], "backend": "triton", "output_gate": gate}
            ours, carry = scan(**part, **more, **marks, **settings, carry=carry)
            if j - i == 1:
                assert gate.squares is None
                ours = ours * F.silu(gate.z)
                gate.squares, ours = ours.square().sum((2, 3))[..., None], ours * weight.view(H, headdim)
            made.append(ours)
            sums.append(gate.squares.sum(2))
        assert worst(torch.cat(made, 1).cpu()[real], expected[real], 1) < 1e-5
        assert error(torch.cat(sums, 1).cpu()[real], squares[real]) < 1e-5
        assert worst(carry.state, state, 1) < 1e-5


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if not policy.caps])
@pytest.mark.parametrize("sums", [fused.shard_sum, pytorch.shard_sum], ids=["triton", "torch"])
def test_what_a_shard_alone_adds(name, sums):
    """To the state after it, and to the gradient of the state before it. Many segments, the first of them shorter,
    and less than a chunk; one head forgets at once."""
    policy = POLICIES[name]
    for length, many in ((77, name in ("rri", "reset", "growing")), (9, False)):
        x, more = inputs(length)
        x["A"][1] = -50.0
        reset = documents(length) if many else None
        drop = row_counts(torch.zeros(2, dtype=torch.int64), length, reset=reset, every=policy.reset)[1]
        dy, wide = torch.randn_like(x["x"]), {k: v.double() for k, v in on_cpu(x).items()}
        others = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in on_cpu(more).items()}
        carry = ScanCarry.start(2, H, P, N, dtype=torch.float64)
        carry.state.requires_grad_()
        y, after = scan(**wide, **others, policy=policy, reset=reset, carry=carry, backend="torch")
        (grad,) = torch.autograd.grad(y, carry.state, dy.double().cpu())
        gates = SteppedGates(x["dt"], x["A"], more["dt_bias"], more["dt_limit"])
        settings = {"policy": policy, "drop": drop, "dtype": torch.float32}
        state, total = sums(x["x"], gates, x["B"], **settings)
        assert worst(state, after.state.detach(), 1) < 1e-5
        if reset is None:
            torch.testing.assert_close(total.cpu(), after.log_decay, rtol=1e-5, atol=1e-5)
        before, _ = sums(dy, gates, x["C"], **settings, back=True)
        for ours, expected in zip(before.unbind(1), grad.unbind(1)):  # what forgets has next to none
            assert (ours.cpu() - expected).norm() < 1e-5 * (1 + expected.norm())


def test_where_a_gate_is_not_applied():
    """y is what it is without."""
    x, more = inputs(40, batch=1)
    z, weight = torch.randn_like(x["x"]), torch.randn(H * P, device=DEVICE)
    window = ScanPolicy(window=16)
    for policy, backend in ((POLICIES["cap every 16"], "triton"), (window, "triton"), (ScanPolicy(), "torch")):
        gate = OutputGate(z, weight)
        y, _ = scan(**x, **more, policy=policy, backend=backend, output_gate=gate)
        assert gate.squares is None and torch.equal(y, scan(**x, **more, policy=policy, backend=backend)[0])
    gate = OutputGate(z, weight)
    leaf = x["x"].requires_grad_()
    y, _ = scan(**x, **more, backend="triton", output_gate=gate)
    assert gate.squares is None and torch.autograd.grad(y.sum(), leaf)[0].isfinite().all()


CAPS = {
    "some heads": ScanPolicy(caps=(Cap((0.5, 8.0, 900.0, 2.0)),)),
    "no head": ScanPolicy(caps=(Cap(1e4),)),
    "nearly nothing left": ScanPolicy(caps=(Cap(1e-30),)),
    "every 3": ScanPolicy(caps=(Cap(1.5, 3),)),
    "every 25": ScanPolicy(caps=(Cap(1.5, 25),)),
    "two": ScanPolicy(caps=(Cap(9.0, 1), Cap((0.5, 8.0, 2.0, 2.0), 16))),
    "never forget": ScanPolicy(mul=0.0, caps=(Cap(3.0),)),
    "growing": ScanPolicy(add=0.01, caps=(Cap(3.0),)),
}


@pytest.mark.parametrize("name", CAPS)
def test_caps_token_by_token(name):
    """Whole and in parts, from a state that may be beyond its cap."""
    length = 61
    for decay, cuts in ((0.5, [1, 38]), (40.0, [])):
        x, more = inputs(length, batch=1, decay=decay)
        start, position = 5 * torch.randn(1, H, P, N), torch.full((1,), 7)
        expected, state, _ = reference_scan(
            **on_cpu(x), **on_cpu(more), policy=CAPS[name], state=start, position=position
        )
        carry = ScanCarry(start.to(DEVICE), position, torch.zeros(1, H, dtype=torch.float64, device=DEVICE))
        ys = []
        for i, j in zip([0, *cuts], [*cuts, length]):
            part = {k: v if k == "A" else v[:, i:j] for k, v in x.items()}
            y, carry = scan(**part, **more, policy=CAPS[name], carry=carry, backend="triton")
            ys.append(y)
        assert error(torch.cat(ys, 1), expected) < 1e-5
        assert error(carry.state, state) < 1e-5


@pytest.mark.parametrize("forgets", [False, True])
def test_caps_of_the_same_token_again(forgets):
    """A prompt of newlines: every token adds to the state along one direction, and each cut tells on all after it."""
    x, more = inputs(61, batch=1, decay=0.05 if forgets else 0.0)
    x = {k: v if k == "A" else v[:, :1].expand(v.shape).contiguous() for k, v in x.items()}
    for policy in (ScanPolicy(caps=(Cap(3.0),)), ScanPolicy(caps=(Cap((0.05, 4.0, 30.0, 300.0)),))):
        expected, state, _ = reference_scan(**on_cpu(x), **on_cpu(more), policy=policy)
        y, carry = scan(**x, **more, policy=policy, backend="triton")
        assert error(y, expected) < 1e-5 and worst(carry.state, state, 1) < 1e-5


def test_a_cap_of_zero():
    """No policy has one; the kernel leaves nothing, and no NaN."""
    x, _ = inputs(40)
    c = launch.blocks(P, N, torch.float32, 0)
    table = fused.gate_table(ScanPolicy(), H, torch.device(DEVICE))
    start, caps = torch.zeros(2, H, P, N, device=DEVICE), torch.zeros(1, H, device=DEVICE)
    numbers = {"low": 0.0, "high": 2.0, "softplus": True, "every": 0, "due": [1], "position": 0}
    absent = dict.fromkeys(("D", "dt_bias", "pad", "drop"))
    o = Operands(**x, initial=start, table=table, caps=caps, **absent, **numbers)
    ready = launch.prepare_chunks(o, c)
    x["x"][0] = 0.0
    factors = launch_caps.token_factors(o, ready, c)
    assert (factors[0] == 1).all() and (factors[1].flatten(1)[:, :40] == 0).all()
    launch_caps.cut_back_tokens(ready, factors)
    assert not ready.cum.isnan().any() and (ready.scale[1] == 0).all() and (ready.wild[1, :, 0] == 1).all()


@pytest.mark.parametrize("every", [1, 16])
def test_a_cap_that_leaves_nothing(every):
    x, more = inputs(40)
    y, carry = scan(**x, **more, policy=ScanPolicy(caps=(Cap(1e-44, every),)), backend="triton")
    assert y.isfinite().all() and carry.state.isfinite().all()


@pytest.mark.parametrize("decay", [1e-4, 40.0, 1e3])
def test_decays_of_any_size(decay):
    x, more = inputs(70, decay=decay)
    expected, state, _ = reference_scan(**on_cpu(x), **on_cpu(more))
    y, carry = scan(**x, **more, backend="triton")
    assert error(y, expected) < 1e-5 and error(carry.state, state) < 1e-5


def test_what_it_refuses():
    call = Call(torch.device(DEVICE), torch.float32, False, P, N)
    caps = (Cap(1.0), Cap(1.0, 5), Cap(1.0, 7))
    for policy, word in ((ScanPolicy(caps=caps), "two norm caps"), (ScanPolicy(caps=caps[:1], reset=5), "cap")):
        with pytest.raises(InputError, match=f"backend 'triton': .*{word}"):
            choose(policy, "triton", call)
        assert choose(policy, None, call).name == "torch"
    for wrong in ({"dtype": torch.float64}, {"per_channel": True}, {"d_state": 1024}):
        with pytest.raises(InputError, match="backend 'triton'"):
            choose(ScanPolicy(), "triton", Call(**{**call.__dict__, **wrong}))
    wide = Call(torch.device(DEVICE), torch.float32, False, 16, 512)
    assert "token by token" in fused.refuses(ScanPolicy(caps=caps[:1]), wide)
    assert choose(ScanPolicy(), None, Call(torch.device("cpu"), torch.float32, False, P, N)).name == "torch"


@pytest.mark.parametrize("policy", [ScanPolicy(), ScanPolicy(caps=(Cap(1.5),))], ids=["plain", "cap"])
def test_nan_ends(policy):
    """No hang, and nothing but what comes in the same chunk or later, of the same head, is touched."""
    chunk = launch.blocks(P, N, torch.float32, 0).Q
    at = 2 * chunk + 3
    x, more = inputs(at + 2 * chunk)
    x["x"][0, at, 0, 0] = float("nan")
    x["dt"][1, at, 1] = float("nan")
    y, _ = scan(**x, **more, policy=policy, backend="triton")
    before = 2 * chunk
    assert y[:, :before].isfinite().all() and y[:, :, 2:].isfinite().all()
    assert y[0, at, 0, 0].isnan() and y[1, at, 1].isnan().any()


def test_compile_and_export_see_one_operator():
    """And the gradients are those of the kernels."""
    x, more = inputs(20, batch=1)

    def run(x, dt, A, B, C):
        return scan(x, dt, A, B, C, **more, backend="triton")[0]

    found = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [v.clone().requires_grad_() for v in x.values()]
        y = function(*leaves)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for plain, compiled in zip(*found):
        torch.testing.assert_close(plain, compiled)
    module = torch.nn.Module()
    module.forward = run
    graph = torch.export.export(module, tuple(x.values())).graph
    assert [n for n in graph.nodes if n.target == torch.ops.rnn_longctx.scan.default]


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled on the device itself")
@pytest.mark.parametrize(
    ("capability", "sizes", "kernels"),  # the copy engine and dependent launches are of 90
    [
        pytest.param(80, "all", 110, marks=pytest.mark.slow),  # a minute and a half, as of 90
        pytest.param(90, "all", 116, marks=pytest.mark.slow),
        (90, "usual", 73),  # of which a fourth, another one for every seed: Triton takes more than a second for each
    ],
)
def test_compiles_ahead_of_time(capability, sizes, kernels):
    """For devices that are not here, in the sizes of published models; shared memory fits."""
    step = 4 if sizes == "usual" else 1
    first = random.randrange(step)
    script = str(Path(__file__).with_name("compile_kernels.py"))
    run = subprocess.run(
        [sys.executable, script, str(capability), sizes, f"{first}/{step}"],
        capture_output=True, text=True, env={"PATH": "", "TRITON_INTERPRET": "0", "HOME": str(Path.home())},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    most = {80: 163, 90: 227}[capability] * 1024
    lines = run.stdout.splitlines()
    assert len(lines) == len(range(first, kernels, step))
    for line in lines:
        assert int(line.split()[-1]) <= most, line


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [(4, 64, 1, 128), (4, 32, 2, 64), (2, 128, 1, 256), (2, 48, 1, 20)])
def test_on_the_device(sizes, dtype, most):
    x, more = inputs(3333, dtype=dtype, sizes=sizes)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in {**x, **more}.items()}
    expected, carry = scan(**double, backend="torch")
    y, ours = scan(**x, **more, backend="triton")
    assert error(y, expected) < most and error(ours.state, carry.state) < most


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [(4, 64, 1, 128), (4, 32, 2, 64), (2, 128, 1, 128), (2, 48, 1, 20)])
@pytest.mark.parametrize("every", [1, 3, 256])
def test_caps_on_the_device(every, sizes, dtype, most):
    x, more = inputs(3333, dtype=dtype, sizes=sizes)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in {**x, **more}.items()}
    _, plain = scan(**double, backend="torch")
    norms = plain.state.flatten(2).norm(dim=-1).mean(0)
    norms[0] *= 100  # a head that stays below it
    policy = ScanPolicy(caps=(Cap(tuple((norms / 4).tolist()), every),))
    expected, carry = scan(**double, policy=policy, backend="torch")
    y, ours = scan(**x, **more, policy=policy, backend="triton")
    assert worst(y, expected, 2) < most and worst(ours.state, carry.state, 1) < most


@pytest.mark.gpu
def test_caps_in_segments(monkeypatch):
    """Factors found beside the scan of the segment before: the same, whatever the segments."""
    x, more = inputs(9000, batch=1, dtype=torch.bfloat16, sizes=(4, 64, 1, 128))
    policy = ScanPolicy(caps=(Cap((2.0, 3.0, math.inf, 4.0), 256),))
    expected, whole = scan(**x, **more, policy=policy, backend="triton")
    monkeypatch.setattr(ops, "SEGMENT", 1024)
    for _ in range(20):  # two streams: an order that is missing need not show at once
        y, carry = scan(**x, **more, policy=policy, backend="triton")
        assert torch.equal(y, scan(**x, **more, policy=policy, backend="triton")[0])
    assert error(y, expected) < 1e-3 and error(carry.state, whole.state) < 1e-3
    torch.testing.assert_close(carry.log_decay, whole.log_decay)


@pytest.mark.gpu
def test_more_elements_than_int32():
    """x has more than 2^31 elements: the end of the stream is right."""
    length = 2**20 + 4321
    x, more = inputs(length, batch=1, dtype=torch.bfloat16, sizes=(32, 64, 1, 128), decay=0.05)
    y, carry = scan(**x, **more, backend="triton")
    first = 2**20
    _, middle = scan(**{k: v if k == "A" else v[:, :first] for k, v in x.items()}, **more, backend="triton")
    tail = {k: v if k == "A" else v[:, first:] for k, v in x.items()}
    expected, after = scan(**tail, **more, carry=middle, backend="torch")
    assert error(y[:, first:], expected) < 5e-3 and error(carry.state, after.state) < 5e-3


def test_compiling_is_a_thread_of_its_own(monkeypatch):
    """What another thread launches meanwhile is launched."""
    from rnn_longctx.recurrence.ssd.kernels import launcher

    class Kernel:
        arg_names, launched = ("x",), 0

        def __getitem__(self, grid):
            def launch(*args, **options):
                self.launched += 1

            return launch

        def warmup(self, *args, grid, **options):
            pass

    monkeypatch.setattr(triton, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kernel = Kernel()
    launched = launcher.Launched(kernel)
    with launcher.compiling_only():
        launched[(1,)](1)
        assert kernel.launched == 0
        thread = threading.Thread(target=lambda: launched[(1,)](2))
        thread.start()
        thread.join()
    assert kernel.launched == 1
