"""The scan, whichever implementation reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import BACKENDS, Backend, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.fla import missing as fla_missing
from rnn_longctx.recurrence.gates import AnyGates, DeltaGates, Gates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.interface import RECURRENCES, Recurrence
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.rule import Rule, carry_after
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd import fla, official, pytorch, reference
from rnn_longctx.recurrence.ssd.parallel import sharded_scan
from rnn_longctx.recurrence.ssd.shapes import check_shapes
from rnn_longctx.recurrence.ssd.window import window_state

ERASES_NOTHING = "the scan erases nothing, so {} means nothing to it: the delta rule erases"


class _SSD(Rule):
    """The scan as a recurrence: see `rnn_longctx.recurrence.interface`."""

    name = "ssd"
    refuses: ClassVar[Mapping[str, str]] = {name: ERASES_NOTHING.format(name) for name in ("erase", "least_erase")}
    follows = frozenset(f.name for f in fields(ScanPolicy)) - set(refuses)
    takes = (SteppedGates, Gates)
    backends = BACKENDS

    def check(self, inputs: ScanInputs, gates: AnyGates, carry: ScanCarry | None) -> None:
        if isinstance(gates, DeltaGates):
            raise InputError("the scan erases nothing: gates that erase belong to the delta rule")
        check_shapes(inputs, gates, carry)

    def state(self, carry: ScanCarry) -> Tensor:
        return window_state(carry)

    def prepare(self, reading: Reading) -> None:
        policy, carry = reading.policy, reading.carry
        if policy.window is not None and carry.window is None and bool((carry.position > 0).any()):
            raise InputError("a sliding window cannot begin in mid-stream: what it must subtract was not kept")
        if policy.window is not None and carry.window is not None and carry.window.size != policy.window:
            raise InputError(
                f"the carry was made with a window of {carry.window.size} tokens, the policy asks {policy.window}"
            )
        if carry.window is not None and policy.window is None:
            reading.carry = ScanCarry(window_state(carry), carry.position, carry.log_decay)

    def read_shards(
        self,
        inputs: ScanInputs,
        gates: AnyGates,
        span: Span,
        policy: ScanPolicy,
        carry: ScanCarry,
        chosen: Backend,
        read_shard: Callable[[ScanCarry], tuple[Tensor, ScanCarry]],
    ) -> tuple[Tensor, ScanCarry]:
        assert not isinstance(gates, DeltaGates)
        return sharded_scan(inputs, gates, span, policy, carry, chosen, read_shard)

    def reference(
        self, inputs: ScanInputs, gates: AnyGates, span: Span, policy: ScanPolicy, carry: ScanCarry | None
    ) -> tuple[Tensor, ScanCarry]:
        """See `Recurrence.reference`."""
        assert not isinstance(gates, DeltaGates)
        state, position = (None, None) if carry is None else (carry.state, carry.position)
        y, final, total = reference.scan(inputs, gates, span, policy=policy, state=state, position=position)
        return y, carry_after(final, total, inputs, span, carry)


class _Relative(_SSD):
    """The scan of a state whose channels are in units of the largest number that each has met (Performer): a log-decay
    changes the unit, and nothing is forgotten by it."""

    refuses: ClassVar[Mapping[str, str]] = {
        **_SSD.refuses,
        "mul": "the log-decays here only rescale a state that never forgets: a factor on them means nothing",
        "start": "a state here is relative to the largest keys that were read: alone it is no start",
    }
    follows = frozenset(f.name for f in fields(ScanPolicy)) - set(refuses)


SSD: Recurrence = RECURRENCES.register(_SSD())
RELATIVE: Recurrence = _Relative()
scan = SSD.scan


def _reference(reading: Reading) -> tuple[Tensor, ScanCarry]:
    carry, span = reading.carry, Span(reading.mask, reading.reset)
    if reading.policy.window is not None and bool((carry.position > 0).any()):
        raise InputError("backend 'reference' reads a windowed stream in one call only")
    y, new = SSD.reference(reading.inputs, reading.gates, span, reading.policy, carry)
    return y.to(reading.inputs.x.dtype), replace(new, state=new.state.to(carry.state.dtype))


_always: Any = (lambda: None, lambda policy, call: None)  # never missing, refuses nothing


def _when_called(name: str, of_channels: bool = False) -> Any:
    """Return a function of `fused`, or of `fused_channels`, that imports it when it is called: where no kernel runs,
    none is made an operator, which takes longer than all the rest of an import."""

    def call(*args: Any, **settings: Any) -> Any:
        if of_channels:
            from rnn_longctx.recurrence.ssd import fused_channels

            return getattr(fused_channels, name)(*args, **settings)
        from rnn_longctx.recurrence.ssd import fused

        return getattr(fused, name)(*args, **settings)

    return call


_fused = Backend(
    "triton",
    _when_called("run"),
    triton.missing,
    _when_called("refuses"),
    _when_called("observes"),
    gates_output=True,
    shard_sum=_when_called("shard_sum"),
)
_channels = Backend("triton_channels", _when_called("run", True), triton.missing, _when_called("refuses", True))
_fla = Backend("fla", fla.run, fla_missing, fla.refuses)
if not triton.interpreted():  # Triton's interpreter is for tests: only when asked for
    BACKENDS.register(_fused)
    BACKENDS.register(_fla)
    BACKENDS.register(_channels)
BACKENDS.register(Backend("torch", pytorch.run, *_always))
BACKENDS.register(_fused)
BACKENDS.register(_fla)
BACKENDS.register(_channels)
BACKENDS.register(Backend("mamba_ssm", official.run, official.missing, official.refuses))
BACKENDS.register(Backend("reference", _reference, *_always))
