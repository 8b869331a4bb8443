"""The chunked delta rule against its definition where chunks are hard: decays, betas, parallel keys, cuts."""

from dataclasses import replace

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.delta import DELTA, reference
from rnn_longctx.recurrence.gates import DeltaGates, Gates, ScanInputs
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.recurrence.span import Span

LENGTH, HEADS, P, N = 150, 2, 3, 6  # two whole chunks and a part of one


def unit(t):
    return t / t.norm(dim=-1, keepdim=True)


def stream(per_channel=False, beta=(0.0, 2.0), nats=20.0, parallel=0.0, general=False):
    """Random inputs in float64: keys of length 1, `nats` of decay a chunk at the most, betas drawn in a range.

    parallel: 1 makes all keys the same, but for a millionth.
    """
    shape = (1, LENGTH, HEADS)
    key = torch.randn(1, LENGTH, HEADS, N, dtype=torch.float64)
    key = unit(parallel * key[:, :1] + (1 - parallel + 1e-6) * key)
    query = unit(torch.randn_like(key))
    inputs = ScanInputs(torch.randn(*shape, P, dtype=torch.float64), key, query)
    decay = -nats / 64 * torch.rand(*shape, *([N] if per_channel else []), dtype=torch.float64)
    low, high = beta
    betas = low + (high - low) * torch.rand(*shape, dtype=torch.float64)
    if not general:
        return inputs, DeltaGates(decay, betas)
    along = key * torch.rand_like(key)  # RWKV-7: a gate a channel between 0 and 1
    return inputs, DeltaGates(decay, torch.ones_like(betas), torch.ones_like(betas), key, along, decay_first=False)


def cast(inputs, gates, dtype):
    gates = gates.from_tensors(*(None if t is None else t.to(dtype) for t in gates.tensors))
    return ScanInputs(*(t.to(dtype) for t in (inputs.x, inputs.B, inputs.C))), gates


def error(ours, theirs):
    return float((ours.double() - theirs).abs().max() / (1 + theirs.abs().max()))


CASES = {
    "plain": {},
    "no decay": {"nats": 0.0},
    "hard decays": {"nats": 200.0},  # 100 nats a chunk on average
    "beta near 0": {"beta": (0.0, 1e-3)},
    "beta near 1": {"beta": (0.999, 1.0)},
    "beta near 2": {"beta": (1.999, 2.0)},
    "keys nearly parallel": {"parallel": 1.0, "beta": (0.5, 2.0)},
    "general": {"general": True},
    "general, hard decays": {"general": True, "nats": 200.0},
}


@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
@pytest.mark.parametrize("case", CASES)
def test_chunks_follow_the_definition(case, per_channel):
    inputs, gates = stream(per_channel, **CASES[case])
    y, state, total = reference.scan(inputs, gates)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        ours, carry = DELTA.scan(*cast(inputs, gates, dtype), backend="torch")
        assert error(ours, y) <= bound and error(carry.state, state) <= bound
        assert error(carry.log_decay, total) <= bound


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_any_cut_is_the_same(per_channel, general):
    inputs, gates = stream(per_channel, general=general)
    y, whole = DELTA.scan(inputs, gates)
    edges = sorted({0, 1, LENGTH, *torch.randint(2, LENGTH, (3,)).tolist()})
    outputs, carry = [], None
    for t, u in zip(edges, edges[1:]):
        part, carry = DELTA.scan(inputs.tokens(t, u), gates.tokens(t, u), carry=carry)
        outputs.append(part)
    assert error(torch.cat(outputs, 1), y) <= 1e-12 and error(carry.state, whole.state) <= 1e-12


@pytest.mark.parametrize("nats", [400.0, 1e4, 1e5])
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_gradients_with_hard_decays(per_channel, general, nats):
    """Also what stands above the diagonal, and is masked, must be finite. Decays of a head forget nothing in the other,
    so that some chunks are cut in halves, down to single tokens, and some are not."""
    inputs, gates = stream(per_channel, nats=nats, general=general)
    gates.log_decay[:, :, 1] *= 1e-3
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.B, inputs.C, *gates.tensors) if t is not None]
    weight = torch.randn_like(inputs.x)
    grads = []
    for backend in ("torch", "reference"):
        y, _ = DELTA.scan(inputs, gates, backend=backend)
        grads.append(torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True))
    for ours, theirs in zip(*grads):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("per_channel", [False, True], ids=["a head", "a channel"])
def test_what_grows_and_forgets_in_one_chunk(per_channel, general):
    inputs, gates = stream(per_channel, beta=(0.5, 1.0), nats=6.4, general=general)
    gates.log_decay[:, :64] += 1.0
    gates.log_decay[:, 0] -= 30.0
    gates.log_decay[:, 32] -= 100.0
    expected, state, _ = reference.scan(inputs, gates)
    y, carry = DELTA.scan(*cast(inputs, gates, torch.float32), backend="torch")
    assert error(y, expected) < 1e-4 and error(carry.state, state) < 1e-4


def test_caps_between_chunks_and_at_every_token():
    inputs, gates = stream(nats=2.0)
    for every in (1, 7, 8, 50, 64):
        policy = ScanPolicy(caps=(Cap((0.8, 1.2), every),))
        y, state, _ = reference.scan(inputs, gates, policy=policy)
        ours, carry = DELTA.scan(inputs, gates, policy=policy, backend="torch")
        assert error(ours, y) <= 1e-10 and error(carry.state, state) <= 1e-10
        assert every > 1 or bool((carry.state.flatten(2).norm(dim=-1) <= torch.tensor([0.8, 1.2]) + 1e-12).all())


def test_erasing_as_much_as_is_written():
    inputs, gates = stream()
    for policy in (ScanPolicy(), ScanPolicy(gain=0.5), ScanPolicy(gain=(0.5, 2.0), erase=0.7, least_erase=0.2)):
        ours, _ = DELTA.scan(inputs, gates, policy=policy)
        theirs, _ = DELTA.scan(inputs, replace(gates, erase=gates.input_scale), policy=policy)
        assert torch.equal(ours, theirs)


def test_erasing_scaled_to_nothing_is_the_scan():
    """erase 0 leaves gated linear attention: the scan with the same gates."""
    from rnn_longctx.recurrence.ssd import SSD

    inputs, gates = stream(per_channel=True)
    ours, carry = DELTA.scan(inputs, gates, policy=ScanPolicy(erase=0.0))
    theirs, after = SSD.scan(inputs, Gates(gates.log_decay, gates.input_scale))
    assert error(ours, theirs) <= 1e-12 and error(carry.state, after.state) <= 1e-12


def test_a_key_is_overwritten():
    """With beta 1, no decay and keys of length 1 a key answers with what was written to it last."""
    inputs, gates = stream(beta=(1.0, 1.0), nats=0.0)
    y, _ = DELTA.scan(replace(inputs, C=inputs.B), gates)
    assert error(y, inputs.x) <= 1e-12


def test_the_general_form():
    """S (diag(a) + p q^T) + w v k^T, written out."""
    inputs, gates = stream(per_channel=True, general=True)
    p, q = 0.3 * torch.randn_like(inputs.B), 0.3 * torch.randn_like(inputs.B)
    minus = -torch.ones_like(gates.input_scale)
    general = DeltaGates(gates.log_decay, gates.input_scale, minus, p, q, decay_first=False)
    y, carry = DELTA.scan(inputs, general)
    state = torch.zeros(1, HEADS, P, N, dtype=torch.float64)
    for t in range(LENGTH):
        move = torch.diag_embed(gates.log_decay[:, t].exp()) + p[:, t, :, :, None] * q[:, t, :, None]
        state = (
            state @ move + inputs.x[:, t, ..., None] * inputs.B[:, t, :, None] * gates.input_scale[:, t, :, None, None]
        )
    assert error(carry.state, state) <= 1e-10
    assert error(y[:, -1], (state @ inputs.C[:, -1, ..., None])[..., 0]) <= 1e-10


@pytest.mark.parametrize(
    ("policy", "message"),
    [(ScanPolicy(window=5), "the delta rule has no sliding window"), (ScanPolicy(min_dt=0.1), "have no step")],
)
def test_what_means_nothing_is_refused(policy, message):
    inputs, gates = stream()
    for backend in (None, "torch", "reference"):
        with pytest.raises(InputError, match=message):
            DELTA.scan(inputs, gates, policy=policy, backend=backend)


def test_shapes_are_checked_by_name():
    inputs, gates = stream()
    with pytest.raises(InputError, match=r"erase must be \(B, T, H\) = \(1, 150, 2\) to go with x"):
        DELTA.scan(inputs, replace(gates, erase=gates.input_scale[:, 1:]))
    with pytest.raises(InputError, match=r"along must be \(B, T, G, N\) = \(1, 150, 2, 6\) as B is"):
        DELTA.scan(inputs, replace(gates, along=inputs.B[..., 1:]))
    with pytest.raises(InputError, match="log_decay must be"):
        DELTA.scan(inputs, replace(gates, log_decay=gates.log_decay[..., None]))
    with pytest.raises(InputError, match="gates that say what is erased"):
        DELTA.scan(inputs, Gates(gates.log_decay, gates.input_scale))


def test_an_observer_sees_the_states():
    from rnn_longctx.recurrence.statistics import Statistics

    class Seen:
        every, whole = 50, True

        def __call__(self, statistics: Statistics) -> None:
            self.statistics = statistics

    inputs, gates = stream(per_channel=True)
    seen = Seen()
    DELTA.scan(inputs, gates, observer=seen)
    assert seen.statistics.position.tolist() == [50, 100, 150]
    for i, position in enumerate((50, 100, 150)):
        _, state, total = reference.scan(inputs.tokens(0, position), gates.tokens(0, position))
        assert error(seen.statistics.state[:, :, i], state) <= 1e-10
        assert error(seen.statistics.norm[..., i], state.flatten(2).norm(dim=-1)) <= 1e-10
        assert error(seen.statistics.log_decay[..., i], total) <= 1e-10


def test_padding_and_documents_reset_rows():
    inputs, gates = stream()
    reset = torch.zeros(1, LENGTH, dtype=torch.bool)
    reset[0, 70] = True
    y, carry = DELTA.scan(inputs, gates, Span(reset=reset))
    alone, after = DELTA.scan(inputs.tokens(70, LENGTH), gates.tokens(70, LENGTH))
    assert error(y[:, 70:], alone) <= 1e-12 and error(carry.state, after.state) <= 1e-12
    assert carry.position.tolist() == [LENGTH - 70]
