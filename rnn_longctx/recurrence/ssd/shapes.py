"""Whether the tensors of a scan go together, said axis by axis where they do not."""

from __future__ import annotations

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates, ScanInputs, SteppedGates


def check_shapes(inputs: ScanInputs, gates: Gates | SteppedGates, carry: ScanCarry | None) -> None:
    """Raise InputError if a shape does not fit, with its name, what was expected and what was given."""
    x, B, C, D = inputs.x, inputs.B, inputs.C, inputs.D
    if x.ndim != 4:
        raise InputError(f"x must be (B, T, H, P), got shape {tuple(x.shape)}")
    batch, length, heads, headdim = x.shape
    if isinstance(gates, Gates):
        if gates.input_scale.shape != (batch, length, heads):
            expected: tuple[int, ...] = (batch, length, heads)
            raise InputError(
                f"input_scale must be (B, T, H) = {expected} to go with x, got {tuple(gates.input_scale.shape)}"
            )
    elif gates.dt.shape != (batch, length, heads):
        raise InputError(f"dt must be (B, T, H) = {(batch, length, heads)} to go with x, got {tuple(gates.dt.shape)}")
    for name, t in (("B", B), ("C", C)):
        if t.ndim != 4 or t.shape[:2] != (batch, length):
            raise InputError(f"{name} must be (B, T, G, N) with B, T = {(batch, length)}, got {tuple(t.shape)}")
    if B.shape != C.shape:
        raise InputError(f"B and C must have one shape, got {tuple(B.shape)} and {tuple(C.shape)}")
    if heads % B.shape[2]:
        raise InputError(f"heads must divide into groups: H={heads} heads, G={B.shape[2]} groups")
    d_state = B.shape[3]
    if isinstance(gates, Gates):
        decay, per_head = gates.log_decay.shape, (batch, length, heads)
        if decay not in (per_head, (*per_head, d_state)):
            raise InputError(
                f"log_decay must be (B, T, H) = {per_head} or (B, T, H, N) = {(*per_head, d_state)}, got {tuple(decay)}"
            )
    else:
        A, dt_bias = gates.A, gates.dt_bias
        if A.shape not in ((heads,), (heads, d_state)):
            raise InputError(f"A must be (H,) = ({heads},) or (H, N) = {(heads, d_state)}, got {tuple(A.shape)}")
        if dt_bias is not None and dt_bias.shape != (heads,):
            raise InputError(f"dt_bias must be (H,) = ({heads},), got {tuple(dt_bias.shape)}")
    if D is not None and D.shape not in ((heads,), (heads, headdim)):
        raise InputError(f"D must be (H,) = ({heads},) or (H, P) = {(heads, headdim)}, got {tuple(D.shape)}")
    expected = (batch, heads, headdim, d_state)
    if carry is not None and carry.state.shape != expected:
        raise InputError(f"the carry's state must be (B, H, P, N) = {expected}, got {tuple(carry.state.shape)}")
