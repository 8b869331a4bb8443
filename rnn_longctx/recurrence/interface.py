"""What every recurrence is to the mixers that use it, and the registry of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rnn_longctx.recurrence.backends import Backends, OutputGate
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import AnyGates, ScanInputs
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.span import WHOLE, Span
from rnn_longctx.recurrence.statistics import Observer
from rnn_longctx.registry import Registry


class Recurrence(Protocol):
    """A rule by which a state of shape (H, P, N) follows from the one before, with its implementations.

    Attributes:
        name: "ssd" for the scan.
        follows: the fields of a `ScanPolicy` that mean something here. A policy that sets another one is refused, with
            the reason, by every backend; fields about a step (`STEP_FIELDS`) are refused with given gates, too.
        takes: the kinds of gates, among `SteppedGates`, `Gates` and `DeltaGates`.
        backends: its implementations.
    """

    @property
    def name(self) -> str: ...
    @property
    def follows(self) -> frozenset[str]: ...
    @property
    def takes(self) -> tuple[type, ...]: ...
    @property
    def backends(self) -> Backends: ...

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
        """Read T tokens: see `rnn_longctx.recurrence.rule.Rule.scan`."""

    def unfollowed(self, policy: ScanPolicy) -> str | None:
        """Return why a policy means nothing to this recurrence, or None if it does mean something."""

    def reference(
        self, inputs: ScanInputs, gates: AnyGates, span: Span, policy: ScanPolicy, carry: ScanCarry | None
    ) -> tuple[Tensor, ScanCarry]:
        """Return y and the carry after all tokens by the definition, token after token in float64. A windowed stream
        is read in one call, its carry None."""

    def state(self, carry: ScanCarry) -> Tensor:
        """Return the state (B, H, P, N) that a carry stands for."""


RECURRENCES: Registry[Recurrence] = Registry("recurrence", "rnn_longctx.recurrence")
