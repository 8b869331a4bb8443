"""The contract of a recurrence: every backend follows the definition, under every policy, or says why it cannot.

    check_recurrence(SSD)

A check draws a random stream with torch's generator, and raises AssertionError where results lie too far apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Call
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import STEP_FIELDS, AnyGates, DeltaGates, Gates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.interface import Recurrence
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy, nested
from rnn_longctx.recurrence.span import WHOLE, Span

BATCH, LENGTH, HEADS, HEADDIM, GROUPS, D_STATE = 2, 33, 4, 5, 2, 7
CUTS = (1, 19)  # a call of one token, and one that ends inside a chunk
POSITION = 5  # tokens read before a stream that goes on from a state


@dataclass(frozen=True, eq=False)
class Stream:
    """A random stream: what a scan reads, T tokens."""

    inputs: ScanInputs
    gates: AnyGates
    span: Span = WHOLE

    def part(self, start: int, stop: int) -> Stream:
        """Return the stream of the tokens from `start` up to and without `stop`."""
        mask, reset = (None if t is None else t[:, start:stop] for t in (self.span.mask, self.span.reset))
        return Stream(self.inputs.tokens(start, stop), self.gates.tokens(start, stop), Span(mask, reset))

    def to(self, dtype: torch.dtype) -> Stream:
        """Return the stream in another type."""
        inputs = ScanInputs(*(None if t is None else t.to(dtype) for t in _tensors(self.inputs)))  # type: ignore[arg-type]
        gates = self.gates.from_tensors(*(None if t is None else t.to(dtype) for t in self.gates.tensors))
        return Stream(inputs, gates, self.span)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (*_tensors(self.inputs), *self.gates.tensors) if t is not None]


def _tensors(inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    return inputs.x, inputs.B, inputs.C, inputs.D


KINDS: dict[str, type] = {
    "stepped": SteppedGates,
    "given": Gates,
    "erasing": DeltaGates,
    "erasing, general": DeltaGates,  # what is read and what is erased are no keys, and the read comes before the decay
}


def stream(kind: str, per_channel: bool = False, marks: bool = False) -> Stream:
    """Return a random stream in float64.

    Args:
        kind: of its gates, among `KINDS`.
        marks: with padding before the second row, and documents that begin in both.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def keys() -> Tensor:  # below 1, so that what a rule erases does not overshoot
        return normal(*tokens, GROUPS, D_STATE) / math.sqrt(D_STATE)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, dtype=torch.float64)

    tokens, state = (BATCH, LENGTH), (HEADS, D_STATE) if per_channel else (HEADS,)
    B, C = keys(), normal(*tokens, GROUPS, D_STATE)
    inputs = ScanInputs(normal(*tokens, HEADS, HEADDIM), B, C, normal(HEADS))
    gates: AnyGates
    if kind == "stepped":
        gates = SteppedGates(normal(*tokens, HEADS), -between(0, 0.5, *state), normal(HEADS) - 1, (0.01, 2.0))
    else:
        log_decay, scale = -between(0, 0.5, *tokens, *state), between(0, 1, *tokens, HEADS)
        if kind == "given":
            gates = Gates(log_decay, scale)
        elif kind == "erasing":
            gates = DeltaGates(log_decay, scale)
        else:
            gates = DeltaGates(log_decay, scale, between(-1, 1, *tokens, HEADS), keys(), keys(), decay_first=False)
    mask = reset = None
    if marks:
        mask = torch.ones(*tokens, dtype=torch.bool)
        mask[1, :6] = False
        reset = torch.zeros(*tokens, dtype=torch.bool)
        reset[0, 20] = reset[0, 21] = reset[1, 17] = True
    return Stream(inputs, gates, Span(mask, reset))


POLICIES = {
    "plain": PLAIN,
    "mul": ScanPolicy(mul=(0.5, 1.0, 2.0, 0.0)),
    "add": ScanPolicy(add=math.log(0.99)),
    "gain": ScanPolicy(gain=(1.0, 0.5, 2.0, 1.0)),
    "min_dt": ScanPolicy(min_dt=0.3),
    "gates": ScanPolicy(mul=0.5, add=-0.01, gain=0.75),
    "erase": ScanPolicy(erase=(0.0, 0.5, 1.0, 1.5)),
    "least_erase": ScanPolicy(erase=0.5, least_erase=0.3),
    "caps": ScanPolicy(caps=(Cap((0.5, 1.0, 2.0, 900.0)),)),
    "caps, every 16": ScanPolicy(caps=(Cap(0.7, 16),)),
    "caps, two": ScanPolicy(caps=(Cap(1.5, 5), Cap(1.0, 7))),
    "window": ScanPolicy(window=9),
    "reset": ScanPolicy(reset=13),
    "start": ScanPolicy(start=nested(torch.linspace(-1, 1, HEADS * HEADDIM * D_STATE).view(HEADS, HEADDIM, D_STATE))),
}


def refused(recurrence: Recurrence, policy: ScanPolicy, kind: str) -> bool:
    """Return whether a policy means nothing to a recurrence with gates of a kind."""
    followed = recurrence.follows if kind == "stepped" else recurrence.follows - STEP_FIELDS
    return not policy.changes <= followed


def running(recurrence: Recurrence) -> list[str]:
    """Return the names of the backends that can run on this machine."""
    return [name for name, backend in recurrence.backends.known.items() if not backend.missing()]


def check_recurrence(recurrence: Recurrence) -> None:
    """Hold every backend that runs here to the definition, under every policy and with gates of every kind, and the
    recurrence to what it says that it follows and takes (`check_coverage`)."""
    check_coverage(recurrence)
    for backend in running(recurrence):
        for policy in POLICIES.values():
            for kind in KINDS:
                for per_channel in (False, True):
                    check_backend(recurrence, backend, policy, kind=kind, per_channel=per_channel)


def check_coverage(recurrence: Recurrence) -> None:
    """Every field of a policy that the recurrence follows is read by some backend that runs here, with gates of every
    kind that it takes: a backend may refuse, and not all of them."""
    name, backends, read = recurrence.name, running(recurrence), set()
    assert backends, f"no backend of {name!r} runs here"
    assert recurrence.takes, f"{name!r} takes no kind of gates"
    for kind, gates in KINDS.items():
        if gates not in recurrence.takes:
            continue
        policies = [policy for policy in POLICIES.values() if not refused(recurrence, policy, kind)]
        accepted = [p for p in policies if any(_dtype(recurrence, b, p, kind, False) for b in backends)]
        assert accepted, f"no backend of {name!r} reads {gates.__name__}"
        fields_read = set().union(*(policy.changes for policy in accepted))
        unread = recurrence.follows - fields_read - (frozenset() if kind == "stepped" else STEP_FIELDS)
        assert not unread, f"no backend of {name!r} reads {', '.join(sorted(unread))} of a policy with {gates.__name__}"
        read |= fields_read
    unread = recurrence.follows - read
    assert not unread, f"{name!r} follows {', '.join(sorted(unread))} of a policy, and takes no gates that have it"


def check_backend(
    recurrence: Recurrence, backend: str, policy: ScanPolicy, *, kind: str, per_channel: bool = False
) -> str | None:
    """Hold one backend to the definition under one policy: outputs, states, total log-decays and positions, of a stream
    in one call and in several, with padding and documents, and from a state on; and gradients, where it reads float64.

    Returns: why it does not support the policy or the gates, if it says so itself (and it must then refuse to read
        them), or None.
    """
    if KINDS[kind] not in recurrence.takes or refused(recurrence, policy, kind):
        drawn = stream(kind, per_channel)
        return _refusal(recurrence, backend, policy, drawn)
    dtype = _dtype(recurrence, backend, policy, kind, per_channel)
    if dtype is None:
        drawn = stream(kind, per_channel).to(torch.float32)
        return _refusal(recurrence, backend, policy, drawn)
    for marks in (False, True):
        drawn = stream(kind, per_channel, marks).to(dtype)
        expected, after = recurrence.reference(drawn.inputs, drawn.gates, drawn.span, policy, None)
        for cuts in ((), CUTS) if backend != "reference" or policy.window is None else ((),):
            y, carry = _read(recurrence, backend, policy, drawn, cuts)
            _same(recurrence, drawn, (y, carry), (expected, after))
        if policy.window is None:
            begun = replace(drawn, span=Span(reset=drawn.span.reset))
            before = _before(begun, dtype)
            expected, after = recurrence.reference(begun.inputs, begun.gates, begun.span, policy, before)
            _same(recurrence, begun, _read(recurrence, backend, policy, begun, (), before), (expected, after))
    if dtype == torch.float64 and backend != "reference":  # the definition's are those of the definition
        _check_gradients(recurrence, backend, policy, stream(kind, per_channel))
    return None


def _dtype(
    recurrence: Recurrence, backend: str, policy: ScanPolicy, kind: str, per_channel: bool
) -> torch.dtype | None:
    """Return the most precise type in which a backend reads under a policy, or None if it does not."""
    for dtype in (torch.float64, torch.float32):
        call = Call(torch.device("cpu"), dtype, per_channel, HEADDIM, D_STATE, kind == "stepped")
        if not recurrence.backends.known[backend].refuses(policy, call):
            return dtype
    return None


def _refusal(recurrence: Recurrence, backend: str, policy: ScanPolicy, drawn: Stream) -> str:
    try:
        _read(recurrence, backend, policy, drawn, ())
    except InputError as error:
        return str(error)
    raise AssertionError(f"backend {backend!r} of {recurrence.name!r} does not refuse what it cannot follow: {policy}")


def _before(drawn: Stream, dtype: torch.dtype) -> ScanCarry:
    """Return the carry of rows that stand at POSITION, with a random state."""
    start = ScanCarry.start(BATCH, HEADS, HEADDIM, D_STATE, per_channel=drawn.gates.per_channel, dtype=dtype)
    log_decay = start.log_decay - torch.rand_like(start.log_decay)
    return ScanCarry(torch.randn_like(start.state), torch.full((BATCH,), POSITION), log_decay)


def _read(
    recurrence: Recurrence,
    backend: str,
    policy: ScanPolicy,
    drawn: Stream,
    cuts: tuple[int, ...],
    carry: ScanCarry | None = None,
) -> tuple[Tensor, ScanCarry]:
    outputs = []
    for part in _parts(drawn, cuts):
        y, carry = recurrence.scan(part.inputs, part.gates, part.span, policy=policy, carry=carry, backend=backend)
        outputs.append(y)
    assert carry is not None
    return torch.cat(outputs, 1), carry


def _parts(drawn: Stream, cuts: tuple[int, ...]) -> Iterator[Stream]:
    for start, stop in zip((0, *cuts), (*cuts, LENGTH)):
        yield drawn.part(start, stop)


def _same(
    recurrence: Recurrence, drawn: Stream, ours: tuple[Tensor, ScanCarry], expected: tuple[Tensor, ScanCarry]
) -> None:
    """Compare outputs (where tokens are real) and carries: to 1e-9 in float64, to 1e-4 in float32."""
    atol = 1e-9 if drawn.inputs.x.dtype == torch.float64 else 1e-4
    mask, (y, carry), (definition, after) = drawn.span.mask, ours, expected
    real = torch.ones(y.shape[:2], dtype=torch.bool) if mask is None else mask
    state, log_decay = recurrence.state(carry), carry.log_decay
    for what, a, b in (
        ("outputs", y[real], definition[real]),
        ("states", state, after.state),
        ("log-decays", log_decay, after.log_decay),
    ):
        size = 1 + float(b.abs().max())
        worst = float((a.double() - b.double()).abs().max()) / size
        assert worst <= atol, f"{what} are off by {worst:.1e} (more than {atol:.0e})"
    assert torch.equal(carry.position, after.position), f"positions are {carry.position}, not {after.position}"


def _check_gradients(recurrence: Recurrence, backend: str, policy: ScanPolicy, drawn: Stream) -> None:
    leaves = [t.requires_grad_() for t in drawn.leaves]
    weight = torch.randn_like(drawn.inputs.x)
    y, _ = _read(recurrence, backend, policy, drawn, ())
    expected, _ = recurrence.reference(drawn.inputs, drawn.gates, drawn.span, policy, None)
    grads = [torch.autograd.grad((v * weight).sum(), leaves) for v in (y, expected)]
    for ours, definition in zip(*grads):
        torch.testing.assert_close(ours, definition, rtol=1e-6, atol=1e-8)
