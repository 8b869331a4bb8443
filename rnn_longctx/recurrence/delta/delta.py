"""The delta rule as a recurrence, and its backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Backend, Backends, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.delta import reference
from rnn_longctx.recurrence.delta.chunked import chunked_scan
from rnn_longctx.recurrence.gates import AnyGates, DeltaGates, ScanInputs
from rnn_longctx.recurrence.interface import RECURRENCES, Recurrence
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.rule import Rule, carry_after
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd.pytorch import log_decay_total


class _Delta(Rule):
    """The delta rule: see `rnn_longctx.recurrence.interface`."""

    name = "delta"
    refuses: ClassVar[Mapping[str, str]] = {
        "window": "the delta rule has no sliding window: a window subtracts an older state times its decay since, and "
        "what the delta rule does to a state is no factor but a matrix",
        "min_dt": "min_dt leaves out tokens by the size of their step dt, and the gates of a delta rule have no step",
    }
    follows = frozenset(f.name for f in fields(ScanPolicy)) - set(refuses)
    takes = (DeltaGates,)
    backends = Backends()

    def check(self, inputs: ScanInputs, gates: AnyGates, carry: ScanCarry | None) -> None:
        """Raise InputError if a shape does not fit, with its name, what was expected and what was given."""
        if not isinstance(gates, DeltaGates):
            raise InputError("the delta rule reads gates that say what is erased (DeltaGates)")
        if inputs.x.ndim != 4:
            raise InputError(f"x must be (B, T, H, P), got shape {tuple(inputs.x.shape)}")
        batch, length, heads, headdim = inputs.x.shape
        shared = (batch, length)
        for name, t in (("B", inputs.B), ("C", inputs.C), ("read", gates.read), ("along", gates.along)):
            if t is not None and (t.ndim != 4 or t.shape[:2] != shared or t.shape != inputs.B.shape):
                raise InputError(f"{name} must be (B, T, G, N) as B is, B, T = {shared}, got {tuple(t.shape)}")
        groups, d_state = inputs.B.shape[2:]
        if heads % groups:
            raise InputError(f"heads must divide into groups: H={heads} heads, G={groups} groups")
        per_head = (batch, length, heads)
        for name, t in (("input_scale", gates.input_scale), ("erase", gates.erase)):
            if t.shape != per_head:
                raise InputError(f"{name} must be (B, T, H) = {per_head} to go with x, got {tuple(t.shape)}")
        if gates.log_decay.shape not in (per_head, (*per_head, d_state)):
            raise InputError(
                f"log_decay must be (B, T, H) = {per_head} or (B, T, H, N) = {(*per_head, d_state)}, "
                f"got {tuple(gates.log_decay.shape)}"
            )
        if inputs.D is not None and inputs.D.shape not in ((heads,), (heads, headdim)):
            raise InputError(f"D must be (H,) = ({heads},) or (H, P) = {(heads, headdim)}, got {tuple(inputs.D.shape)}")
        expected = (batch, heads, headdim, d_state)
        if carry is not None and carry.state.shape != expected:
            raise InputError(f"the carry's state must be (B, H, P, N) = {expected}, got {tuple(carry.state.shape)}")

    def reference(
        self, inputs: ScanInputs, gates: AnyGates, span: Span, policy: ScanPolicy, carry: ScanCarry | None
    ) -> tuple[Tensor, ScanCarry]:
        """See `Recurrence.reference`."""
        assert isinstance(gates, DeltaGates)
        state, position = (None, None) if carry is None else (carry.state, carry.position)
        y, final, total = reference.scan(inputs, gates, span, policy=policy, state=state, position=position)
        return y, carry_after(final, total, inputs, span, carry)


DELTA: Recurrence = RECURRENCES.register(_Delta())


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """Read a call in PyTorch: every policy that the rule follows, any device and floating type."""
    policy, carry, counts = reading.policy, reading.carry, reading.counts
    dtype, length = carry.state.dtype, reading.inputs.x.shape[1]
    if counts is None and policy.caps:
        counts = carry.position[:, None] + torch.arange(1, length + 1, device="cpu")
    gates = reading.gates.worked_out(dtype, policy, reading.mask)
    assert isinstance(gates, DeltaGates)
    x, B, C = (t.to(dtype) for t in (reading.inputs.x, reading.inputs.B, reading.inputs.C))
    y, new = chunked_scan(ScanInputs(x, B, C), gates, policy=policy, carry=carry, counts=counts, drop=reading.drop)
    if (D := reading.inputs.D) is not None:
        y = torch.addcmul(y, x, (D if D.ndim == 2 else D[:, None]).to(dtype))
    new.log_decay = log_decay_total(carry.log_decay, gates.log_decay, reading.reset)
    return y.to(reading.inputs.x.dtype), new


def _reference(reading: Reading) -> tuple[Tensor, ScanCarry]:
    span = Span(reading.mask, reading.reset)
    y, new = DELTA.reference(reading.inputs, reading.gates, span, reading.policy, reading.carry)
    return y.to(reading.inputs.x.dtype), replace(new, state=new.state.to(reading.carry.state.dtype))


_always: Any = (lambda: None, lambda policy, call: None)  # never missing, refuses nothing
DELTA.backends.register(Backend("torch", run, *_always))
DELTA.backends.register(Backend("reference", _reference, *_always))
