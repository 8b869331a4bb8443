"""The scan on a GPU, as a backend: what a policy and a carry mean to the Triton kernels (`rnn_longctx.ssd.kernels`).

The kernels take the raw dt and a policy's affine gates; resets and padding are positions. A norm cap every k tokens, k
a multiple of 16, is made part of the gates: the factors by which states are cut back are found first, piece by piece,
and then the scan is a plain one (`rnn_longctx.ssd.caps`). `refuses` says what the kernels cannot do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn_longctx.ssd import pytorch
from rnn_longctx.ssd.backends import Call
from rnn_longctx.ssd.caps import clip_factor
from rnn_longctx.ssd.carry import ScanCarry
from rnn_longctx.ssd.gates import gates
from rnn_longctx.ssd.policy import PerHead, ScanPolicy, per_head

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARED = 2**17 + 2**14  # bytes of shared memory that states of more than 256 columns take


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (TRITON_INTERPRET=1, read when it is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def missing() -> str | None:
    try:
        found = tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return "needs Triton, which is not installed"
    if found < (3, 4):
        return f"needs Triton 3.4, {version('triton')} is installed"
    if interpreted():
        return None
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs a CUDA device"
    return None


def refuses(policy: ScanPolicy, call: Call | None) -> str | None:
    if policy.caps and (len(policy.caps) > 1 or policy.caps[0].every % 16 or policy.reset is not None):
        return "has one norm cap, every k tokens with k a multiple of 16, without resets"
    if policy.window is not None:
        return "has no sliding window yet"
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
    return None


def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool,
        dt_limit: tuple[float, float], D: Tensor | None, policy: ScanPolicy, carry: ScanCarry, reset: Tensor | None,
        mask: Tensor | None, counts: Tensor | None, drop: Tensor | None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    if x.dtype == torch.float16:  # its products with a state that grows leave its range
        y, after = run(x.float(), dt, A, B.float(), C.float(), dt_bias=dt_bias, dt_softplus=dt_softplus,
                       dt_limit=dt_limit, D=D, policy=policy, carry=carry, reset=reset, mask=mask, counts=counts,
                       drop=drop)  # fmt: skip
        return y.to(x.dtype), after
    together = mask is None and reset is None and bool((carry.position == carry.position[0]).all())
    if x.shape[1] == 1 or (policy.caps and not together):
        # One token is a handful of small products: nothing to fuse. Rows that stand at different places reach a cap at
        # different tokens, which chunks do not follow.
        return pytorch.run(x, dt, A, B, C, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, D=D,
                           policy=policy, carry=carry, reset=reset, mask=mask, counts=counts, drop=drop)  # fmt: skip
    pad = None if mask is None else (~mask).sum(1, dtype=torch.int32).to(x.device)
    drop = None if drop is None else drop.to(x.device, torch.int8).contiguous()
    table = gate_table(policy, x.shape[2], x.device)
    shared = (pad, drop, float(dt_limit[0]), float(dt_limit[1]), dt_softplus, policy, reset)

    def read(part: slice, state: Tensor, capped: bool) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return _Scan.apply(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, dt_bias, state, table,
                               (*shared, capped))  # fmt: skip

    before = carry.log_decay
    if reset is not None:
        before = torch.where(reset.to(before.device).any(1)[:, None], 0.0, before)
    state, parts = carry.state, []
    lead = _until_cap(policy, int(carry.position[0]), x.shape[1])
    if lead:  # up to where pieces of k tokens begin, so that each is whole chunks
        y, state, total = read(slice(0, lead), state, False)
        before = before + total
        if (int(carry.position[0]) + lead) % policy.caps[0].every == 0:
            y, state = _cut(y, state, x, C, D, policy, lead - 1)
        parts.append(y)
    if lead < x.shape[1]:
        y, state, total = read(slice(lead, None), state, bool(policy.caps))
        before = before + total
        parts.append(y)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), ScanCarry(state, carry.position, before)


def _until_cap(policy: ScanPolicy, position: int, length: int) -> int:
    """Tokens to read until a piece between two caps begins."""
    return min(length, -position % policy.caps[0].every) if policy.caps else 0


def _cut(y: Tensor, state: Tensor, x: Tensor, C: Tensor, D: Tensor | None, policy: ScanPolicy,
         t: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`state` after token t cut back to its cap, and the token's output, y[:, -1], from what is left of it."""
    cap = per_head(policy.caps[0].norm, x.shape[2], state)
    state = state * clip_factor(state, torch.as_tensor(cap, device=state.device))[..., None, None]
    last = torch.einsum("bhpn,bhn->bhp", state, C[:, t].repeat_interleave(x.shape[2] // C.shape[2], 1).to(state.dtype))
    if D is not None:
        last = last + (D if D.ndim == 2 else D[:, None]).to(state.dtype) * x[:, t]
    return torch.cat([y[:, :-1], last[:, None].to(y.dtype)], 1), state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                dt_bias: Tensor | None, initial: Tensor, table: Tensor, settings: tuple) -> tuple:  # fmt: skip
        from rnn_longctx.ssd.kernels import launch

        pad, drop, low, high, softplus, policy, reset, capped = settings
        every = policy.caps[0].every if capped else None
        x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
        B, C = B.to(x.dtype), C.to(x.dtype)
        A, initial = A.contiguous(), initial.contiguous()
        dt_bias = None if dt_bias is None else dt_bias.contiguous()
        c = launch.blocks(x.shape[3], B.shape[3], x.dtype, every)
        ready = launch.prepare_chunks(
            dt, A, B, C, dt_bias, table, pad, drop, low, high, softplus, x.shape[3], c, capped=capped
        )
        total, factors = _total(ready, reset, lambda: _gates(dt, A, dt_bias, low, high, softplus, policy, pad)[0]), None
        if every is not None and x.shape[1] >= every:
            caps = cap_table(policy, x.shape[2], x.device)
            factors = launch.cap_factors(x, B, A, table, initial, low, caps, every, ready, c)
            launch.cut_back(ready, factors, every)
        y, final = launch.scan_forward(x, B, C, D, A, table, drop, initial, low, ready, c)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial, table, pad, drop, factors)
        ctx.settings = (low, high, softplus, policy, every)
        ctx.mark_non_differentiable(total)
        return y, final, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        from rnn_longctx.ssd.kernels import launch

        x, dt, A, B, C, D, dt_bias, initial, table, pad, drop, factors = ctx.saved_tensors
        low, high, softplus, policy, every = ctx.settings
        dy, dfinal = grads[0].contiguous(), grads[1].contiguous()
        c = launch.blocks(x.shape[3], B.shape[3], x.dtype, every)
        with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
            g = launch.scan_backward(
                x, dt, A, B, C, D, dt_bias, table, pad, drop, initial, low, high, softplus, dy, dfinal, c,
                factors, every,
            )  # fmt: skip
        # the gates are small and simple: PyTorch differentiates them
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            leaves = [t.detach().float().requires_grad_() for t in (dt, A) + (() if dt_bias is None else (dt_bias,))]
            bias = None if dt_bias is None else leaves[2]
            made = _gates(leaves[0], leaves[1], bias, low, high, softplus, policy, pad)
            made_from = torch.autograd.grad(made, leaves, (g.log_decay, g.scale))
        dbias = None if dt_bias is None else made_from[2].to(dt_bias.dtype)
        dD = None if D is None else (g.D if D.ndim == 2 else g.D.sum(1)).to(D.dtype)
        return (g.x, made_from[0].to(dt.dtype), made_from[1].to(A.dtype), g.B.to(B.dtype), g.C.to(C.dtype), dD, dbias,
                g.initial.to(initial.dtype), None, None)  # fmt: skip


def _gates(dt: Tensor, A: Tensor, dt_bias: Tensor | None, low: float, high: float, softplus: bool, policy: ScanPolicy,
           pad: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask = None if pad is None else torch.arange(dt.shape[1], device=dt.device) >= pad[:, None]
    dt, A, dt_bias = dt.float(), A.float(), None if dt_bias is None else dt_bias.float()
    return gates(dt, A, dt_bias=dt_bias, dt_softplus=softplus, dt_limit=(low, high), policy=policy, mask=mask)


def _total(ready: Any, reset: Tensor | None, log_decay: Callable[[], Tensor]) -> Tensor:
    """Log-decay (B, H) float64 of each row's last document."""
    if reset is None:
        return ready.spent.sum(2, dtype=torch.float64)
    began = reset.to(ready.spent.device).long().cumsum(1)
    return (log_decay() * (began == began[:, -1:])[..., None]).sum(1, dtype=torch.float64)


@lru_cache(maxsize=256)
def gate_table(policy: ScanPolicy, heads: int, device: torch.device) -> Tensor:
    """(4, H) float32: mul, add, gain, min_dt. A plain policy of another layer shares it."""
    return _rows([policy.mul, policy.add, policy.gain, policy.min_dt], heads, device)


@lru_cache(maxsize=256)
def cap_table(policy: ScanPolicy, heads: int, device: torch.device) -> Tensor:
    """(H) float32."""
    return _rows([policy.caps[0].norm], heads, device)[0]


def _rows(values: list[PerHead], heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may train with it
        rows = [per_head(value, heads, torch.empty(0)) for value in values]
        filled = [torch.full((heads,), row) if isinstance(row, float) else row for row in rows]
        return torch.stack(filled).to(device, torch.float32)
