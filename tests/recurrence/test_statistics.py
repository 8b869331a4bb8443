"""Statistics of states from inside the scan, against states looked at one by one."""

import math

import pytest
import torch
from streams import scan

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.recurrence.ssd.window import window_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = {
    "plain": ScanPolicy(),
    "rri": ScanPolicy(add=math.log(0.99), gain=0.75),
    "cap every 16": ScanPolicy(caps=(Cap(1.5, 16),)),
    "cap every token": ScanPolicy(caps=(Cap(1.5),)),
    "window": ScanPolicy(window=24),
    "reset": ScanPolicy(reset=40),
    "strong decay": ScanPolicy(mul=60.0),
}


class Kept:
    def __init__(self, every):
        self.every, self.whole, self.seen = every, False, []

    def __call__(self, statistics):
        self.seen.append(statistics)


def inputs(length, batch=2, heads=3, headdim=20, d_state=24):
    def normal(*shape):
        return torch.randn(*shape, device=DEVICE)

    return {"x": normal(batch, length, heads, headdim), "dt": normal(batch, length, heads) - 1,
            "B": normal(batch, length, 1, d_state), "C": normal(batch, length, 1, d_state)}  # fmt: skip


def part(x, i, j):
    return {k: v[:, i:j] for k, v in x.items()}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", POLICIES)
def test_against_states_one_by_one(name, backend, monkeypatch):
    if backend == "triton":
        if triton.missing():
            pytest.skip(triton.missing())
        from rnn_longctx.recurrence.ssd.kernels import launch

        if DEVICE == "cpu":
            monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(16, 16, 32, 4, 1))
            monkeypatch.setattr(launch, "segment_chunks", lambda *_: 2)
    every = 32 if DEVICE == "cpu" else 128
    length, A, policy = 2 * every + 21, -torch.rand(3, device=DEVICE), POLICIES[name]
    x, observer = inputs(length), Kept(every)
    carry = None
    for i, j in ((0, 5), (5, length)):  # the second call begins between two looks
        _, carry = scan(**part(x, i, j), A=A, policy=policy, carry=carry, backend=backend, observer=observer)
    found = observer.seen
    assert [p for s in found for p in s.position.tolist()] == [every, 2 * every]

    other = None
    for k in range(2):
        _, other = scan(**part(x, k * every, (k + 1) * every), A=A, policy=policy, carry=other, backend="torch")
        state = window_state(other).flatten(-2)
        for ours, expected in (
            (torch.cat([s.total for s in found], -1)[..., k], state.sum(-1)),
            (torch.cat([s.norm for s in found], -1)[..., k], state.norm(dim=-1)),
            (torch.cat([s.peak for s in found], -1)[..., k], state.abs().amax(-1)),
            (torch.cat([s.log_decay for s in found], -1)[..., k], other.log_decay),
        ):
            torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-4, atol=1e-4)
    last, _ = scan(**part(x, 0, length), A=A, policy=policy, backend="torch")
    again, _ = scan(**part(x, 0, length), A=A, policy=policy, backend=backend, observer=Kept(every))
    torch.testing.assert_close(again, last, rtol=1e-4, atol=1e-4)  # looking changes nothing


def test_mean_and_rms():
    observer = Kept(8)
    _, carry = scan(**inputs(8), A=-torch.rand(3, device=DEVICE), backend="torch", observer=observer)
    (seen,) = observer.seen
    torch.testing.assert_close(seen.mean[..., 0], carry.state.mean((-2, -1)))
    torch.testing.assert_close(seen.rms[..., 0], carry.state.square().mean((-2, -1)).sqrt())


def test_rows_must_stand_together():
    x, A = inputs(9), -torch.rand(3, device=DEVICE)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[1, 0] = False
    with pytest.raises(InputError, match="one position"):
        scan(**x, A=A, mask=mask, observer=Kept(4))
    _, carry = scan(**x, A=A, mask=mask)
    with pytest.raises(InputError, match="one position"):
        scan(**x, A=A, carry=carry, observer=Kept(4))


def test_gradients_are_kept():
    x, A = inputs(64), -torch.rand(3, device=DEVICE)
    for name in ("D", "dt_bias"):
        leaf = torch.rand(3, device=DEVICE, requires_grad=True)
        y, _ = scan(**x, A=A, **{name: leaf}, observer=Kept(16))
        assert torch.autograd.grad(y.sum(), leaf)[0].abs().sum() > 0


def test_no_tokens():
    x, A = inputs(3), -torch.rand(3, device=DEVICE)
    observer = Kept(2)
    _, carry = scan(**x, A=A, observer=observer)
    y, after = scan(**part(x, 0, 0), A=A, carry=carry, observer=observer)
    assert y.shape[1] == 0 and after.position.tolist() == [3, 3] and len(observer.seen) == 1
