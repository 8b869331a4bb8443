"""The scan, whichever implementation reads it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.backends import Backend, Call, OutputGate, Reading, choose, register
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.observe import Looks, observed
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.rows import left_padding, row_counts
from rnn_longctx.recurrence.span import WHOLE, Span
from rnn_longctx.recurrence.ssd import fused, official, pytorch, reference
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
    x = inputs.x
    dtype = compute_dtype(x.dtype, state_dtype)
    wide = state_dtype_of(dtype)
    carry = None if carry is None else carry.kept_in(wide)
    call = Call(x.device, dtype, gates.per_channel, x.shape[3], inputs.B.shape[3], isinstance(gates, SteppedGates))
    chosen = choose(policy, backend, call)
    if span.shard is not None:
        local = Span(span.mask, span.reset)

        def read_shard(before: ScanCarry) -> tuple[Tensor, ScanCarry]:
            return scan(
                inputs, gates, local, policy=policy, carry=before, backend=backend, observer=observer,
                output_gate=output_gate, state_dtype=state_dtype,
            )  # fmt: skip

        y, new = sharded_scan(inputs, gates, span, policy, carry, chosen, wide, read_shard)
    elif observer is None or not x.shape[1]:
        y, new = _read(chosen, inputs, gates, span, policy, carry, wide, output_gate=output_gate)
    else:
        mask, reset = span.mask, span.reset
        if (mask is not None and not bool(mask.all())) or (reset is not None and bool(reset.any())):
            raise InputError("an observer follows rows that stand at one position: no padding, no documents")

        def read(t: int, u: int, before: ScanCarry | None, looks: Looks | None) -> tuple[Tensor, ScanCarry]:
            gate = output_gate if u - t == x.shape[1] else None
            some, their = inputs.tokens(t, u), gates.tokens(t, u)
            return _read(chosen, some, their, WHOLE, policy, before, wide, looks=looks, output_gate=gate)

        inside = not observer.whole and chosen.observes(policy, call, observer.every)
        if inside:
            leaves = (x, inputs.B, inputs.C, inputs.D, *gates.tensors, None if carry is None else carry.state)
            graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
            inside = not graded and not torch.compiler.is_compiling()
        y, new = observed(read, x.shape[1], carry, observer, inside, window_state)
    return y, new.kept_in(state_dtype or wide)


def compute_dtype(dtype: torch.dtype, state_dtype: torch.dtype | None) -> torch.dtype:
    """Return what a backend is asked to read (`Call.dtype`): the inputs' type, or float64 where the state's is."""
    return torch.float64 if state_dtype == torch.float64 else dtype


def state_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Return the type of states within a call that reads `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _read(
    chosen: Backend,
    inputs: ScanInputs,
    gates: Gates | SteppedGates,
    span: Span,
    policy: ScanPolicy,
    carry: ScanCarry | None,
    wide: torch.dtype,
    *,
    looks: Looks | None = None,
    output_gate: OutputGate | None = None,
) -> tuple[Tensor, ScanCarry]:
    """Read the tokens on one rank. wide: the type of states."""
    x, mask, reset = inputs.x, span.mask, span.reset
    batch, length, heads, headdim = x.shape
    fresh = carry is None
    if carry is None:
        carry = ScanCarry.start(
            batch, heads, headdim, inputs.B.shape[3], per_channel=gates.per_channel, dtype=wide, device=x.device
        )
    if not length:
        return x, carry
    if policy.window is not None and carry.window is None and bool((carry.position > 0).any()):
        raise InputError("a sliding window cannot begin in mid-stream: what it must subtract was not kept")
    if policy.window is not None and carry.window is not None and carry.window.size != policy.window:
        raise InputError(
            f"the carry was made with a window of {carry.window.size} tokens, the policy asks {policy.window}"
        )
    if carry.window is not None and policy.window is None:
        carry = ScanCarry(window_state(carry), carry.position, carry.log_decay)
    if fresh and policy.start is not None:
        carry = ScanCarry(policy.start_state(carry.state), carry.position, carry.log_decay)
    if mask is not None:
        mask = left_padding(mask, carry.position)
    if reset is not None and not bool(reset.any()):
        reset = None
    counts = drop = None
    if mask is not None or reset is not None or policy.reset is not None:
        counts, drop = row_counts(carry.position, length, mask=mask, reset=reset, every=policy.reset)
    if not chosen.gates_output:
        output_gate = None
    with (
        nullcontext() if not torch.is_autocast_enabled(x.device.type) else torch.autocast(x.device.type, enabled=False)
    ):
        y, new = chosen.run(Reading(inputs, gates, policy, carry, reset, mask, counts, drop, looks, output_gate))
    new.position = carry.position + length if counts is None else counts[:, -1].clone()
    return y, new


def _reference(reading: Reading) -> tuple[Tensor, ScanCarry]:
    carry, reset, x = reading.carry, reading.reset, reading.inputs.x
    if reading.policy.window is not None and bool((carry.position > 0).any()):
        raise InputError("backend 'reference' reads a windowed stream in one call only")
    y, state, total = reference.scan(
        reading.inputs, reading.gates, Span(reading.mask, reset), policy=reading.policy, state=carry.state,
        position=carry.position,
    )  # fmt: skip
    began = reset.any(1) if reset is not None else torch.zeros(len(x), dtype=torch.bool)
    before = torch.where(began.view(-1, *(1,) * (total.ndim - 1)).to(total.device), 0.0, carry.log_decay)
    return y.to(x.dtype), ScanCarry(state.to(carry.state.dtype), carry.position, before + total)


_fused = Backend(
    "triton", fused.run, triton.missing, fused.refuses, fused.observes, gates_output=True, shard_sum=fused.shard_sum
)
if not triton.interpreted():  # Triton's interpreter is for tests: only when asked for
    register(_fused)
register(Backend("torch", pytorch.run, lambda: None, lambda policy, call: None))
register(_fused)
register(Backend("mamba_ssm", official.run, official.missing, official.refuses))
register(Backend("reference", _reference, lambda: None, lambda policy, call: None))
