"""The scan, whichever implementation reads it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.backends import Backend, Call, Gate, choose, register
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.rows import left_padding, row_counts
from rnn_longctx.recurrence.ssd import fused, official, pytorch, reference
from rnn_longctx.recurrence.ssd.window import window_state
from rnn_longctx.recurrence.statistics import Observer, Statistics


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None = None,
         dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, math.inf), D: Tensor | None = None,
         policy: ScanPolicy = PLAIN, carry: ScanCarry | None = None, reset: Tensor | None = None,
         mask: Tensor | None = None, backend: str | None = None, observer: Observer | None = None,
         gate: Gate | None = None, state_dtype: torch.dtype | None = None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    """Read T tokens: raw projections and a policy in, outputs and the carry out. How a stream is cut into calls
    changes nothing, but where `state_dtype` rounds what a call hands on.

    Args:
        x: (B, T, H, P).
        dt: (B, T, H), before bias and softplus; dt_bias (H); dt_limit as in Mamba-2.
        A: (H), or (H, N) for decays per channel; negative in Mamba-2.
        B, C: (B, T, G, N), G dividing H.
        D: (H) or (H, P), adds D * x to the output.
        carry: what the call before returned; None begins a row.
        reset: (B, T) bool, True where a new row (document) begins: state and position start again.
        mask: (B, T) bool, False where a token is padding. Padding may stand only before a row's first token.
        backend: the name of one, or None for the first that supports the policy here.
        observer: is shown the state's statistics at the positions that `observer.every` divides.
        gate: a norm to apply to y where the backend can: then `gate.squares` is set.
        state_dtype: of the state in the carry that is returned: it is rounded once, after the last token. Within a call
            states are float32 (float64 for float64 inputs, and where float64 is asked for). None: as within.
    Returns:
        y (B, T, H, P) in x's dtype, and the carry.
    Raises:
        InputError: shapes that do not fit (which axis is named), a backend that is missing or does not support the
            policy, padding after a row's first token, a window switched on in mid-stream, an observer of rows that
            stand at different positions.
    """
    _check_shapes(x, dt, A, B, C, D, dt_bias, carry)
    asked = asked_of(x.dtype, state_dtype)
    wide = wide_of(asked)
    carry = None if carry is None else carry.kept_in(wide)
    shared: dict[str, Any] = {
        "asked": asked, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "D": D, "policy": policy,
    }  # fmt: skip
    if observer is None or not x.shape[1]:
        y, new = _read(x, dt, A, B, C, **shared, carry=carry, reset=reset, mask=mask, backend=backend, gate=gate)
        return y, new.kept_in(state_dtype or wide)
    if (mask is not None and not bool(mask.all())) or (reset is not None and bool(reset.any())):
        raise InputError("an observer follows rows that stand at one position: no padding, no documents")
    y, new = _observed(x, dt, A, B, C, carry, backend, observer, gate, shared)
    return y, new.kept_in(state_dtype or wide)


def asked_of(dtype: torch.dtype, state_dtype: torch.dtype | None) -> torch.dtype:
    """What a backend is asked to read (`Call.dtype`): the type of the inputs, or float64 where the state is."""
    return torch.float64 if state_dtype == torch.float64 else dtype


def wide_of(asked: torch.dtype) -> torch.dtype:
    """Of states within a call."""
    return torch.float64 if asked == torch.float64 else torch.float32


def _observed(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, carry: ScanCarry | None, backend: str | None,
              observer: Observer, gate: Gate | None, shared: dict[str, Any]) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    """Cut where the observer looks, unless the backend can look from inside."""
    position, length, k = 0, x.shape[1], observer.every
    if carry is not None and len(carry.position):
        position = int(carry.position[0])
        if bool((carry.position != position).any()):
            raise InputError(f"an observer follows rows that stand at one position, not {carry.position.tolist()}")
    call = Call(x.device, shared["asked"], A.ndim == 2, x.shape[3], B.shape[3])
    inside = choose(shared["policy"], backend, call).observes(shared["policy"], call, k)
    asked = (x, dt, A, B, C, shared["D"], shared["dt_bias"], None if carry is None else carry.state)
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in asked)
    inside = inside and not graded and not torch.compiler.is_compiling() and not observer.whole
    outputs, seen, t = [], [], 0
    while t < length:
        lead = -(position + t) % k
        whole = (length - t) // k * k
        u = length if inside and not lead and whole else min(length, t + (lead or k))
        looks: list[Statistics] | None = [] if u - t > k or (inside and u - t == k and not lead) else None
        y, carry = _read(x[:, t:u], dt[:, t:u], A, B[:, t:u], C[:, t:u], **shared, carry=carry, reset=None, mask=None,
                         backend=backend, looks=None if looks is None else (k, looks),
                         gate=gate if u - t == length else None)  # fmt: skip
        outputs.append(y)
        if looks is not None:
            seen += looks
        elif (position + u) % k == 0:
            seen.append(Statistics.of(window_state(carry), carry.position[0], carry.log_decay, observer.whole))
        t = u
    if seen:
        observer(Statistics.join(seen))
    assert carry is not None
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), carry


def _read(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, asked: torch.dtype, dt_bias: Tensor | None,
          dt_softplus: bool, dt_limit: tuple[float, float], D: Tensor | None, policy: ScanPolicy,
          carry: ScanCarry | None, reset: Tensor | None, mask: Tensor | None, backend: str | None,
          looks: tuple[int, list[Statistics]] | None = None,
          gate: Gate | None = None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    batch, length, heads, headdim = x.shape
    chosen = choose(policy, backend, Call(x.device, asked, A.ndim == 2, headdim, B.shape[3]))
    fresh = carry is None
    if carry is None:
        carry = ScanCarry.start(
            batch, heads, headdim, B.shape[3], per_channel=A.ndim == 2, dtype=wide_of(asked), device=x.device
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

    inside: dict[str, Any] = {} if looks is None else {"looks": looks}
    if gate is not None and chosen.gates:
        inside["gate"] = gate
    with (
        nullcontext() if not torch.is_autocast_enabled(x.device.type) else torch.autocast(x.device.type, enabled=False)
    ):
        y, new = chosen.run(
            x, dt, A, B, C, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, D=D, policy=policy,
            carry=carry, reset=reset, mask=mask, counts=counts, drop=drop, **inside,
        )  # fmt: skip
    new.position = carry.position + length if counts is None else counts[:, -1].clone()
    return y, new


def _reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, carry: ScanCarry, counts: Tensor | None,
               drop: Tensor | None, **settings) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    if settings["policy"].window is not None and bool((carry.position > 0).any()):
        raise InputError("backend 'reference' reads a windowed stream in one call only")
    y, state, total = reference.scan(x, dt, A, B, C, state=carry.state, position=carry.position, **settings)
    reset = settings["reset"]
    began = reset.any(1) if reset is not None else torch.zeros(len(x), dtype=torch.bool)
    before = torch.where(began.view(-1, *(1,) * (total.ndim - 1)).to(total.device), 0.0, carry.log_decay)
    return y.to(x.dtype), ScanCarry(state.to(carry.state.dtype), carry.position, before + total)


def _check_shapes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
                  carry: ScanCarry | None) -> None:  # fmt: skip
    if x.ndim != 4:
        raise InputError(f"x must be (B, T, H, P), got shape {tuple(x.shape)}")
    batch, length, heads, headdim = x.shape
    if dt.shape != (batch, length, heads):
        raise InputError(f"dt must be (B, T, H) = {(batch, length, heads)} to go with x, got {tuple(dt.shape)}")
    for name, t in (("B", B), ("C", C)):
        if t.ndim != 4 or t.shape[:2] != (batch, length):
            raise InputError(f"{name} must be (B, T, G, N) with B, T = {(batch, length)}, got {tuple(t.shape)}")
    if B.shape != C.shape:
        raise InputError(f"B and C must have one shape, got {tuple(B.shape)} and {tuple(C.shape)}")
    if heads % B.shape[2]:
        raise InputError(f"heads must divide into groups: H={heads} heads, G={B.shape[2]} groups")
    if A.shape not in ((heads,), (heads, B.shape[3])):
        raise InputError(f"A must be (H,) = ({heads},) or (H, N) = {(heads, B.shape[3])}, got {tuple(A.shape)}")
    if dt_bias is not None and dt_bias.shape != (heads,):
        raise InputError(f"dt_bias must be (H,) = ({heads},), got {tuple(dt_bias.shape)}")
    if D is not None and D.shape not in ((heads,), (heads, headdim)):
        raise InputError(f"D must be (H,) = ({heads},) or (H, P) = {(heads, headdim)}, got {tuple(D.shape)}")
    if carry is not None and carry.state.shape != (batch, heads, headdim, B.shape[3]):
        expected = (batch, heads, headdim, B.shape[3])
        raise InputError(f"the carry's state must be (B, H, P, N) = {expected}, got {tuple(carry.state.shape)}")


_fused = Backend("triton", fused.run, fused.missing, fused.refuses, fused.observes, gates=True,
                 stretch_sum=fused.stretch_sum)  # fmt: skip
if not fused.interpreted():  # Triton's interpreter is for tests: only when asked for
    register(_fused)
register(Backend("torch", pytorch.run, lambda: None, lambda policy, call: None))
register(_fused)
register(Backend("mamba_ssm", official.run, official.missing, official.refuses))
register(Backend("reference", _reference, lambda: None, lambda policy, call: None))
