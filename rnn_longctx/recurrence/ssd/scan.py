"""The scan, whichever implementation reads it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import BACKENDS, Backend, Call, OutputGate, Reading, choose
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.interface import RECURRENCES, Recurrence
from rnn_longctx.recurrence.observe import Looks, observed
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.rows import left_padding, row_counts
from rnn_longctx.recurrence.span import WHOLE, Span
from rnn_longctx.recurrence.ssd import official, pytorch, reference
from rnn_longctx.recurrence.ssd.parallel import sharded_scan
from rnn_longctx.recurrence.ssd.shapes import check_shapes
from rnn_longctx.recurrence.ssd.window import window_state
from rnn_longctx.recurrence.statistics import Observer


def scan(
    inputs: ScanInputs,
    gates: Gates | SteppedGates,
    span: Span = WHOLE,
    *,
    policy: ScanPolicy = PLAIN,
    carry: ScanCarry | None = None,
    backend: str | None = None,
    observer: Observer | None = None,
    output_gate: OutputGate | None = None,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ScanCarry]:
    """Read T tokens: inputs, gates and a policy in, outputs and the carry out. How a stream is cut into calls
    changes nothing, but where `state_dtype` rounds what a call hands on.

    Args:
        span: which tokens are padding, where rows begin, and this rank's shard. With a shard the call is one on all
            ranks, and so are its gradients: inputs and outputs are this rank's; the carries, those before the first and
            after the last shard, are the same on every rank.
        carry: what the call before returned; None begins a row.
        backend: the name of one, or None for the first that supports the policy here.
        observer: is shown the state's statistics at the positions that `observer.every` divides.
        output_gate: a norm to apply to y where the backend can: then `output_gate.squares` is set.
        state_dtype: of the state in the carry that is returned: it is rounded once, after the last token. Within a call
            states are float32 (float64 for float64 inputs, and where float64 is asked for). None: as within.
    Returns:
        y (B, T, H, P) in x's dtype, and the carry.
    Raises:
        InputError: shapes that do not fit (which axis is named), a backend that is missing or does not support the
            policy, padding after a row's first token, a window switched on in mid-stream, an observer of rows that
            stand at different positions.
    """
    check_shapes(inputs, gates, carry)
    x, mask, reset = inputs.x, span.mask, span.reset
    batch, length, heads, headdim = x.shape
    d_state, per_channel = inputs.B.shape[3], gates.per_channel
    dtype = compute_dtype(x.dtype, state_dtype)
    wide = state_dtype_of(dtype)
    call = Call(x.device, dtype, per_channel, headdim, d_state, isinstance(gates, SteppedGates))
    chosen = choose(policy, backend, call)
    if carry is None:
        carry = ScanCarry.start(batch, heads, headdim, d_state, per_channel=per_channel, dtype=wide, device=x.device)
        if policy.start is not None and length:
            carry.state = policy.start_state(carry.state)
    else:
        carry = carry.kept_in(wide)
    if not length:
        return x, carry.kept_in(state_dtype or wide)
    if span.shard is not None:

        def read_shard(before: ScanCarry) -> tuple[Tensor, ScanCarry]:
            return scan(
                inputs,
                gates,
                Span(mask, reset),
                policy=policy,
                carry=before,
                backend=backend,
                observer=observer,
                output_gate=output_gate,
                state_dtype=state_dtype,
            )

        y, new = sharded_scan(inputs, gates, span, policy, carry, chosen, read_shard)
        return y, new.kept_in(state_dtype or wide)
    reading = Reading(inputs, gates, policy, carry, reset, mask, output_gate=output_gate)
    if observer is None:
        y, new = _read(chosen, reading)
        return y, new.kept_in(state_dtype or wide)
    if (mask is not None and not bool(mask.all())) or (reset is not None and bool(reset.any())):
        raise InputError("an observer follows rows that stand at one position: no padding, no documents")

    def read(t: int, u: int, before: ScanCarry, looks: Looks | None) -> tuple[Tensor, ScanCarry]:
        gate = output_gate if u - t == length else None
        tokens = Reading(inputs.tokens(t, u), gates.tokens(t, u), policy, before, looks=looks, output_gate=gate)
        return _read(chosen, tokens)

    inside = not observer.whole and chosen.observes(policy, call, observer.every)
    inside = inside and not reading.graded and not torch.compiler.is_compiling()
    y, new = observed(read, length, carry, observer, inside, window_state)
    return y, new.kept_in(state_dtype or wide)


def compute_dtype(dtype: torch.dtype, state_dtype: torch.dtype | None) -> torch.dtype:
    """Return what a backend is asked to read (`Call.dtype`): the inputs' type, or float64 where the state's is."""
    return torch.float64 if state_dtype == torch.float64 else dtype


def state_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Return the type of states within a call that reads `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _read(chosen: Backend, reading: Reading) -> tuple[Tensor, ScanCarry]:
    """Read the tokens of one call, or of a part of one, on this rank."""
    x, policy, carry = reading.inputs.x, reading.policy, reading.carry
    if policy.window is not None and carry.window is None and bool((carry.position > 0).any()):
        raise InputError("a sliding window cannot begin in mid-stream: what it must subtract was not kept")
    if policy.window is not None and carry.window is not None and carry.window.size != policy.window:
        raise InputError(
            f"the carry was made with a window of {carry.window.size} tokens, the policy asks {policy.window}"
        )
    if carry.window is not None and policy.window is None:
        carry = reading.carry = ScanCarry(window_state(carry), carry.position, carry.log_decay)
    if reading.mask is not None:
        reading.mask = left_padding(reading.mask, carry.position)
    if reading.reset is not None and not bool(reading.reset.any()):
        reading.reset = None
    if reading.mask is not None or reading.reset is not None or policy.reset is not None:
        reading.counts, reading.drop = row_counts(
            carry.position, x.shape[1], mask=reading.mask, reset=reading.reset, every=policy.reset
        )
    if not chosen.gates_output:
        reading.output_gate = None
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        y, new = chosen.run(reading)
    new.position = carry.position + x.shape[1] if reading.counts is None else reading.counts[:, -1].clone()
    return y, new


def _reference(reading: Reading) -> tuple[Tensor, ScanCarry]:
    carry, span = reading.carry, Span(reading.mask, reading.reset)
    if reading.policy.window is not None and bool((carry.position > 0).any()):
        raise InputError("backend 'reference' reads a windowed stream in one call only")
    y, new = SSD.reference(reading.inputs, reading.gates, span, reading.policy, carry)
    return y.to(reading.inputs.x.dtype), replace(new, state=new.state.to(carry.state.dtype))


class _SSD:
    """The scan as a recurrence: see `rnn_longctx.recurrence.interface`."""

    name = "ssd"
    follows = frozenset(f.name for f in fields(ScanPolicy))
    takes: tuple[type, ...] = (SteppedGates, Gates)
    backends = BACKENDS
    scan = staticmethod(scan)
    state = staticmethod(window_state)

    def reference(
        self, inputs: ScanInputs, gates: Gates | SteppedGates, span: Span, policy: ScanPolicy, carry: ScanCarry | None
    ) -> tuple[Tensor, ScanCarry]:
        """See `Recurrence.reference`."""
        state, position = (None, None) if carry is None else (carry.state, carry.position)
        y, final, total = reference.scan(inputs, gates, span, policy=policy, state=state, position=position)
        if carry is None:
            position, before = torch.zeros(len(y), dtype=torch.int64, device="cpu"), torch.zeros_like(total)
        else:
            position, before = carry.position, carry.log_decay
        if span.reset is not None:
            begun = span.reset.any(1).view(-1, *(1,) * (total.ndim - 1))
            before = torch.where(begun.to(total.device), 0.0, before)
        counts, _ = row_counts(position, y.shape[1], mask=span.mask, reset=span.reset)
        return y, ScanCarry(final, counts[:, -1].clone(), before + total)


SSD: Recurrence = RECURRENCES.register(_SSD())

_always: Any = (lambda: None, lambda policy, call: None)  # never missing, refuses nothing


def _fused_when_called(name: str) -> Any:
    """Return a function of `fused` that imports it when it is called: where no kernel runs, none is made an operator,
    which takes longer than all the rest of an import."""

    def call(*args: Any, **settings: Any) -> Any:
        from rnn_longctx.recurrence.ssd import fused

        return getattr(fused, name)(*args, **settings)

    return call


_fused = Backend(
    "triton",
    _fused_when_called("run"),
    triton.missing,
    _fused_when_called("refuses"),
    _fused_when_called("observes"),
    gates_output=True,
    shard_sum=_fused_when_called("shard_sum"),
)
if not triton.interpreted():  # Triton's interpreter is for tests: only when asked for
    BACKENDS.register(_fused)
BACKENDS.register(Backend("torch", pytorch.run, *_always))
BACKENDS.register(_fused)
BACKENDS.register(Backend("mamba_ssm", official.run, official.missing, official.refuses))
BACKENDS.register(Backend("reference", _reference, *_always))
