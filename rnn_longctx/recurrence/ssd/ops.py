"""The fused scan as torch operators, `rnn_longctx::scan` and its gradient, so that torch.compile and torch.export see
one operator with known shapes where there are many kernels. Without gradients, and not being compiled, the functions
below are called as they are: an operator's dispatch costs as much time as the launches.

What they take is flat; its names and shapes are those of `Operands`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.ssd.operands import GradOperands, Maybe, Operands

_SEEN: set[tuple] = set()


def run_compiled(function: Callable, x: Tensor, kind: tuple, *args: Any) -> Any:
    """Call function(*args) on x's device. The first time with this kind of arguments, compile its kernels side by side
    before."""
    kind = (function, *kind)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if kind not in _SEEN:
            from rnn_longctx.recurrence.ssd.kernels.launcher import compiling_only

            with compiling_only():
                function(*args)
            _SEEN.add(kind)
        return function(*args)


def forward(o: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y as x; the final state (B,H,P,N) float32; log-decay (B,H) float64, summed; the factors by which the state
    was cut back, of `_factors_shape`."""
    return run_compiled(_forward, o.x, o.kind, o)


def _forward(o: Operands, look: int = 0, gate: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
    from rnn_longctx.recurrence.ssd.kernels import launch, launch_caps

    x, caps, every = o.x, o.caps, o.every
    if caps is not None and 0 < every <= x.shape[1] and not look:
        return _forward_in_segments(o)
    c = launch.blocks(x.shape[3], o.B.shape[3], x.dtype, every)
    ready = launch.prepare_chunks(o, c)
    factors = x.new_empty(x.shape[0], x.shape[2], 0, dtype=torch.float32)
    if caps is not None and 0 < every <= x.shape[1]:
        factors = launch_caps.cap_factors(o, o.initial.clone(), ready, c)
        launch_caps.cut_back(ready, factors, every)
    elif caps is not None and not every:
        factors = launch_caps.token_factors(o, ready, c)
        launch_caps.cut_back_tokens(ready, factors)
    gating = None if gate is None else (*gate, launch.gate_squares(x, c))
    sums = launch.look_sums(x, look) if look else None
    y, final = launch.scan_forward(o, o.initial, ready, c, sums=sums, look=look, gate=gating)
    if sums is None:
        total = ready.spent.sum(2, dtype=torch.float64)
        return y, final, total, (factors if gating is None else gating[2])
    per_look = torch.nn.functional.pad(ready.spent, (0, -ready.spent.shape[2] % (look // c.Q)))
    total = per_look.unflatten(2, (-1, look // c.Q)).sum(3, dtype=torch.float64).cumsum(2)
    seen = torch.cat([sums[:2].sum(4), sums[2:].amax(4)])
    return y, final, total, seen, *(() if gating is None else gating[2:])


SEGMENT = 2**18  # tokens
FIRST = 2**16  # tokens: nothing is scanned beside the first segment


def _segments(batch: int, length: int, every: int) -> list[slice]:
    """Return the segments of a stream with caps, which begin with whole pieces: each twice as long as the one before,
    up to SEGMENT."""
    segments, start, size = [], 0, FIRST
    while start < length - length % every:
        stop = start + max(every, size // (batch * every) * every)
        segments.append(slice(start, stop))
        start, size = stop, min(2 * size, SEGMENT)
    segments[-1] = slice(segments[-1].start, length)
    return segments


def _forward_in_segments(o: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_forward`, with a cap every `every` tokens. The chain of caps leaves most of the device idle: while one
    segment is scanned, the factors of the next are found beside it."""
    from rnn_longctx.recurrence.ssd.kernels import launch, launch_caps

    x, every = o.x, o.every
    batch, length, _, headdim = x.shape
    c = launch.blocks(headdim, o.B.shape[3], x.dtype, every)
    o = o._replace(pad=None, drop=None)
    segments = [o.tokens(s.start, s.stop) for s in _segments(batch, length, every)]
    y, state, walked = torch.empty(x.shape, dtype=x.dtype, device=x.device), o.initial, o.initial.clone()
    ready, factors, beside = [], [], launch_caps.Beside(x.device)  # which goes on from all that is queued here

    def find(s: Operands) -> None:
        ready.append(launch.prepare_chunks(s, c))
        cut = launch_caps.cap_factors(s, walked, ready[-1], c)
        launch_caps.cut_back(ready[-1], cut, every)
        factors.append(cut)

    with beside():
        find(segments[0])
    start = 0
    for i, s in enumerate(segments):
        beside.join(*ready[i][:-1], factors[i])
        if i + 1 < len(segments):
            with beside():
                find(segments[i + 1])
        stop = start + s.x.shape[1]
        _, state = launch.scan_forward(s, state, ready[i], c, y[:, start:stop])
        start = stop
    total = torch.stack([r.spent.sum(2, dtype=torch.float64) for r in ready]).sum(0)
    return y, state, total, torch.cat(factors, 2)


def watched(o: Operands, look: int, gate: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    """`forward` that also records statistics of the state every `look` tokens, applies an output gate, or both.

    Args:
        look: k, or 0. With k, log-decay is (B,H,ceil(T/k)) float64, up to every k-th token and to the last, and in the
            place of factors stands (3,B,H,T//k): sum, sum of squares and largest size of the state there.
        gate: z (B,T,H,P) and weight (H*P), applied to y, without caps; its squares come last, without looks in the
            place of factors.
    """
    return run_compiled(_forward, o.x, (*o.kind, look > 0, gate is None), o, look, gate)


def shard_sum(
    x: Tensor, gates: SteppedGates, B: Tensor, table: Tensor, drop: Maybe, back: bool
) -> tuple[Tensor, Tensor]:
    """As `recurrence.ssd.kernels.launch_sums.shard_sum`."""
    from rnn_longctx.recurrence.ssd.kernels import launch_sums

    kind = (x.device, x.dtype, x.shape[3], B.shape[2:], gates.dt_bias is None, drop is None, back)
    return run_compiled(launch_sums.shard_sum, x, kind, x, gates, B, table, drop, back)


def backward(g: GradOperands) -> list[Tensor]:
    """Return the gradients of x, dt (as they are), A (H), B, C (B,T,G,N), D, dt_bias (H) and initial (float32)."""
    from rnn_longctx.recurrence.ssd.kernels import launch_grads

    return list(run_compiled(launch_grads.scan_backward, g.x, g.kind, g))


_COMMON = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor initial, Tensor table"
_NUMBERS = "float low, float high, bool softplus, SymInt every"
SCHEMA = (
    f"({_COMMON}, Tensor? pad, Tensor? drop, Tensor? caps, {_NUMBERS}, SymInt[] due, SymInt position)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
GRAD_SCHEMA = (
    f"(Tensor dy, Tensor dfinal, {_COMMON}, Tensor? pad, Tensor? drop, Tensor factors, {_NUMBERS}) -> Tensor[]"
)


@torch.library.custom_op("rnn_longctx::scan", mutates_args=(), schema=SCHEMA)
def scan(*operands: Any) -> Any:
    """`forward` as an operator, with gradients."""
    return forward(Operands(*operands))


@torch.library.custom_op("rnn_longctx::scan_backward", mutates_args=(), schema=GRAD_SCHEMA)
def scan_backward(*operands: Any) -> Any:
    return backward(GradOperands(*operands))


@scan.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o = Operands(*operands)
    batch, _, heads, _ = o.x.shape
    return (
        o.x.new_empty(o.x.shape),
        torch.empty_like(o.initial),
        o.x.new_empty(batch, heads, dtype=torch.float64),
        o.x.new_empty(_factors_shape(o), dtype=torch.float32),
    )


def _factors_shape(o: Operands) -> tuple[int, ...]:
    """Return (B, H, T // every) for a cap after pieces, (B, H, chunks, Q) for caps of every token, no column
    without."""
    batch, length, heads, headdim = o.x.shape
    if o.caps is None or o.every:
        return batch, heads, 0 if o.caps is None else length // o.every
    from rnn_longctx.recurrence.ssd.kernels import launch

    Q = launch.blocks(headdim, o.B.shape[3], o.x.dtype, o.every).Q
    return batch, heads, -(-length // Q), Q


@scan_backward.register_fake
def _(*operands: Any) -> list[Tensor]:
    g = GradOperands(*operands)
    heads = g.x.shape[2]
    wide = (g.B.shape, g.C.shape, (heads,) if g.D is None else g.D.shape, (heads,), g.initial.shape)
    return [
        g.x.new_empty(g.x.shape),
        g.dt.new_empty(g.dt.shape),
        g.x.new_empty(heads, dtype=torch.float32),
        *(g.x.new_empty(shape, dtype=torch.float32) for shape in wide),
    ]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    o, factors = Operands(*inputs), output[3]
    ctx.save_for_backward(o.x, o.dt, o.A, o.B, o.C, o.D, o.dt_bias, o.initial, o.table, o.pad, o.drop, factors)
    ctx.numbers = (o.low, o.high, o.softplus, o.every)
    ctx.mark_non_differentiable(output[2], factors)


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor, *_: Tensor) -> tuple:
    g = GradOperands(dy, dfinal, *ctx.saved_tensors, *ctx.numbers)
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = scan_backward(*g)
    dD = None if g.D is None else dD.to(g.D.dtype)
    dbias = None if g.dt_bias is None else dbias.to(g.dt_bias.dtype)
    grads = (dx, ddt, dA.to(g.A.dtype), dB.to(g.B.dtype), dC.to(g.C.dtype), dD, dbias, dinitial.to(g.initial.dtype))
    return *grads, *[None] * (len(Operands._fields) - len(grads))  # in the order of Operands


scan.register_autograd(_differentiate, setup_context=_save)
