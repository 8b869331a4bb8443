import math

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from streams import reference_scan

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy

numbers = st.floats(0.1, 2.0)
per_head = st.one_of(numbers, st.tuples(numbers, numbers, numbers))


@st.composite
def policies(draw):
    return ScanPolicy(
        mul=draw(per_head), add=draw(per_head), gain=draw(per_head), min_dt=draw(per_head),
        caps=tuple(Cap(draw(per_head), draw(st.integers(1, 9))) for _ in range(draw(st.integers(0, 2)))),
        reset=draw(st.one_of(st.none(), st.integers(1, 9))),
    )  # fmt: skip


@given(policies())
def test_yaml_round_trip_keeps_the_hash(policy):
    again = ScanPolicy.from_dict(yaml.safe_load(yaml.safe_dump(policy.to_dict())))
    assert again == policy and again.hash == policy.hash


@given(policies(), policies(), policies())
def test_composition_is_associative_and_plain_is_neutral(a, b, c):
    assert a.then(PLAIN) == a.then(PLAIN).then(PLAIN)
    left, right = a.then(b).then(c), a.then(b.then(c))
    for name in ("mul", "add", "gain", "min_dt"):
        values = [v if isinstance(v, tuple) else (v,) for v in (getattr(left, name), getattr(right, name))]
        assert all(math.isclose(x, y, rel_tol=1e-9) for x, y in zip(*values))
    assert left.caps == right.caps and left.reset == right.reset


def test_affine_parts_apply_left_to_right():
    both = ScanPolicy(mul=2.0, add=1.0).then(ScanPolicy(mul=3.0, add=-4.0))
    assert (both.mul, both.add) == (6.0, -1.0)
    assert ScanPolicy(window=5).then(ScanPolicy(window=3)).window == 3


def test_different_policies_have_different_hashes():
    made = [
        PLAIN,
        ScanPolicy(mul=2.0),
        ScanPolicy(add=2.0),
        ScanPolicy(caps=(Cap(2.0),)),
        ScanPolicy(caps=(Cap(2.0, 2),)),
        ScanPolicy(window=2),
        ScanPolicy(reset=2),
        ScanPolicy(start=torch.ones(1, 2, 3)),
    ]
    assert len({p.hash for p in made}) == len(made)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ScanPolicy(window=3, caps=(Cap(1.0),)), "cannot be combined with a window"),
    (lambda: ScanPolicy(window=3).then(ScanPolicy(caps=(Cap(1.0),))), "cannot be combined with a window"),
    (lambda: ScanPolicy(window=0), "at least 1"),
    (lambda: ScanPolicy(mul=math.nan), "NaN"),
    (lambda: Cap(0.0), "above 0"),
    (lambda: Cap(1.0, 0), "every k >= 1"),
    (lambda: ScanPolicy(mul=(1.0, 2.0)).then(ScanPolicy(mul=(1.0, 2.0, 3.0))), "2 and 3 heads"),
    (lambda: ScanPolicy.from_dict({"windw": 3}), 'did you mean "window"'),
])  # fmt: skip
def test_what_means_nothing_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_reference_is_the_recurrence():
    """Three tokens by hand: one head, one channel."""
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    ones = torch.ones(1, 3, 1, 1)
    dt = torch.tensor([0.5, 1.0, 0.25]).view(1, 3, 1)
    A = torch.tensor([-1.0])
    a = torch.exp(-dt[0, :, 0]).double()
    s1 = 0.5 * 1.0
    s2 = a[1] * s1 + 1.0 * 2.0
    s3 = a[2] * s2 + 0.25 * 3.0
    y, state, total = reference_scan(x, dt, A, ones, ones, dt_softplus=False)
    torch.testing.assert_close(y.flatten(), torch.stack([torch.tensor(s1).double(), s2, s3]))
    torch.testing.assert_close(state.flatten(), s3[None])
    torch.testing.assert_close(total.flatten(), torch.tensor([-1.75]).double())
    y, *_ = reference_scan(x, dt, A, ones, ones, dt_softplus=False, policy=ScanPolicy(caps=(Cap(1.0),)))
    assert y.flatten().tolist() == pytest.approx([0.5, 1.0, 1.0])
    y, *_ = reference_scan(x, dt, A, ones, ones, dt_softplus=False, policy=ScanPolicy(window=1))
    assert y.flatten().tolist() == pytest.approx([0.5, 2.0, 0.75])
