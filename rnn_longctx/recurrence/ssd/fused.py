"""The scan on a GPU, as a backend: what a policy and a carry mean to the Triton kernels (`recurrence.ssd.kernels`).

The kernels take the raw dt and a policy's affine gates; resets and padding are positions. Norm caps are made part of
the gates: the factors by which states are cut back are found first, piece by piece where a cap is due every k tokens, k
a multiple of 16, token by token otherwise, and then the scan is a plain one (`recurrence.ssd.caps`). A sliding window
is made of scans of its blocks (`recurrence.ssd.fused_window`). `refuses` says what the kernels cannot do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.recurrence.backends import Call, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import Gates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.policy import PerHead, ScanPolicy, per_head
from rnn_longctx.recurrence.ssd import fused_window, ops, pytorch
from rnn_longctx.recurrence.ssd.caps import clip_factor
from rnn_longctx.recurrence.ssd.operands import Operands
from rnn_longctx.recurrence.statistics import Statistics
from rnn_longctx.recurrence.triton import DTYPES, interpreted

SHARED = 2**17 + 2**14  # bytes of shared memory that states of more than 256 columns take


def refuses(policy: ScanPolicy, call: Call | None) -> str | None:
    if len(policy.caps) > 2:
        return f"has two norm caps, not {len(policy.caps)}"
    if policy.caps and policy.reset is not None:
        return "has norm caps without resets"
    if policy.start is not None:
        return "has no stored initial state yet"
    if call is None:
        return None
    if call.device.type != "cuda" and not interpreted():
        return f"reads tensors on CUDA devices, not on {call.device}"
    if call.device.type == "cuda" and (had := torch.cuda.get_device_capability(call.device)) < (8, 0):
        return f"needs compute capability 8.0, {call.device} has {had[0]}.{had[1]}"
    if call.dtype not in DTYPES:
        return f"reads bfloat16, float16 and float32, not {call.dtype}"
    if call.dtype == torch.bfloat16 and interpreted():
        return "reads no bfloat16 in Triton's interpreter, whose products of them are wrong"
    if not call.stepped:
        return "works the gates out of a step dt, and this layer gives them"
    if call.per_channel:
        return "has one decay a head, not one a channel"
    if not 1 <= call.headdim <= 256 or not 1 <= call.d_state <= 512:
        return f"has headdim up to 256 and d_state up to 512, not {call.headdim} and {call.d_state}"
    if call.d_state > 256 and call.device.type == "cuda":
        here: int = getattr(torch.cuda.get_device_properties(call.device), "shared_memory_per_block_optin", 0)
        if here < SHARED:
            return f"has d_state up to 256 in the {here} bytes of shared memory of {call.device}"
    if policy.caps and call.headdim * call.d_state > 2**14:
        return f"has norm caps for states of up to 16384 numbers a head, not {call.headdim} x {call.d_state}"
    if policy.caps and not _in_pieces(policy) and call.d_state > 256:
        return f"has norm caps token by token with d_state up to 256, not {call.d_state}"
    return None


def observes(policy: ScanPolicy, call: Call, every: int) -> bool:
    """Whether statistics every k tokens fall on chunks' ends."""
    if policy.window is not None or call.dtype not in DTYPES:
        return False
    if _in_pieces(policy):
        return every % policy.caps[0].every == 0
    from rnn_longctx.recurrence.ssd.kernels import launch

    dtype = torch.float32 if call.dtype == torch.float16 else call.dtype
    return every % launch.blocks(call.headdim, call.d_state, dtype, 0).Q == 0


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """See `Backend.run`. The output gate is applied to bfloat16 and float32 without a window or caps."""
    inputs, policy, carry, looks = reading.inputs, reading.policy, reading.carry, reading.looks
    x, reset = inputs.x, reading.reset
    if x.dtype == torch.float16:  # its products with a state that grows leave its range
        wide = ScanInputs(x.float(), inputs.B.float(), inputs.C.float(), inputs.D)
        y, after = run(replace(reading, inputs=wide, output_gate=None))
        return y.to(x.dtype), after
    if policy.window is not None:
        return fused_window.run(reading, gate_table(policy, x.shape[2], x.device))
    # Rows that stand at different places reach a cap at different tokens, which chunks do not follow.
    ragged = policy.caps and (
        reading.mask is not None or reset is not None or bool((carry.position != carry.position[0]).any())
    )
    if x.shape[1] == 1 or ragged:  # one token is a handful of small products: nothing to fuse
        return pytorch.run(reading)
    o = _operands(reading)
    graded = reading.graded or torch.compiler.is_compiling()
    gate = None if policy.caps or graded else reading.output_gate
    if looks is not None:
        return _looking(reading, o)
    before, lead = carry.log_decay, min(x.shape[1], -o.position % o.every) if o.every else 0
    if not lead:
        if gate is not None:
            y, state, total, gate.squares = ops.watched(o, 0, gate.operands())
        else:
            y, state, total = (ops.scan(*o) if graded else ops.forward(o))[:3]
        if reset is not None:
            total = _of_last_document(reading)
            before = torch.where(reset.to(before.device).any(1)[:, None], 0.0, before)
        return y, ScanCarry(state, carry.position, before + total)

    # first up to where pieces of k tokens begin, so that each is whole chunks
    first = o.tokens(0, lead)._replace(caps=None)
    y, state, total = (ops.scan(*first) if graded else ops.forward(first))[:3]
    if (o.position + lead) % o.every == 0:
        y, state = _cut(y, state, ScanInputs(o.x, o.B, o.C, o.D), policy, lead - 1)
    if lead < x.shape[1]:
        rest = o.tokens(lead, x.shape[1])._replace(initial=state.contiguous())
        more, state, last = (ops.scan(*rest) if graded else ops.forward(rest))[:3]
        y, total = torch.cat([y, more], 1), total + last
    return y, ScanCarry(state, carry.position, before + total)


def _operands(reading: Reading) -> Operands:
    inputs, gates, policy, carry = reading.inputs, reading.gates, reading.policy, reading.carry
    assert isinstance(gates, SteppedGates)
    x, mask, drop = inputs.x, reading.mask, reading.drop
    heads, device = x.shape[2], x.device
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, inputs.B.to(x.dtype), inputs.C.to(x.dtype)))
    return Operands(
        x,
        gates.dt,
        gates.A.contiguous(),
        B,
        C,
        inputs.D,
        None if gates.dt_bias is None else gates.dt_bias.contiguous(),
        carry.state.contiguous(),
        gate_table(policy, heads, device),
        pad=None if mask is None else (~mask).sum(1, dtype=torch.int32).to(device),
        drop=None if drop is None else drop.to(device, torch.int8).contiguous(),
        caps=cap_table(policy, heads, device) if policy.caps else None,
        low=float(gates.dt_limit[0]),
        high=float(gates.dt_limit[1]),
        softplus=gates.softplus,
        every=policy.caps[0].every if _in_pieces(policy) else 0,
        due=[cap.every for cap in policy.caps],
        position=int(carry.position[0]) if policy.caps else 0,
    )


def _looking(reading: Reading, o: Operands) -> tuple[Tensor, ScanCarry]:
    """Read the tokens and leave the statistics of every `looks.every`-th. Without gradients."""
    carry, looks = reading.carry, reading.looks
    assert looks is not None
    gate, before, every = None if reading.policy.caps else reading.output_gate, carry.log_decay, looks.every
    y, state, totals, sums, *squares = ops.watched(o, every, None if gate is None else gate.operands())
    if gate is not None:
        gate.squares = squares[0]
    positions = int(carry.position[0]) + every * torch.arange(1, sums.shape[-1] + 1, device="cpu")
    log_decay = before[..., None] + totals[..., : sums.shape[-1]]
    looks.seen.append(Statistics(positions, o.x.shape[3] * o.B.shape[3], sums[0], sums[1], sums[2], log_decay))
    return y, ScanCarry(state, carry.position, before + totals[..., -1])


@torch.no_grad()
def shard_sum(
    x: Tensor,
    gates: Gates | SteppedGates,
    B: Tensor,
    *,
    policy: ScanPolicy,
    drop: Tensor | None,
    dtype: torch.dtype,
    back: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `pytorch.shard_sum`. No caps, no window."""
    from rnn_longctx.recurrence.ssd.kernels import launch

    assert isinstance(gates, SteppedGates)
    if x.dtype == torch.float16:
        x = x.float()
    length, Q = x.shape[1], launch.blocks(x.shape[3], B.shape[3], x.dtype, 0).Q
    if length < Q:
        return pytorch.shard_sum(x, gates, B, policy=policy, drop=drop, dtype=dtype, back=back)
    lead = 0 if back else length % Q  # then whole chunks follow
    late = None if drop is None else drop[:, lead:].to(x.device, torch.int8).contiguous()
    x_late, B_late = (t[:, lead:] if t.stride(-1) == 1 else t[:, lead:].contiguous() for t in (x, B.to(x.dtype)))
    gates_late = SteppedGates(
        gates.dt[:, lead:],
        gates.A.contiguous(),
        None if gates.dt_bias is None else gates.dt_bias.contiguous(),
        (float(gates.dt_limit[0]), float(gates.dt_limit[1])),
        gates.softplus,
    )
    state, total = ops.shard_sum(x_late, gates_late, B_late, gate_table(policy, x.shape[2], x.device), late, back)
    if lead:
        early = None if drop is None else drop[:, :lead]
        first, before = pytorch.shard_sum(
            x[:, :lead], gates.tokens(0, lead), B[:, :lead], policy=policy, drop=early, dtype=dtype, back=back
        )
        left = total if late is None else total.masked_fill(late.any(1)[:, None], float("-inf"))
        state, total = torch.addcmul(state, first, left.exp().float()[..., None, None]), before + total
    return state.to(dtype), total


def _in_pieces(policy: ScanPolicy) -> bool:
    """Whether a cap is due after whole chunks only; otherwise its factors are found token by token."""
    return len(policy.caps) == 1 and policy.caps[0].every % 16 == 0


def _cut(y: Tensor, state: Tensor, inputs: ScanInputs, policy: ScanPolicy, t: int) -> tuple[Tensor, Tensor]:
    """Return the token's output, y[:, -1], and the state after it, where the state is cut back to its cap after token
    t."""
    x, C, D = inputs.x, inputs.C, inputs.D
    cap = per_head(policy.caps[0].norm, x.shape[2], state)
    state = state * clip_factor(state, torch.as_tensor(cap, dtype=state.dtype, device=state.device))[..., None, None]
    last = torch.einsum("bhpn,bhn->bhp", state, C[:, t].repeat_interleave(x.shape[2] // C.shape[2], 1).to(state.dtype))
    if D is not None:
        last = last + (D if D.ndim == 2 else D[:, None]).to(state.dtype) * x[:, t]
    return torch.cat([y[:, :-1], last[:, None].to(y.dtype)], 1), state


@torch.no_grad()
def _of_last_document(reading: Reading) -> Tensor:
    """Return the log-decay (B, H) float64 of each row since its last document began."""
    log_decay = reading.gates.worked_out(torch.float32, reading.policy, reading.mask).log_decay
    assert reading.reset is not None
    begun = reading.reset.to(log_decay.device).long().cumsum(1)
    return (log_decay * (begun == begun[:, -1:])[..., None]).sum(1, dtype=torch.float64)


@lru_cache(maxsize=256)
def gate_table(policy: ScanPolicy, heads: int, device: torch.device) -> Tensor:
    """(4, H) float32: mul, add, gain, min_dt. A plain policy of another layer shares it."""
    return _rows([policy.mul, policy.add, policy.gain, policy.min_dt], heads, device)


@lru_cache(maxsize=256)
def cap_table(policy: ScanPolicy, heads: int, device: torch.device) -> Tensor:
    """(caps, H) float32."""
    return _rows([cap.norm for cap in policy.caps], heads, device)


def _rows(values: list[PerHead], heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may train with it
        kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever a person's defaults are
        rows = [per_head(value, heads, torch.empty(0, **kind)) for value in values]
        filled = [torch.full((heads,), row, **kind) if isinstance(row, float) else row for row in rows]
        return torch.stack(filled).to(device)
