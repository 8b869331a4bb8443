"""The scan on a GPU, as a backend: what a policy and a carry mean to the Triton kernels (`rnn_longctx.ssd.kernels`).

The kernels take the raw dt and a policy's affine gates; resets and padding are positions. Norm caps, windows and stored
starts go to the PyTorch scan, which is said by `refuses`, as is everything else that they cannot do.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.ssd import pytorch
from rnn_longctx.ssd.backends import Call
from rnn_longctx.ssd.carry import ScanCarry
from rnn_longctx.ssd.gates import gates
from rnn_longctx.ssd.policy import ScanPolicy, per_head

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (TRITON_INTERPRET=1, read when it is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    if find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"needs compute capability 8.0, this device has {capability}"


def refuses(policy: ScanPolicy, call: Call | None) -> str | None:
    if policy.caps:
        return "has no norm caps yet"
    if policy.window is not None:
        return "has no sliding window yet"
    if policy.start is not None:
        return "has no stored initial state yet"
    if call is None:
        return None
    if call.device.type != "cuda" and not interpreted():
        return f"reads tensors on CUDA devices, not on {call.device}"
    if call.dtype not in DTYPES:
        return f"reads bfloat16, float16 and float32, not {call.dtype}"
    if call.per_channel:
        return "has one decay a head, not one a channel"
    if not 1 <= call.headdim <= 256 or not 1 <= call.d_state <= 512:
        return f"has headdim up to 256 and d_state up to 512, not {call.headdim} and {call.d_state}"
    return None


def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor | None, dt_softplus: bool,
        dt_limit: tuple[float, float], D: Tensor | None, policy: ScanPolicy, carry: ScanCarry, reset: Tensor | None,
        mask: Tensor | None, counts: Tensor | None, drop: Tensor | None) -> tuple[Tensor, ScanCarry]:  # fmt: skip
    if x.shape[1] == 1:  # one token is a handful of small products: nothing to fuse a scan into
        return pytorch.run(x, dt, A, B, C, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, D=D,
                           policy=policy, carry=carry, reset=reset, mask=mask, counts=counts, drop=drop)  # fmt: skip
    pad = None if mask is None else (~mask).sum(1, dtype=torch.int32).to(x.device)
    drop = None if drop is None else drop.to(x.device, torch.int8).contiguous()
    table = _table(policy, x.shape[2], x.device)
    settings = (pad, drop, float(dt_limit[0]), float(dt_limit[1]), dt_softplus, policy, reset)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y, state, total = _Scan.apply(x, dt, A, B, C, D, dt_bias, carry.state, table, settings)
    before = carry.log_decay
    if reset is not None:
        before = torch.where(reset.to(before.device).any(1)[:, None], 0.0, before)
    return y, ScanCarry(state, carry.position, before + total)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                dt_bias: Tensor | None, initial: Tensor, table: Tensor, settings: tuple) -> tuple:  # fmt: skip
        from rnn_longctx.ssd.kernels import launch

        pad, drop, low, high, softplus, policy, reset = settings
        x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
        B, C = B.to(x.dtype), C.to(x.dtype)
        A, initial = A.contiguous(), initial.contiguous()
        c = launch.blocks(x.shape[3], B.shape[3], x.dtype)
        ready = launch.prepare_chunks(dt, A, B, C, dt_bias, table, pad, drop, low, high, softplus, x.shape[3], c)
        y, final = launch.scan_forward(x, B, C, D, A, table, drop, initial, low, ready, c)
        total = _total(ready, reset)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial, table, pad, drop)
        ctx.settings = (low, high, softplus, policy)
        ctx.mark_non_differentiable(total)
        return y, final, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        from rnn_longctx.ssd.kernels import launch

        x, dt, A, B, C, D, dt_bias, initial, table, pad, drop = ctx.saved_tensors
        low, high, softplus, policy = ctx.settings
        dy, dfinal = grads[0].contiguous(), grads[1].contiguous()
        c = launch.blocks(x.shape[3], B.shape[3], x.dtype)
        with torch.cuda.device_of(x):
            g = launch.scan_backward(
                x, dt, A, B, C, D, dt_bias, table, pad, drop, initial, low, high, softplus, dy, dfinal, c
            )
        # the gates are small and simple: PyTorch differentiates them
        with torch.enable_grad():
            leaves = [t.detach().float().requires_grad_() for t in (dt, A) + (() if dt_bias is None else (dt_bias,))]
            mask = None
            if pad is not None:
                mask = torch.arange(x.shape[1], device=x.device) >= pad[:, None]
            made = gates(
                leaves[0], leaves[1], dt_bias=None if dt_bias is None else leaves[2], dt_softplus=softplus,
                dt_limit=(low, high), policy=policy, mask=mask,
            )  # fmt: skip
            made_from = torch.autograd.grad(made, leaves, (g.log_decay, g.scale))
        dbias = None if dt_bias is None else made_from[2].to(dt_bias.dtype)
        dD = None if D is None else (g.D if D.ndim == 2 else g.D.sum(1)).to(D.dtype)
        return (g.x, made_from[0].to(dt.dtype), made_from[1].to(A.dtype), g.B.to(B.dtype), g.C.to(C.dtype), dD, dbias,
                g.initial.to(initial.dtype), None, None)  # fmt: skip


def _total(ready: Any, reset: Tensor | None) -> Tensor:
    """Log-decay (B, H) float64 of each row's last document."""
    if reset is None:
        return ready.totals.sum(2, dtype=torch.float64)
    began = reset.to(ready.cum.device).long().cumsum(1)
    kept = began == began[:, -1:]
    cum = ready.cum
    log_decay = torch.cat([cum[..., :1], cum.diff(dim=-1)], -1).flatten(2)[..., : reset.shape[1]]
    return (log_decay * kept[:, None]).sum(2, dtype=torch.float64)


@lru_cache(maxsize=256)
def _table(policy: ScanPolicy, heads: int, device: torch.device) -> Tensor:
    """(4, H) float32: mul, add, gain, min_dt. A plain policy of another layer shares it."""
    rows = []
    with torch.inference_mode(False):  # a later call may train with it
        for value in (policy.mul, policy.add, policy.gain, policy.min_dt):
            row = per_head(value, heads, torch.empty(0))
            rows.append(torch.full((heads,), row) if isinstance(row, float) else row)
        return torch.stack(rows).to(device, torch.float32)
