"""The implementations of the scan: what each needs, and which policies and inputs it supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rnn_longctx.errors import InputError, nearest
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import AnyGates, ScanInputs
from rnn_longctx.recurrence.observe import Looks
from rnn_longctx.recurrence.policy import ScanPolicy


@dataclass(frozen=True)
class Call:
    """The kind of inputs that a scan is to read.

    Attributes:
        dtype: of the inputs, or float64 where the state is kept in it.
        per_channel: whether each channel of the state has its own decay.
        stepped: whether the gates follow from a step (`SteppedGates`); otherwise they are given.
        simple: whether what a delta rule reads and erases is the key, by as much as it writes (see `DeltaGates`).
    """

    device: torch.device
    dtype: torch.dtype
    per_channel: bool
    headdim: int
    d_state: int
    stepped: bool = True
    simple: bool = True


@dataclass
class OutputGate:
    """A gated RMSNorm, y * silu(z) / rms * weight, that a scan may apply as it writes y: all but 1 / rms, which is one
    factor a token, so that what reads y can take it over if it is linear. Without gradients only.

    Attributes:
        z: (B, T, H, P).
        weight: (H * P).
        squares: (B, T, ·), float32: left by a scan that applied the gate (others return y as ever); they add up to the
            sum over all channels of (y * silu(z))^2.
    """

    z: Tensor
    weight: Tensor
    squares: Tensor | None = None

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return z and weight as kernels read them."""
        return self.z if self.z.stride(-1) == 1 else self.z.contiguous(), self.weight.contiguous()


@dataclass(eq=False)
class Reading:
    """One call of a backend: everything that it reads.

    Attributes:
        carry: never None, its state float32 or float64, which is what the backend works in.
        reset, mask: as in a `Span`; None where nothing is reset or padding.
        counts: (B, T) int64 on the CPU, the tokens of its row that were read up to and with each token; None where
            rows are read whole, without padding or resets.
        drop: (B, T) bool on the CPU, True where the state is dropped before the token; None if nowhere.
        looks: filled by a backend that `observes` from inside.
        output_gate: applied by a backend that can, where it can.
    """

    inputs: ScanInputs
    gates: AnyGates
    policy: ScanPolicy
    carry: ScanCarry
    reset: Tensor | None = None
    mask: Tensor | None = None
    counts: Tensor | None = None
    drop: Tensor | None = None
    looks: Looks | None = None
    output_gate: OutputGate | None = None

    @property
    def graded(self) -> bool:
        """Whether a gradient will be asked of the outputs."""
        if not torch.is_grad_enabled():
            return False
        i = self.inputs
        leaves = (i.x, i.B, i.C, i.D, *self.gates.tensors, self.carry.state)
        return any(t is not None and t.requires_grad for t in leaves)


@dataclass(frozen=True)
class Backend:
    """One implementation of the scan.

    Attributes:
        run: reads a `Reading`; returns y (B, T, H, P) in x's dtype and the carry, whose position is the caller's.
        missing: returns why it cannot run on this machine, or None if it can.
        refuses: returns why it does not support a policy and (unless the call is None) its inputs, or None.
        observes: whether it can show the state every k tokens from inside a scan.
        gates_output: whether it takes an `OutputGate`.
        shard_sum: as `recurrence.ssd.pytorch.shard_sum`, which is used for backends without one.
    """

    name: str
    run: Callable[[Reading], tuple[Tensor, ScanCarry]]
    missing: Callable[[], str | None]
    refuses: Callable[[ScanPolicy, Call | None], str | None]
    observes: Callable[[ScanPolicy, Call, int], bool] = lambda policy, call, every: False
    gates_output: bool = False
    shard_sum: Callable | None = None


class Backends:
    """The backends of one recurrence, by their names (`known`). The first that can run is taken, so the order of
    registration is the order of preference."""

    def __init__(self) -> None:
        self.known: dict[str, Backend] = {}

    def register(self, backend: Backend) -> Backend:
        self.known[backend.name] = backend
        _choose.cache_clear()
        return backend

    def remove(self, name: str) -> None:
        del self.known[name]
        _choose.cache_clear()

    def choose(self, policy: ScanPolicy, forced: str | None = None, call: Call | None = None) -> Backend:
        """Return the backend for a policy and, where given, the inputs it is to read.

        Raises:
            InputError: a forced backend that is unknown, missing here, or does not support the policy. Nothing falls
                back silently.
        """
        return _choose(self, policy, forced, call)


@lru_cache(maxsize=1024)  # asked at every scan
def _choose(backends: Backends, policy: ScanPolicy, forced: str | None, call: Call | None) -> Backend:
    known = backends.known
    if forced is None:
        for backend in known.values():
            if not backend.missing() and not backend.refuses(policy, call):
                return backend
        raise InputError(f"no backend here supports the policy {policy.to_dict()}")
    if forced not in known:
        raise InputError(f"unknown backend {forced!r}{nearest(forced, known)}")
    backend = known[forced]
    reason = backend.missing() or backend.refuses(policy, call)
    if reason:
        raise InputError(f"backend {forced!r}: {reason}")
    return backend


BACKENDS = Backends()  # of the scan, `recurrence.ssd`; another recurrence has its own
choose = BACKENDS.choose
