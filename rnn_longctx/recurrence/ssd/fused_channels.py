"""The scan of heads of headdim 1 with a decay a number (Mamba-1) on a GPU, as a backend: by Triton kernels
(`recurrence.ssd.kernels.channels`), states held in registers and never stored token by token. `refuses` says what they
cannot do.

The kernels are seen as one operator, `rnn_longctx::scan_channels`, as those of `recurrence.ssd.ops` are.
"""

# no `from __future__ import annotations`: tools read the types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.recurrence.backends import Call, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd import pytorch
from rnn_longctx.recurrence.ssd.fused import gate_table
from rnn_longctx.recurrence.ssd.operands import ChannelOperands
from rnn_longctx.recurrence.ssd.ops import run_compiled
from rnn_longctx.recurrence.triton import DTYPES, interpreted

MOST = 64  # numbers of a state: a thread holds them all


def refuses(policy: ScanPolicy, call: Call | None) -> str | None:
    if policy.caps:
        return "has no norm caps: the torch backend reads them"
    if policy.window is not None:
        return "has no sliding window: the torch backend reads it"
    if policy.start is not None:
        return "has no stored initial state yet"
    if call is None:
        return None
    if call.device.type != "cuda" and not interpreted():
        return f"reads tensors on CUDA devices, not on {call.device}"
    if call.dtype not in DTYPES:
        return f"reads bfloat16, float16 and float32, not {call.dtype}"
    if not call.stepped:
        return "works the gates out of a step dt, and this layer gives them"
    if not call.per_channel or call.headdim != 1:
        decays = "a decay a channel" if call.per_channel else "a decay a head"
        return f"reads Mamba-1's heads, of headdim 1 with a decay a channel, not headdim {call.headdim} with {decays}"
    if call.d_state > MOST:
        return f"has d_state up to {MOST}, not {call.d_state}"
    return None


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """See `Backend.run`."""
    if reading.inputs.x.shape[1] == 1:  # one token is a handful of small products: nothing to fuse
        return pytorch.run(reading)
    o, carry = _operands(reading), reading.carry
    graded = reading.graded or torch.compiler.is_compiling()
    y, state, steps, _ = scan_channels(*o) if graded else forward(o, graded=False)
    before = carry.log_decay
    if reading.reset is not None:
        steps = _of_last_document(reading, steps, o, graded)
        before = torch.where(reading.reset.to(before.device).any(1)[:, None, None], 0.0, before)
    return y, ScanCarry(state, carry.position, before + _log_decay(o, steps))


def _operands(reading: Reading) -> ChannelOperands:
    inputs, gates, mask, drop = reading.inputs, reading.gates, reading.mask, reading.drop
    assert isinstance(gates, SteppedGates)
    device, marks = inputs.x.device, None
    if drop is not None:
        marks = drop.to(torch.int8)
        if reading.reset is not None:
            marks = marks + (drop & reading.reset.to(drop.device, torch.bool)).to(torch.int8)
        marks = marks.to(device).contiguous()
    B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (inputs.B, inputs.C))
    return ChannelOperands(
        inputs.x,
        gates.dt,
        gates.A.contiguous(),
        B,
        C,
        None if inputs.D is None else inputs.D.reshape(-1).contiguous(),
        None if gates.dt_bias is None else gates.dt_bias.contiguous(),
        reading.carry.state,
        gate_table(reading.policy, inputs.x.shape[2], device),
        pad=None if mask is None else (~mask).sum(1, dtype=torch.int32).to(device),
        drop=marks,
        low=float(gates.dt_limit[0]),
        high=float(gates.dt_limit[1]),
        softplus=gates.softplus,
    )


@torch.no_grad()
def _of_last_document(reading: Reading, steps: Tensor, o: ChannelOperands, graded: bool) -> Tensor:
    """Return steps (2,B,chunks,H) without those of chunks after which another document of their row begins."""
    from rnn_longctx.recurrence.ssd.kernels import launch_channels

    assert reading.reset is not None
    begins = reading.reset.to(steps.device, torch.bool)
    if reading.mask is not None:
        begins = begins & reading.mask
    chunks, size = steps.shape[2], launch_channels.chunk_tokens(o, graded)
    begun = F.pad(begins, (0, chunks * size - begins.shape[1])).unflatten(1, (chunks, size)).sum(2)
    after = begun.flip(1).cumsum(1).flip(1) - begun
    return steps * (after == 0)[..., None]


@torch.no_grad()
def _log_decay(o: ChannelOperands, steps: Tensor) -> Tensor:
    """Return the log-decay (B,H,N) float64 of each row, from the sum of its steps and the number of its tokens."""
    taken, count = steps.sum(2)  # (B, H)
    mul, add = o.table[0].double(), o.table[1].double()
    return taken[..., None] * (mul[:, None] * o.A.double()) + (add * count)[..., None]


def forward(o: ChannelOperands, graded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `recurrence.ssd.kernels.launch_channels.scan_forward`. graded: whether the gradients will be asked for."""
    from rnn_longctx.recurrence.ssd.kernels import launch_channels

    return run_compiled(launch_channels.scan_forward, o.x, (*o.kind, graded), o, graded)


_OPERANDS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor initial, Tensor table,"
    " Tensor? pad, Tensor? drop, float low, float high, bool softplus"
)
SCHEMA = f"({_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)"
GRAD_SCHEMA = f"(Tensor dy, Tensor dfinal, Tensor states, {_OPERANDS}) -> Tensor[]"


@torch.library.custom_op("rnn_longctx::scan_channels", mutates_args=(), schema=SCHEMA)
def scan_channels(*operands: Any) -> Any:
    """`forward` as an operator, with gradients."""
    return forward(ChannelOperands(*operands), graded=True)


@torch.library.custom_op("rnn_longctx::scan_channels_backward", mutates_args=(), schema=GRAD_SCHEMA)
def scan_channels_backward(dy: Tensor, dfinal: Tensor, states: Tensor, *operands: Any) -> Any:
    from rnn_longctx.recurrence.ssd.kernels import launch_channels

    o = ChannelOperands(*operands)
    return list(run_compiled(launch_channels.scan_backward, o.x, o.kind, dy, dfinal, states, o))


@scan_channels.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from rnn_longctx.recurrence.ssd.kernels import launch_channels

    o = ChannelOperands(*operands)
    (batch, length, heads), d_state = o.dt.shape, o.B.shape[3]
    chunks = -(-length // launch_channels.chunk_tokens(o, True))
    return (
        o.x.new_empty(o.x.shape),
        o.x.new_empty(batch, heads, 1, d_state, dtype=torch.float32),
        o.x.new_empty(2, batch, chunks, heads, dtype=torch.float64),
        o.x.new_empty(batch, chunks, d_state, heads, dtype=torch.float32),
    )


@scan_channels_backward.register_fake
def _(dy: Tensor, dfinal: Tensor, states: Tensor, *operands: Any) -> list[Tensor]:
    o = ChannelOperands(*operands)
    heads = o.x.shape[2]
    wide = (o.A.shape, o.B.shape, o.C.shape, (heads,), (heads,), o.initial.shape)
    return [
        o.x.new_empty(o.x.shape),
        o.dt.new_empty(o.dt.shape),
        *(o.x.new_empty(shape, dtype=torch.float32) for shape in wide),
    ]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    o = ChannelOperands(*inputs)
    ctx.save_for_backward(output[3], *o[:11])
    ctx.numbers = o[11:]
    ctx.mark_non_differentiable(output[2], output[3])


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor, *_: Tensor) -> tuple:
    states, *tensors = ctx.saved_tensors
    o = ChannelOperands(*tensors, *ctx.numbers)
    grads = scan_channels_backward(dy, dfinal, states, *o)
    typed = [None if of is None else grad.to(of.dtype) for of, grad in zip(tensors, grads)]
    return *typed, *[None] * (len(o) - len(typed))  # in the order of the operands


scan_channels.register_autograd(_differentiate, setup_context=_save)
