"""What every recurrence does around its backends: look at shapes, choose, show an observer, hand on a carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Backend, Backends, Call, OutputGate, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import AnyGates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.observe import Looks, observed
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.rows import left_padding, row_counts
from rnn_longctx.recurrence.span import WHOLE, Span
from rnn_longctx.recurrence.statistics import Observer


class Rule:
    """Base of the recurrences, see `rnn_longctx.recurrence.interface.Recurrence`: what differs from one to another is
    its definition, the shapes of its gates and its backends.

    Attributes:
        refuses: why the fields of a policy that it does not follow mean nothing here.
    """

    name: ClassVar[str]
    follows: ClassVar[frozenset[str]]
    refuses: ClassVar[Mapping[str, str]] = {}
    takes: ClassVar[tuple[type, ...]]
    backends: ClassVar[Backends]

    def scan(
        self,
        inputs: ScanInputs,
        gates: AnyGates,
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
                ranks, and so are its gradients: inputs and outputs are this rank's; the carries, those before the first
                and after the last shard, are the same on every rank.
            carry: what the call before returned; None begins a row.
            backend: the name of one, or None for the first that supports the policy here.
            observer: is shown the state's statistics at the positions that `observer.every` divides.
            output_gate: a norm to apply to y where the backend can: then `output_gate.squares` is set.
            state_dtype: of the state in the carry that is returned: it is rounded once, after the last token. Within a
                call states are float32 (float64 for float64 inputs, and where float64 is asked for). None: as within.
        Returns:
            y (B, T, H, P) in x's dtype, and the carry.
        Raises:
            InputError: shapes that do not fit (which axis is named), gates of another kind, a policy that means nothing
                here, a backend that is missing or does not support the policy, padding after a row's first token, a
                window switched on in mid-stream, an observer of rows that stand at different positions.
        """
        self.check(inputs, gates, carry)
        if reason := self.unfollowed(policy):
            raise InputError(reason)
        x, mask, reset = inputs.x, span.mask, span.reset
        batch, length, heads, headdim = x.shape
        call = self.call(inputs, gates, compute_dtype(x.dtype, state_dtype))
        d_state, per_channel, wide = call.d_state, call.per_channel, state_dtype_of(call.dtype)
        chosen = self.backends.choose(policy, backend, call)
        if carry is None:
            sizes = (batch, heads, headdim, d_state)
            carry = ScanCarry.start(*sizes, per_channel=per_channel, dtype=wide, device=x.device)
            if policy.start is not None and length:
                carry.state = policy.start_state(carry.state)
        else:
            carry = carry.kept_in(wide)
        if not length:
            return x, carry.kept_in(state_dtype or wide)
        if span.shard is not None:

            def read_shard(before: ScanCarry) -> tuple[Tensor, ScanCarry]:
                return self.scan(
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

            y, new = self.read_shards(inputs, gates, span, policy, carry, chosen, read_shard)
            return y, new.kept_in(state_dtype or wide)
        reading = Reading(inputs, gates, policy, carry, reset, mask, output_gate=output_gate)
        if observer is None:
            y, new = self._read(chosen, reading)
            return y, new.kept_in(state_dtype or wide)
        if (mask is not None and not bool(mask.all())) or (reset is not None and bool(reset.any())):
            raise InputError("an observer follows rows that stand at one position: no padding, no documents")

        def read(t: int, u: int, before: ScanCarry, looks: Looks | None) -> tuple[Tensor, ScanCarry]:
            gate = output_gate if u - t == length else None
            tokens = Reading(inputs.tokens(t, u), gates.tokens(t, u), policy, before, looks=looks, output_gate=gate)
            return self._read(chosen, tokens)

        inside = not observer.whole and chosen.observes(policy, call, observer.every)
        inside = inside and not reading.graded and not torch.compiler.is_compiling()
        y, new = observed(read, length, carry, observer, inside, self.state)
        return y, new.kept_in(state_dtype or wide)

    def unfollowed(self, policy: ScanPolicy) -> str | None:
        """Return why the policy means nothing to this recurrence, or None if it does mean something."""
        for field in sorted(policy.changes - self.follows):
            return self.refuses.get(field, f"the {self.name} recurrence does not follow {field!r} of a policy")
        return None

    # --- what a recurrence says of itself

    def check(self, inputs: ScanInputs, gates: AnyGates, carry: ScanCarry | None) -> None:
        """Raise InputError if a shape does not fit, or the gates are of another kind."""
        raise NotImplementedError

    def call(self, inputs: ScanInputs, gates: AnyGates, dtype: torch.dtype) -> Call:
        """Return what kind of inputs a backend is to read, in the type that it reads them in."""
        x, d_state = inputs.x, inputs.B.shape[3]
        return Call(x.device, dtype, gates.per_channel, x.shape[3], d_state, isinstance(gates, SteppedGates))

    def state(self, carry: ScanCarry) -> Tensor:
        """Return the state (B, H, P, N) that a carry stands for."""
        return carry.state

    def prepare(self, reading: Reading) -> None:
        """Look at a call before it is read, and change its carry where the policy asks for another kind."""

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
        """Read a stream that is spread over several ranks. read_shard: reads this rank's tokens after a carry."""
        raise InputError(f"the {self.name} recurrence does not read one stream over several ranks")

    def _read(self, chosen: Backend, reading: Reading) -> tuple[Tensor, ScanCarry]:
        """Read the tokens of one call, or of a part of one, on this rank."""
        x = reading.inputs.x
        self.prepare(reading)
        carry = reading.carry
        if reading.mask is not None:
            reading.mask = left_padding(reading.mask, carry.position)
        if reading.reset is not None and not bool(reading.reset.any()):
            reading.reset = None
        if reading.mask is not None or reading.reset is not None or reading.policy.reset is not None:
            reading.counts, reading.drop = row_counts(
                carry.position, x.shape[1], mask=reading.mask, reset=reading.reset, every=reading.policy.reset
            )
        if not chosen.gates_output:
            reading.output_gate = None
        autocast = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            y, new = chosen.run(reading)
        new.position = carry.position + x.shape[1] if reading.counts is None else reading.counts[:, -1].clone()
        return y, new


def compute_dtype(dtype: torch.dtype, state_dtype: torch.dtype | None) -> torch.dtype:
    """Return what a backend is asked to read (`Call.dtype`): the inputs' type, or float64 where the state's is."""
    return torch.float64 if state_dtype == torch.float64 else dtype


def state_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Return the type of states within a call that reads `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def carry_after(state: Tensor, total: Tensor, inputs: ScanInputs, span: Span, carry: ScanCarry | None) -> ScanCarry:
    """Return the carry after the tokens that a definition has read, from a carry on (None begins).

    Args: state (B, H, P, N) after them; total (B, H) or (B, H, N), the log-decay of these tokens, of each row's last
        document alone.
    """
    batch, length = inputs.x.shape[:2]
    if carry is None:
        position, before = torch.zeros(batch, dtype=torch.int64, device="cpu"), torch.zeros_like(total)
    else:
        position, before = carry.position, carry.log_decay
    if span.reset is not None:
        begun = span.reset.any(1).view(-1, *(1,) * (total.ndim - 1))
        before = torch.where(begun.to(total.device), 0.0, before)
    counts, _ = row_counts(position, length, mask=span.mask, reset=span.reset)
    return ScanCarry(state, counts[:, -1].clone(), before + total)
