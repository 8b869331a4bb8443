"""The scan on a GPU, as a backend: what a policy and a carry mean to the Triton kernels (`recurrence.ssd.kernels`).

The kernels take the raw dt and a policy's affine gates; resets and padding are positions. Norm caps are made part of
the gates: the factors by which states are cut back are found first, piece by piece where a cap is due every k tokens, k
a multiple of 16, token by token otherwise, and then the scan is a plain one (`recurrence.ssd.caps`). A sliding window
is made of scans of its blocks (`recurrence.ssd.fused_window`). `refuses` says what the kernels cannot do.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.recurrence.backends import Call, Gate
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import gates
from rnn_longctx.recurrence.policy import PerHead, ScanPolicy, per_head
from rnn_longctx.recurrence.ssd import fused_window, ops, pytorch
from rnn_longctx.recurrence.ssd.caps import clip_factor
from rnn_longctx.recurrence.statistics import Statistics

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARED = 2**17 + 2**14  # bytes of shared memory that states of more than 256 columns take


def _unfit() -> str | None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "needs Triton, which is not installed"
    fit = tuple(int(part) for part in found.split(".")[:2]) >= (3, 4)
    return None if fit else f"needs Triton 3.4, {found} is installed"


_UNFIT = _unfit()  # constants, so that torch.compile need not look
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (TRITON_INTERPRET=1, read when it is imported)."""
    return _INTERPRETED


def missing() -> str | None:
    if _UNFIT is not None or _INTERPRETED:
        return _UNFIT
    return None if torch.cuda.is_available() and not torch.version.hip else "needs a CUDA device"


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


def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool,
        dt_limit: tuple[float, float], D: Tensor | None, policy: ScanPolicy, carry: ScanCarry, reset: Tensor | None,
        mask: Tensor | None, counts: Tensor | None, drop: Tensor | None,
        looks: tuple[int, list[Statistics]] | None = None,
        gate: Gate | None = None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    """`looks`: (k, where to leave the statistics every k tokens); see `observes`. `gate`: applied to bfloat16 and
    float32 without a window or caps."""
    if x.dtype == torch.float16:  # its products with a state that grows leave its range
        y, after = run(x.float(), dt, A, B.float(), C.float(), dt_bias=dt_bias, dt_softplus=dt_softplus,
                       dt_limit=dt_limit, D=D, policy=policy, carry=carry, reset=reset, mask=mask, counts=counts,
                       drop=drop, looks=looks)  # fmt: skip
        return y.to(x.dtype), after
    if policy.window is not None:
        return fused_window.run(x, dt, A, B, C, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, D=D,
                                policy=policy, carry=carry, reset=reset, mask=mask, counts=counts, drop=drop,
                                table=gate_table(policy, x.shape[2], x.device))  # fmt: skip
    # Rows that stand at different places reach a cap at different tokens, which chunks do not follow.
    ragged = policy.caps and (
        mask is not None or reset is not None or bool((carry.position != carry.position[0]).any())
    )
    if x.shape[1] == 1 or ragged:  # one token is a handful of small products: nothing to fuse
        return pytorch.run(x, dt, A, B, C, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, D=D,
                           policy=policy, carry=carry, reset=reset, mask=mask, counts=counts, drop=drop)  # fmt: skip
    pad = None if mask is None else (~mask).sum(1, dtype=torch.int32).to(x.device)
    marks = None if drop is None else drop.to(x.device, torch.int8).contiguous()
    table = gate_table(policy, x.shape[2], x.device)
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B.to(x.dtype), C.to(x.dtype)))
    A, dt_bias = A.contiguous(), None if dt_bias is None else dt_bias.contiguous()
    asked = (x, dt, A, B, C, D, dt_bias, carry.state)
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in asked)
    op = ops.scan if graded or torch.compiler.is_compiling() else ops.forward
    if policy.caps or op is ops.scan:
        gate = None

    every = policy.caps[0].every if _in_pieces(policy) else 0
    due = [cap.every for cap in policy.caps]
    position = int(carry.position[0]) if policy.caps else 0

    def read(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor, capped: bool) -> tuple:
        caps = cap_table(policy, x.shape[2], x.device) if capped else None
        args = (x, dt, A, B, C, D, dt_bias, state.contiguous(), table, pad, marks, caps, float(dt_limit[0]),
                float(dt_limit[1]), dt_softplus, every, due, position)  # fmt: skip
        if gate is None:
            return op(*args)[:3]
        *made, gate.squares = ops.watched(0, gate.operands(), *args)
        return tuple(made)

    before, lead = carry.log_decay, min(x.shape[1], -position % every) if every else 0
    if looks is not None:
        caps = cap_table(policy, x.shape[2], x.device) if policy.caps else None
        y, state, spent, sums, *squares = ops.watched(
            looks[0], None if gate is None else gate.operands(), x, dt, A, B, C, D, dt_bias, carry.state.contiguous(),
            table, pad, marks, caps, float(dt_limit[0]), float(dt_limit[1]), dt_softplus, every, due, position,
        )  # fmt: skip
        if gate is not None:
            gate.squares = squares[0]
        positions = int(carry.position[0]) + looks[0] * torch.arange(1, sums.shape[-1] + 1, device="cpu")
        elements = x.shape[3] * B.shape[3]
        log_decay = before[..., None] + spent[..., : sums.shape[-1]]
        looks[1].append(Statistics(positions, elements, sums[0], sums[1], sums[2], log_decay))
        return y, ScanCarry(state, carry.position, before + spent[..., -1])
    if not lead:
        y, state, total = read(x, dt, B, C, carry.state, bool(policy.caps))
        if reset is not None:
            total = _of_last_document(dt, A, dt_bias, dt_softplus, dt_limit, policy, mask, reset)
            before = torch.where(reset.to(before.device).any(1)[:, None], 0.0, before)
        return y, ScanCarry(state, carry.position, before + total)

    # first up to where pieces of k tokens begin, so that each is whole chunks
    y, state, total = read(x[:, :lead], dt[:, :lead], B[:, :lead], C[:, :lead], carry.state, False)
    if (position + lead) % every == 0:
        y, state = _cut(y, state, x, C, D, policy, lead - 1)
    if lead < x.shape[1]:
        rest, state, more = read(x[:, lead:], dt[:, lead:], B[:, lead:], C[:, lead:], state, True)
        y, total = torch.cat([y, rest], 1), total + more
    return y, ScanCarry(state, carry.position, before + total)


@torch.no_grad()
def stretch_sum(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool,
                dt_limit: tuple[float, float], policy: ScanPolicy, drop: Tensor | None, dtype: torch.dtype,
                back: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `pytorch.stretch_sum`. No caps, no window."""
    from rnn_longctx.recurrence.ssd.kernels import launch

    if x.dtype == torch.float16:
        x = x.float()
    settings: dict[str, Any] = {
        "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "policy": policy, "dtype": dtype,
        "back": back,
    }  # fmt: skip
    length, Q = x.shape[1], launch.blocks(x.shape[3], B.shape[3], x.dtype, 0).Q
    if length < Q:
        return pytorch.stretch_sum(x, dt, A, B, drop=drop, **settings)
    lead = 0 if back else length % Q  # then whole chunks follow
    late = None if drop is None else drop[:, lead:].to(x.device, torch.int8).contiguous()
    own, B_own = (t[:, lead:] if t.stride(-1) == 1 else t[:, lead:].contiguous() for t in (x, B.to(x.dtype)))
    found, total = ops.stretch_sum(
        own, dt[:, lead:], A.contiguous(), B_own, None if dt_bias is None else dt_bias.contiguous(),
        gate_table(policy, x.shape[2], x.device), late, float(dt_limit[0]), float(dt_limit[1]), dt_softplus, back,
    )  # fmt: skip
    if lead:
        early = None if drop is None else drop[:, :lead]
        first, before = pytorch.stretch_sum(x[:, :lead], dt[:, :lead], A, B[:, :lead], drop=early, **settings)
        left = total if late is None else total.masked_fill(late.any(1)[:, None], float("-inf"))
        found, total = torch.addcmul(found, first, left.exp().float()[..., None, None]), before + total
    return found.to(dtype), total


def _in_pieces(policy: ScanPolicy) -> bool:
    """Whether a cap is due after whole chunks only; otherwise its factors are found token by token."""
    return len(policy.caps) == 1 and policy.caps[0].every % 16 == 0


def _cut(y: Tensor, state: Tensor, x: Tensor, C: Tensor, D: Tensor | None, policy: ScanPolicy,
         t: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`state` after token t cut back to its cap, and the token's output, y[:, -1], from what is left of it."""
    cap = per_head(policy.caps[0].norm, x.shape[2], state)
    state = state * clip_factor(state, torch.as_tensor(cap, dtype=state.dtype, device=state.device))[..., None, None]
    last = torch.einsum("bhpn,bhn->bhp", state, C[:, t].repeat_interleave(x.shape[2] // C.shape[2], 1).to(state.dtype))
    if D is not None:
        last = last + (D if D.ndim == 2 else D[:, None]).to(state.dtype) * x[:, t]
    return torch.cat([y[:, :-1], last[:, None].to(y.dtype)], 1), state


def _of_last_document(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float],
                      policy: ScanPolicy, mask: Tensor | None, reset: Tensor) -> Tensor:  # fmt: skip
    """Log-decay (B, H) float64 of each row since its last document began."""
    with torch.no_grad():
        bias = None if dt_bias is None else dt_bias.float()
        log_decay, _ = gates(dt.float(), A.float(), dt_bias=bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
                             policy=policy, mask=mask)  # fmt: skip
        began = reset.to(dt.device).long().cumsum(1)
        return (log_decay * (began == began[:, -1:])[..., None]).sum(1, dtype=torch.float64)


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
