"""The fused scan as torch operators, `rnn_longctx::scan` and its gradient, so that torch.compile and torch.export see
one operator with known shapes where there are many kernels. Without gradients, and not being compiled, the functions
below are called as they are: an operator's dispatch costs as much time as the launches.

Shapes: see `recurrence.ssd`. table (4, H): the policy's mul, add, gain, min_dt. pad (B): leading tokens of a row to
leave out. drop (B, T) int8: 1 where the state is dropped before the token. caps (n, H): norm caps; with `every` > 0
there is one, after each `every`-th token, whole chunks; otherwise one is due after token t where every[i] divides
position + t + 1. No policy is known here.
"""

# no `from __future__ import annotations`: torch reads the types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Maybe = Tensor | None


_SEEN: set[tuple] = set()


def _run(function: Callable, x: Tensor, B: Tensor, every: int, maybe: tuple[Maybe, ...], args: tuple) -> Any:
    """Call function(*args) on x's device. The first time with these types, sizes and arguments, compile its kernels
    side by side before."""
    kind = (function, x.device, x.dtype, x.shape[3], B.shape[2:], every, *(t is None for t in maybe))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if kind not in _SEEN:
            from rnn_longctx.recurrence.ssd.kernels.launcher import compiling_only

            with compiling_only():
                function(*args)
            _SEEN.add(kind)
        return function(*args)


def forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, dt_bias: Maybe, initial: Tensor,
            table: Tensor, pad: Maybe, drop: Maybe, caps: Maybe, low: float, high: float, softplus: bool, every: int,
            due: list[int], position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y as x; the final state (B,H,P,N) float32; log-decay (B,H) float64, summed; the factors by which the state was
    cut back, of `_factors_shape`."""
    args = (x, dt, A, B, C, D, dt_bias, initial, table, pad, drop, caps, low, high, softplus, every, due, position)
    return _run(_forward, x, B, every, (D, dt_bias, pad, drop, caps), args)


def _forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, dt_bias: Maybe, initial: Tensor,
             table: Tensor, pad: Maybe, drop: Maybe, caps: Maybe, low: float, high: float, softplus: bool, every: int,
             due: list[int], position: int, look: int = 0, z: Maybe = None,
             weight: Maybe = None) -> tuple[Tensor, ...]:  # fmt: skip
    from rnn_longctx.recurrence.ssd.kernels import launch, launch_caps

    if caps is not None and 0 < every <= x.shape[1] and not look:
        return _forward_in_stretches(x, dt, A, B, C, D, dt_bias, initial, table, caps[0], low, high, softplus, every)
    c = launch.blocks(x.shape[3], B.shape[3], x.dtype, every)
    ready = launch.prepare_chunks(dt, A, B, C, dt_bias, table, pad, drop, low, high, softplus, x.shape[3], c)
    factors = x.new_empty(x.shape[0], x.shape[2], 0, dtype=torch.float32)
    if caps is not None and 0 < every <= x.shape[1]:
        factors = launch_caps.cap_factors(x, B, A, table, initial.clone(), low, caps[0], every, ready, c)
        launch_caps.cut_back(ready, factors, every)
    elif caps is not None and not every:
        factors = launch_caps.token_factors(x, B, initial, caps, tuple((k, position) for k in due), ready, c)
        launch_caps.cut_back_tokens(ready, factors)
    gate = None if z is None or weight is None else (z, weight, launch.gate_squares(x, c))
    sums = launch.look_sums(x, look) if look else None
    y, final = launch.scan_forward(
        x, B, C, D, A, table, drop, initial, low, ready, c, sums=sums, look=look, gate=gate
    )  # fmt: skip
    if sums is None:
        spent = ready.spent.sum(2, dtype=torch.float64)
        return y, final, spent, (factors if gate is None else gate[2])
    per_look = torch.nn.functional.pad(ready.spent, (0, -ready.spent.shape[2] % (look // c.Q)))
    spent = per_look.unflatten(2, (-1, look // c.Q)).sum(3, dtype=torch.float64).cumsum(2)
    seen = torch.cat([sums[:2].sum(4), sums[2:].amax(4)])
    return y, final, spent, seen, *(() if gate is None else gate[2:])


STRETCH = 2**18  # tokens
FIRST = 2**16  # tokens: nothing is scanned beside the first stretch


def _stretches(batch: int, length: int, every: int) -> list[slice]:
    """Parts of a stream of caps, which begin with whole pieces: each twice as long as the one before, up to STRETCH."""
    parts, start, size = [], 0, FIRST
    while start < length - length % every:
        stop = start + max(every, size // (batch * every) * every)
        parts.append(slice(start, stop))
        start, size = stop, min(2 * size, STRETCH)
    parts[-1] = slice(parts[-1].start, length)
    return parts


def _forward_in_stretches(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, dt_bias: Maybe,
                          initial: Tensor, table: Tensor, caps: Tensor, low: float, high: float, softplus: bool,
                          every: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With a cap (H) every `every` tokens. The chain of caps leaves most of the device idle: while one stretch is
    scanned, the factors of the next are found beside it."""
    from rnn_longctx.recurrence.ssd.kernels import launch, launch_caps

    batch, length, _, headdim = x.shape
    c = launch.blocks(headdim, B.shape[3], x.dtype, every)
    parts = _stretches(batch, length, every)
    y, state, walked = torch.empty(x.shape, dtype=x.dtype, device=x.device), initial, initial.clone()
    ready, factors, beside = [], [], launch_caps.Beside(x.device)  # which goes on from all that is queued here

    def find(part: slice) -> None:
        own = (dt[:, part], A, B[:, part], C[:, part], dt_bias, table, None, None, low, high, softplus, headdim, c)
        ready.append(launch.prepare_chunks(*own))
        found = launch_caps.cap_factors(x[:, part], B[:, part], A, table, walked, low, caps, every, ready[-1], c)
        launch_caps.cut_back(ready[-1], found, every)
        factors.append(found)

    with beside():
        find(parts[0])
    for i, part in enumerate(parts):
        beside.join(*ready[i][:-1], factors[i])
        if i + 1 < len(parts):
            with beside():
                find(parts[i + 1])
        _, state = launch.scan_forward(x[:, part], B[:, part], C[:, part], D, A, table, None, state, low, ready[i], c,
                                       y[:, part])  # fmt: skip
    spent = torch.stack([part.spent.sum(2, dtype=torch.float64) for part in ready]).sum(0)
    return y, state, spent, torch.cat(factors, 2)


def watched(look: int, gate: tuple[Tensor, Tensor] | None, *args: Any) -> tuple[Tensor, ...]:
    """`forward(*args)` that also looks, gates, or both.

    look: k, or 0. With k, log-decay is (B,H,ceil(T/k)) float64, up to every k-th token and to the last, and in the
    place of factors stands (3,B,H,T//k): sum, sum of squares and largest size of the state there. gate, without caps:
    z (B,T,H,P) and weight (H*P), applied to y; the gate's squares come last, without looks in the place of factors."""
    x, B, every, maybe = args[0], args[3], args[15], (args[5], args[6], args[9], args[10], args[11])
    kind = (*maybe, x if look else None, None if gate is None else x)
    return _run(_forward, x, B, every, kind, (*args, look, *(gate or ())))


def stretch_sum(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Maybe, *rest: Any) -> tuple[Tensor, Tensor]:
    """As `recurrence.ssd.kernels.launch_sums`."""
    from rnn_longctx.recurrence.ssd.kernels import launch_sums

    return _run(launch_sums.stretch_sum, x, B, 0, (dt_bias, rest[1], x if rest[-1] else None),
                (x, dt, A, B, dt_bias, *rest))  # fmt: skip


def backward(dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe,
             dt_bias: Maybe, initial: Tensor, table: Tensor, pad: Maybe, drop: Maybe, factors: Tensor, low: float,
             high: float, softplus: bool, every: int) -> list[Tensor]:  # fmt: skip
    """The gradients of x, dt (as they are), A (H), B, C (B,T,G,N), D, dt_bias (H) and initial (float32)."""
    from rnn_longctx.recurrence.ssd.kernels import launch, launch_grads

    args = (x, dt, A, B, C, D, dt_bias, table, pad, drop, initial, low, high, softplus, dy.contiguous(),
            dfinal.contiguous(), launch.blocks(x.shape[3], B.shape[3], x.dtype, every),
            factors if factors.shape[2] else None, every)  # fmt: skip
    return list(_run(launch_grads.scan_backward, x, B, every, (D, dt_bias, pad, drop, args[-2]), args))


scan = torch.library.custom_op("rnn_longctx::scan", forward, mutates_args=())
scan_backward = torch.library.custom_op("rnn_longctx::scan_backward", backward, mutates_args=())


@scan.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, dt_bias: Maybe, initial: Tensor,
      table: Tensor, pad: Maybe, drop: Maybe, caps: Maybe, low: float, high: float, softplus: bool, every: int,
      due: list[int], position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, heads, headdim = x.shape
    return (
        x.new_empty(x.shape), torch.empty_like(initial), x.new_empty(batch, heads, dtype=torch.float64),
        x.new_empty(_factors_shape(batch, length, heads, headdim, B.shape[3], x.dtype, caps, every),
                    dtype=torch.float32),
    )  # fmt: skip


def _factors_shape(batch: int, length: int, heads: int, headdim: int, d_state: int, dtype: torch.dtype, caps: Maybe,
                   every: int) -> tuple[int, ...]:  # fmt: skip
    """(B, H, T // every) for a cap after pieces, (B, H, chunks, Q) for caps of every token, no column without."""
    if caps is None or every:
        return batch, heads, 0 if caps is None else length // every
    from rnn_longctx.recurrence.ssd.kernels import launch

    Q = launch.blocks(headdim, d_state, dtype, every).Q
    return batch, heads, -(-length // Q), Q


@scan_backward.register_fake
def _(dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, dt_bias: Maybe,
      initial: Tensor, table: Tensor, pad: Maybe, drop: Maybe, factors: Tensor, low: float, high: float,
      softplus: bool, every: int) -> list[Tensor]:  # fmt: skip
    heads = x.shape[2]
    wide = (B.shape, C.shape, (heads,) if D is None else D.shape, (heads,), initial.shape)
    return [
        x.new_empty(x.shape), dt.new_empty(dt.shape), x.new_empty(heads, dtype=torch.float32),
        *(x.new_empty(shape, dtype=torch.float32) for shape in wide),
    ]  # fmt: skip


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:11], output[3])
    ctx.settings = (*inputs[12:15], inputs[15])
    ctx.mark_non_differentiable(output[2], output[3])


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor, *_: Tensor) -> tuple:
    x, dt, A, B, C, D, dt_bias, initial, table, pad, drop, factors = ctx.saved_tensors
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = scan_backward(
        dy, dfinal, x, dt, A, B, C, D, dt_bias, initial, table, pad, drop, factors, *ctx.settings
    )
    dD = None if D is None else dD.to(D.dtype)
    dbias = None if dt_bias is None else dbias.to(dt_bias.dtype)
    return (dx, ddt, dA.to(A.dtype), dB.to(B.dtype), dC.to(C.dtype), dD, dbias, dinitial.to(initial.dtype),
            *[None] * 10)  # fmt: skip


scan.register_autograd(_differentiate, setup_context=_save)
