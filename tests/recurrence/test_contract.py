"""Every recurrence's backends against its definition, for every field of a policy, with stepped and given gates."""

from dataclasses import fields, replace

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Backends
from rnn_longctx.recurrence.delta import DELTA
from rnn_longctx.recurrence.gates import Gates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.interface import RECURRENCES
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.ssd import SSD
from rnn_longctx.testing import recurrences as contract

GATES = {
    f"{kind}, per channel" if per_channel else kind: {"kind": kind, "per_channel": per_channel}
    for kind in contract.KINDS
    for per_channel in (False, True)
}
CASES = [(name, backend) for name in RECURRENCES for backend in contract.running(RECURRENCES[name])]


def cases():
    """All policies with gates of every kind that a recurrence takes; with others one, which is refused."""
    for name, backend in CASES:
        for gates, settings in GATES.items():
            takes = contract.KINDS[settings["kind"]] in RECURRENCES[name].takes
            for policy in contract.POLICIES if takes else ["plain"]:
                yield pytest.param(name, backend, gates, policy, id=f"{name}-{backend}-{gates}-{policy}")


@pytest.mark.parametrize(("name", "backend", "gates", "policy"), cases())
def test_backends_follow_the_definition(name, backend, gates, policy):
    recurrence = RECURRENCES[name]
    reason = contract.check_backend(recurrence, backend, contract.POLICIES[policy], **GATES[gates])
    if backend in ("torch", "reference"):  # these read whatever means something
        kind = GATES[gates]["kind"]
        means_nothing = contract.KINDS[kind] not in recurrence.takes
        assert (reason is not None) == (means_nothing or contract.refused(recurrence, contract.POLICIES[policy], kind))


def test_every_field_has_a_policy():
    """A field that is added to policies must be added to the contract."""
    changed = {name for policy in contract.POLICIES.values() for name in policy.changes}
    assert changed == {f.name for f in fields(ScanPolicy)} == SSD.follows | DELTA.follows
    assert SSD.follows == {"mul", "add", "gain", "min_dt", "caps", "window", "reset", "start"}
    assert DELTA.follows == {"mul", "add", "gain", "erase", "least_erase", "caps", "reset", "start"}


def test_the_registry():
    assert "ssd" in RECURRENCES and RECURRENCES["ssd"] is SSD
    with pytest.raises(InputError, match="unknown recurrence 'sssd'; did you mean"):
        RECURRENCES["sssd"]


def test_given_gates_have_no_step():
    drawn = contract.stream("given")
    with pytest.raises(InputError, match="no step"):
        SSD.scan(drawn.inputs, drawn.gates, policy=ScanPolicy(min_dt=0.1))


def test_given_gates_are_those_worked_out():
    """Bit for bit: what steps give, given."""
    for per_channel in (False, True):
        drawn = contract.stream("stepped", per_channel)
        gates = drawn.gates.worked_out(torch.float64)
        for policy in contract.POLICIES.values():
            if not contract.refused(SSD, policy, "given"):
                ours, theirs = (SSD.scan(drawn.inputs, g, policy=policy, backend="torch") for g in (drawn.gates, gates))
                assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].state, theirs[1].state)


def test_shapes_are_checked_by_name():
    drawn = contract.stream("given")
    wrong = Gates(drawn.gates.log_decay[..., None], drawn.gates.input_scale)
    with pytest.raises(InputError, match=r"log_decay must be \(B, T, H\) = \(2, 33, 4\)"):
        SSD.scan(drawn.inputs, wrong)
    with pytest.raises(InputError, match=r"input_scale must be \(B, T, H\)"):
        SSD.scan(drawn.inputs, Gates(drawn.gates.log_decay, drawn.gates.input_scale[:, 1:]))


class Forgetful:
    """A recurrence whose backend "short" forgets the last token: what the contract must find."""

    name, follows, takes = "forgetful", SSD.follows, SSD.takes
    backends, reference, state = SSD.backends, SSD.reference, staticmethod(SSD.state)

    def __init__(self, what):
        self.what = what

    def scan(self, inputs, gates, span, **settings):
        y, carry = SSD.scan(inputs, gates, span, **settings)
        if self.what == "outputs":
            y = y + 1e-6
        elif self.what == "states":
            carry.state = carry.state * 1.001
        elif self.what == "positions":
            carry.position = carry.position + 1
        return y, carry


@pytest.mark.parametrize("what", ["outputs", "states", "positions"])
def test_the_contract_finds(what):
    with pytest.raises(AssertionError, match=what):
        contract.check_backend(Forgetful(what), "torch", PLAIN, kind="stepped")


def test_the_contract_finds_what_is_not_refused():
    """A recurrence that says it does not follow caps, and reads on."""
    lax = Forgetful(None)
    lax.follows = SSD.follows - {"caps"}
    with pytest.raises(AssertionError, match="does not refuse"):
        contract.check_backend(lax, "torch", contract.POLICIES["caps"], kind="stepped")


@pytest.mark.parametrize("name", RECURRENCES)
def test_what_is_followed_is_read(name):
    contract.check_coverage(RECURRENCES[name])


def some_backends(refuses, follows=SSD.follows, takes=SSD.takes):
    """A recurrence of one backend, which refuses more than the scan's own."""
    rule, backend = Forgetful(None), SSD.backends.known["torch"]
    rule.follows, rule.takes, rule.backends = follows, takes, Backends()
    rule.backends.register(replace(backend, refuses=lambda *a: refuses(*a) or backend.refuses(*a)))
    return rule


@pytest.mark.parametrize(
    ("refuses", "follows", "message"),
    [
        (lambda policy, call: "not today", SSD.follows, "no backend of 'forgetful' reads SteppedGates"),
        (lambda policy, call: None if call.stepped else "no", SSD.follows, "no backend of 'forgetful' reads Gates"),
        (lambda policy, call: "no" if policy.caps else None, SSD.follows, "reads caps of a policy with SteppedGates"),
        (
            lambda policy, call: "no" if policy.reset and not call.stepped else None,
            SSD.follows,
            "reset of .* with Gates",
        ),
        (lambda policy, call: None, SSD.follows | {"warmth"}, "reads warmth of a policy"),
    ],
)
def test_the_contract_finds_what_nobody_reads(refuses, follows, message):
    contract.check_coverage(some_backends(lambda policy, call: None))
    with pytest.raises(AssertionError, match=message):
        contract.check_recurrence(some_backends(refuses, follows))


def test_the_contract_finds_fields_of_steps_without_steps():
    with pytest.raises(AssertionError, match="follows min_dt of a policy, and takes no gates"):
        contract.check_recurrence(some_backends(lambda policy, call: None, takes=(Gates,)))


def test_the_contract_finds_that_nothing_runs():
    rule = some_backends(lambda policy, call: None)
    rule.backends.remove("torch")
    with pytest.raises(AssertionError, match="no backend of 'forgetful' runs here"):
        contract.check_recurrence(rule)


def test_inputs_by_name():
    drawn = contract.stream("stepped")
    x, B, C = (t[:, 2:5] for t in (drawn.inputs.x, drawn.inputs.B, drawn.inputs.C))
    part = drawn.part(2, 5)
    assert isinstance(part.inputs, ScanInputs) and isinstance(part.gates, SteppedGates)
    assert all(torch.equal(a, b) for a, b in zip((x, B, C), (part.inputs.x, part.inputs.B, part.inputs.C)))
