"""The delta rule as a recurrence, and its backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import Backend, Backends, Call, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.delta import fla, pytorch, reference
from rnn_longctx.recurrence.fla import missing
from rnn_longctx.recurrence.gates import AnyGates, DeltaGates, Gates, ScanInputs
from rnn_longctx.recurrence.interface import RECURRENCES, Recurrence
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.rule import Rule, carry_after
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd.shapes import check_shapes


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
        check_shapes(inputs, Gates(gates.log_decay, gates.input_scale), carry)
        for name, t in (("read", gates.read), ("along", gates.along)):
            if t is not None and t.shape != inputs.B.shape:
                shape = tuple(inputs.B.shape)
                raise InputError(f"{name} must be (B, T, G, N) = {shape} as B is, got {tuple(t.shape)}")
        if gates.erase is not None and gates.erase.shape != gates.input_scale.shape:
            per_head = tuple(gates.input_scale.shape)
            raise InputError(f"erase must be (B, T, H) = {per_head} to go with x, got {tuple(gates.erase.shape)}")

    def call(self, inputs: ScanInputs, gates: AnyGates, dtype: torch.dtype) -> Call:
        assert isinstance(gates, DeltaGates)
        return replace(super().call(inputs, gates, dtype), simple=gates.simple)

    def reference(
        self, inputs: ScanInputs, gates: AnyGates, span: Span, policy: ScanPolicy, carry: ScanCarry | None
    ) -> tuple[Tensor, ScanCarry]:
        """See `Recurrence.reference`."""
        assert isinstance(gates, DeltaGates)
        state, position = (None, None) if carry is None else (carry.state, carry.position)
        y, final, total = reference.scan(inputs, gates, span, policy=policy, state=state, position=position)
        return y, carry_after(final, total, inputs, span, carry)


DELTA: Recurrence = RECURRENCES.register(_Delta())


def _reference(reading: Reading) -> tuple[Tensor, ScanCarry]:
    span = Span(reading.mask, reading.reset)
    y, new = DELTA.reference(reading.inputs, reading.gates, span, reading.policy, reading.carry)
    return y.to(reading.inputs.x.dtype), replace(new, state=new.state.to(reading.carry.state.dtype))


_always: Any = (lambda: None, lambda policy, call: None)  # never missing, refuses nothing
_fla = Backend("fla", fla.run, missing, fla.refuses, fla.observes)
if not triton.interpreted():  # Triton's interpreter is for tests: only when asked for
    DELTA.backends.register(_fla)
DELTA.backends.register(Backend("torch", pytorch.run, *_always))
DELTA.backends.register(_fla)
DELTA.backends.register(Backend("reference", _reference, *_always))
