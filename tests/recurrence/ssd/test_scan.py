"""The PyTorch scan against the float64 definition: every policy, any cut of the stream, padding, new documents."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import reference_scan, scan

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import backends
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.recurrence.ssd import chunked
from rnn_longctx.recurrence.ssd.window import window_state

H, P, G, N = 4, 5, 2, 7


def inputs(batch=2, length=150, per_channel=False, dtype=torch.float64, decay=0.3, headdim=P):
    def normal(*shape):
        return torch.randn(*shape, dtype=dtype)

    A = -torch.rand(*((H, N) if per_channel else (H,)), dtype=dtype) * decay
    x = {"x": normal(batch, length, H, headdim), "dt": normal(batch, length, H), "A": A,
         "B": normal(batch, length, G, N), "C": normal(batch, length, G, N)}  # fmt: skip
    return x, {"dt_bias": normal(H) - 1, "dt_limit": (0.01, 2.0), "D": normal(H)}


def cut(x, i, j):
    return {k: v if k == "A" else v[:, i:j] for k, v in x.items()}


def in_parts(x, settings, cuts, mask=None, reset=None, **more):
    """The same stream in several calls."""
    carry, ys = None, []
    for i, j in zip([0, *cuts], [*cuts, x["x"].shape[1]]):
        part = {"mask": None if mask is None else mask[:, i:j], "reset": None if reset is None else reset[:, i:j]}
        y, carry = scan(**cut(x, i, j), **settings, **part, carry=carry, **more)
        ys.append(y)
    return torch.cat(ys, 1), carry


POLICIES = {
    "plain": ScanPolicy(),
    "rri": ScanPolicy(add=math.log(0.99), gain=0.75),
    "scaled, filtered": ScanPolicy(mul=(0.5, 1.0, 2.0, 0.1), min_dt=0.1, gain=(1.0, 0.5, 2.0, 1.0)),
    "never forget": ScanPolicy(mul=0.0),
    "cap a token, some heads": ScanPolicy(caps=(Cap((1.0, 2.0, 5.0, 900.0)),)),
    "cap a token, most tokens clipped": ScanPolicy(caps=(Cap(0.05),)),
    "cap every 7 and 40": ScanPolicy(caps=(Cap(2.0, 7), Cap(3.0, 40))),
    "cap every 50": ScanPolicy(caps=(Cap(3.0, 50),)),
    "cap every 64": ScanPolicy(caps=(Cap((0.5, 1.0, 2.0, 900.0), 64),)),  # where pieces end: they stay in one block
    "cap a token and every 50": ScanPolicy(caps=(Cap(2.0), Cap(1.5, 50))),
    "window 100": ScanPolicy(window=100),
    "window 64": ScanPolicy(window=64, add=-0.01),
    "window 3": ScanPolicy(window=3),
    "window 1": ScanPolicy(window=1),
    "reset": ScanPolicy(reset=37),
    "reset and cap": ScanPolicy(reset=64, caps=(Cap(1.0),)),
    "reset and window": ScanPolicy(window=20, reset=33),
    "start": ScanPolicy(start=torch.randn(H, P, N), reset=50),
}


KINDS = {"per head": (False, P), "per channel": (True, P), "heads of one channel": (True, 1)}


@pytest.mark.parametrize(("per_channel", "headdim"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_definition(name, per_channel, headdim):
    """One call and many agree with the reference to 1e-10, with padding and new documents too."""
    policy = POLICIES[name]
    if policy.start is not None:
        policy = replace(policy, start=torch.tensor(policy.start, dtype=torch.float64)[:, :headdim])
    length = 137
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :13] = False
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[0, 70] = reset[1, 90] = reset[1, 91] = True
    for m, r in ((None, None), (mask, reset)):
        x, more = inputs(length=length, per_channel=per_channel, headdim=headdim)
        expected, state, total = reference_scan(**x, **more, policy=policy, mask=m, reset=r)
        cuts = sorted(torch.randint(1, length, (6,)).unique().tolist())
        whole = scan(**x, **more, policy=policy, mask=m, reset=r)
        parts = in_parts(x, more, [1, 2, *[c for c in cuts if c > 2]], m, r, policy=policy)
        real = torch.ones(2, length, dtype=torch.bool) if m is None else m
        for y, carry in (whole, parts):
            torch.testing.assert_close(y[real], expected[real], rtol=0, atol=1e-10)
            torch.testing.assert_close(carry.log_decay, total, rtol=0, atol=1e-10)
            torch.testing.assert_close(window_state(carry), state, rtol=0, atol=1e-10)
        assert torch.equal(whole[1].position, parts[1].position)


@pytest.mark.parametrize("policy", [
    ScanPolicy(caps=(Cap(0.5, 256),)), ScanPolicy(caps=(Cap(0.5, 64), Cap(0.3, 192))), ScanPolicy(window=100),
    ScanPolicy(caps=(Cap(0.3, 1),), add=-0.001),
], ids=["cap every 256", "cap every 64 and 192", "window 100", "most tokens clipped"])  # fmt: skip
def test_long_streams_in_odd_parts(policy):
    x, more = inputs(length=1301, decay=0.02)  # more than one block of pieces; slow enough for every policy to matter
    expected, *_ = reference_scan(**x, **more, policy=policy)
    plain, *_ = reference_scan(**x, **more)
    assert (expected - plain).abs().max() > 0.1  # the policy has something to do
    cuts = sorted({1, 2, 255, 256, 257, *torch.randint(1, 1301, (5,)).tolist()})
    for y, _ in (scan(**x, **more, policy=policy), in_parts(x, more, cuts, policy=policy)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", POLICIES)
def test_float32(name):
    x, more = inputs(length=201, dtype=torch.float32)
    expected, *_ = reference_scan(**x, **more, policy=POLICIES[name])
    y, _ = scan(**x, **more, policy=POLICIES[name])
    assert y.dtype == torch.float32
    assert (y - expected).norm() / expected.norm() < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_cut_of_any_policy(data):
    """Property: how a stream is cut never changes a result."""
    length = data.draw(st.integers(2, 90))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    every, window = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 80))
    policy = data.draw(st.sampled_from([
        ScanPolicy(caps=(Cap(data.draw(st.floats(0.1, 5.0)), every),)),
        ScanPolicy(window=window),
        ScanPolicy(reset=every, mul=data.draw(st.floats(0.0, 2.0)), min_dt=0.05),
    ]))  # fmt: skip
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x, more = inputs(batch=1, length=length)
    expected, *_ = reference_scan(**x, **more, policy=policy)
    y, _ = in_parts(x, more, cuts, policy=policy)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


def test_decays_of_any_size():
    """Strong forgetting takes the masked form, weak the factored one; they agree where both may be used."""
    for decay in (1e-4, 0.3, 40.0, 1e4):
        x, more = inputs(decay=decay, length=130)
        expected, *_ = reference_scan(**x, **more)
        y, carry = scan(**x, **more)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        assert torch.isfinite(carry.state).all()
    for decay in (0.3, 1e4):
        x, more = inputs(decay=decay, length=130, per_channel=True, headdim=1, dtype=torch.float32)
        expected, *_ = reference_scan(**x, **more)
        torch.testing.assert_close(scan(**x, **more)[0], expected.float(), rtol=1e-4, atol=1e-4)
    x, more = inputs(length=64)
    cum = -torch.rand(2, 64, H, dtype=torch.float64).cumsum(1) * 0.1
    state = torch.randn(2, H, P, N, dtype=torch.float64)
    arguments = (x["x"], cum, torch.rand(2, 64, H, dtype=torch.float64), x["B"], x["C"], state)
    for a, b in zip(chunked._piece_factored(*arguments), chunked._piece_masked(*arguments)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_window_recomputes_from_the_last_inputs():
    """The window equals a fresh scan of the layer's own last r inputs, at every position looked at."""
    x, more = inputs(length=160)
    r = 100
    y, _ = scan(**x, **more, policy=ScanPolicy(window=r))
    for t in (0, 50, 99, 100, 101, 130, 159):
        fresh, _ = scan(**cut(x, max(0, t - r + 1), t + 1), **more)
        torch.testing.assert_close(y[:, t], fresh[:, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["plain", "rri", "cap a token, some heads", "cap every 50", "cap every 64", "window 64", "reset"]
)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
def test_gradients(name, per_channel):
    """Gradients to every input agree with those of the definition (a cap's factor carries none there either)."""
    length, decay = (140, 0.02) if name == "cap every 64" else (70, 0.3)  # two pieces, which forget little: one block
    x, more = inputs(batch=1, length=length, per_channel=per_channel, decay=decay)
    leaves = [t.requires_grad_() for t in [*x.values(), more["dt_bias"], more["D"]]]
    weight = torch.randn(1, length, H, P, dtype=torch.float64)
    grads = []
    for run in (scan, reference_scan):
        y = run(**x, **more, policy=POLICIES[name])[0]
        grads.append(torch.autograd.grad((y * weight).sum(), leaves))
    for ours, expected in zip(*grads):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def test_gradient_to_the_initial_state():
    x, more = inputs(batch=1, length=80)
    carry = ScanCarry.start(1, H, P, N, dtype=torch.float64)
    carry.state = torch.randn_like(carry.state).requires_grad_()
    y, after = scan(**x, **more, carry=carry)
    (grad,) = torch.autograd.grad(y.sum() + after.state.sum(), carry.state)
    step = torch.randn_like(carry.state) * 1e-6
    moved = ScanCarry(carry.state.detach() + step, carry.position, carry.log_decay)
    y2, after2 = scan(**x, **more, carry=moved)
    change = (y2 - y).sum() + (after2.state - after.state).sum()
    torch.testing.assert_close(change, (grad * step).sum(), rtol=1e-5, atol=1e-12)


def test_total_log_decay_is_what_is_left_of_the_first_token():
    x, more = inputs(batch=1, length=60)
    x["dt"][:, 1:] = x["dt"][:, 1:]
    alone = {k: v.clone() for k, v in x.items()}
    alone["x"][:, 1:] = 0
    first, _ = scan(**cut(alone, 0, 1), **more)
    _, carry = scan(**cut(alone, 1, 60), **more, carry=scan(**cut(alone, 0, 1), **more)[1])
    _, start = scan(**cut(alone, 0, 1), **more)
    left = (carry.log_decay - start.log_decay).exp()
    torch.testing.assert_close(carry.state, start.state * left[..., None, None], rtol=0, atol=1e-12)
    assert first.isfinite().all()


def test_refusals():
    x, more = inputs(length=10)
    with pytest.raises(InputError, match="unknown backend 'pytorch'"):
        scan(**x, **more, backend="pytorch")
    with pytest.raises(InputError, match=r"B must be \(B, T, G, N\)"):
        scan(**{**x, "B": x["B"][:, :5]}, **more)
    with pytest.raises(InputError, match="heads must divide into groups"):
        scan(**{**x, "B": x["B"][:, :, [0, 0, 0]], "C": x["C"][:, :, [0, 0, 0]]}, **more)
    with pytest.raises(InputError, match="left padding"):
        scan(**x, **more, mask=torch.tensor([[True] * 5 + [False] * 5] * 2))
    with pytest.raises(InputError, match="mid-stream"):
        scan(**x, **more, policy=ScanPolicy(window=5), carry=scan(**x, **more)[1])
    with pytest.raises(InputError, match="per-head"):
        scan(**x, **more, policy=ScanPolicy(gain=(1.0, 2.0)))


@pytest.mark.parametrize("forgets", [20.0, 44.0, 52.0, 59.0, 70.0])
def test_gradients_of_pieces_that_forget(forgets):
    """Nats a piece of 64 tokens, up to where factors give way to differences: their own gradients must not overflow."""
    x, _ = inputs(length=192)
    x |= {"dt": torch.full_like(x["dt"], 0.1), "A": torch.full_like(x["A"], -forgets / 6.4)}
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = {k: v.to(dtype).detach().requires_grad_() for k, v in x.items()}
        y, _ = scan(**leaves, dt_softplus=False, backend="torch")
        grads.append(torch.autograd.grad(y.sum(), list(leaves.values())))
    for ours, expected in zip(*grads):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_backend_that_cannot_is_refused():
    backend = backends.Backend("picky", None, lambda: None, lambda p, call: "no windows" if p.window else None)
    backends.BACKENDS.register(backend)
    try:
        assert backends.choose(ScanPolicy(), "picky").name == "picky"
        with pytest.raises(InputError, match="no windows"):
            backends.choose(ScanPolicy(window=3), "picky")
        on_cpu = backends.Call(torch.device("cpu"), torch.float32, False, 4, 4)
        assert backends.choose(ScanPolicy(window=3), call=on_cpu).name == "torch"
    finally:
        backends.BACKENDS.remove("picky")


def test_the_reference_as_a_backend():
    x, more = inputs(length=40)
    policy = POLICIES["cap every 7 and 40"]
    y, carry = in_parts(x, more, [11, 30], policy=policy, backend="reference")
    expected, ours = scan(**x, **more, policy=policy)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(carry.log_decay, ours.log_decay, rtol=0, atol=1e-10)


def test_the_official_scan_says_what_it_cannot_do():
    from rnn_longctx.recurrence.backends import Call
    from rnn_longctx.recurrence.ssd import official

    cuda = Call(torch.device("cuda"), torch.bfloat16, False, 64, 128)
    assert "policy" in official.refuses(ScanPolicy(add=-0.1), cuda)
    assert "CUDA" in official.refuses(ScanPolicy(), Call(torch.device("cpu"), torch.float32, False, 64, 128))
    assert official.refuses(ScanPolicy(), cuda) is None
    if official.missing():
        x, more = inputs(length=10)
        with pytest.raises(InputError, match="backend 'mamba_ssm': needs"):
            scan(**x, **more, backend="mamba_ssm")


@pytest.mark.gpu
def test_the_official_scan():
    pytest.importorskip("mamba_ssm")
    x, more = inputs(length=300, dtype=torch.float32)
    x, more = ({k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in d.items()} for d in (x, more))
    expected, state = scan(**x, **more, backend="torch")
    first, carry = scan(**cut(x, 0, 130), **more, backend="mamba_ssm")
    rest, carry = scan(**cut(x, 130, 300), **more, backend="mamba_ssm", carry=carry)
    y = torch.cat([first, rest], 1)
    assert (y - expected).norm() / expected.norm() < 5e-3  # its products are tf32
    torch.testing.assert_close(carry.log_decay, state.log_decay, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_state_is_rounded_where_it_is_handed_on_and_nowhere_else(name, per_channel):
    policy, length = POLICIES[name], 137
    x, more = inputs(length=length, per_channel=per_channel, dtype=torch.float32)
    whole, kept = scan(**x, **more, policy=policy)
    same, carry = scan(**x, **more, policy=policy, state_dtype=torch.float32)
    assert torch.equal(whole, same) and torch.equal(kept.state, carry.state)
    for dtype in (torch.bfloat16, torch.float16):
        y, carry = scan(**x, **more, policy=policy, state_dtype=dtype)
        assert torch.equal(y, whole) and torch.equal(carry.state, kept.state.to(dtype))
        assert torch.equal(carry.log_decay, kept.log_decay) and carry.log_decay.dtype == torch.float64

        cuts = [1, 2, 3, *sorted(torch.randint(4, length, (5,)).unique().tolist())]
        found, carry = in_parts(x, more, cuts, policy=policy, state_dtype=dtype)
        expected, state = _rounding(x, more, cuts, policy, dtype)
        assert torch.equal(found, expected) and not torch.equal(found, whole)
        assert torch.equal(carry.state.float(), state) and carry.state.dtype == dtype


def _rounding(x, more, cuts, policy, dtype):
    """By hand, with carries of float32 in between."""
    carry, ys = None, []

    def rounded(t):
        return t.to(dtype).float()

    for i, j in zip([0, *cuts], [*cuts, x["x"].shape[1]]):
        y, carry = scan(**cut(x, i, j), **more, policy=policy, carry=carry)
        carry.state = rounded(carry.state)
        if (w := carry.window) is not None:
            w.block, w.x, w.B = carry.state, rounded(w.x), rounded(w.B)
            w.x_before, w.B_before, w.after = rounded(w.x_before), rounded(w.B_before), rounded(w.after)
        ys.append(y)
    return torch.cat(ys, 1), carry.state


def test_a_state_of_float64_is_worked_out_in_it():
    x, more = inputs(length=200, dtype=torch.float32)
    wide = [{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in d.items()} for d in (x, more)]
    _, exact = in_parts(*wide, [50, 120])
    y, carry = in_parts(x, more, [50, 120], state_dtype=torch.float64)
    _, narrow = in_parts(x, more, [50, 120])
    assert y.dtype == torch.float32 and carry.state.dtype == torch.float64
    error, usual = (carry.state - exact.state).norm(), (narrow.state - exact.state).norm()
    assert error < 1e-3 * usual
    back = scan(**cut(x, 0, 1), **more, carry=carry)[1]  # and is read on as usual
    assert back.state.dtype == torch.float32


class Look:
    every, whole = 10, False

    def __call__(self, statistics):
        self.square = statistics.square


def test_an_observer_does_not_see_the_rounding():
    x, more = inputs(length=90, dtype=torch.float32)
    seen = {}
    for dtype in (None, torch.bfloat16):
        look = Look()
        y, carry = scan(**x, **more, state_dtype=dtype, observer=look)
        seen[dtype] = (y, look.square, carry.state)
    assert torch.equal(seen[None][0], seen[torch.bfloat16][0]) and torch.equal(seen[None][1], seen[torch.bfloat16][1])
    assert torch.equal(seen[None][2].to(torch.bfloat16), seen[torch.bfloat16][2])
