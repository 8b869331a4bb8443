"""Launches of the scan of heads of headdim 1 (`channels`, `channels_grads`). Tensors in, tensors out; no policy is read
here. Blocks and chunks are guesses: no device has timed them yet."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rnn_longctx.recurrence.ssd.kernels import channels, channels_grads, launch
from rnn_longctx.recurrence.ssd.operands import ChannelOperands

BLOCK = 32  # channels a program: one warp, a channel a thread
TILE = 8  # tokens whose states `tile_grads` holds in registers
SHORTEST = 64  # tokens a chunk, where rows and channels alone do not fill a device
SLAB = 2**30  # bytes that the states before a slab's tiles may take


class ChannelGrads(NamedTuple):
    x: Tensor  # as x
    dt: Tensor  # as dt
    A: Tensor  # (H, N) float32, and so the rest
    B: Tensor  # (B, T, G, N)
    C: Tensor
    D: Tensor  # (H)
    dt_bias: Tensor  # (H)
    initial: Tensor  # (B, H, 1, N)


def channel_blocks(o: ChannelOperands) -> int:
    """Return how many blocks of channels a row has."""
    groups = o.B.shape[2]
    return groups * triton.cdiv(o.x.shape[2] // groups, BLOCK)


def chunk_tokens(o: ChannelOperands, graded: bool) -> int:
    """Return the tokens of a chunk, whole tiles. As many chunks as fill a device with sixteen warps a processor; fewer
    than four would not pay for reading the tokens twice. With gradients, few enough tokens for a slab of one chunk."""
    batch, length, heads = o.dt.shape
    count = triton.cdiv(8 * launch.slots(o.x.device), batch * channel_blocks(o))
    size = length if count < 4 else max(triton.cdiv(length, count), SHORTEST)
    if graded:
        size = min(size, max(SLAB * TILE // (4 * batch * heads * o.B.shape[3]), SHORTEST))
    return triton.cdiv(size, TILE) * TILE


def _arguments(o: ChannelOperands, chunks: int, size: int) -> tuple[tuple, tuple, tuple, dict]:
    """Return what most kernels take alike: parameters, strides, sizes, and constants."""
    heads, (groups, d_state), table = o.x.shape[2], o.B.shape[2:], o.table
    given = (o.dt_bias, o.pad, o.drop)
    bias, pad, drop = (table if t is None else t for t in given)
    strides = (*o.x.stride()[:3], *o.dt.stride(), *o.B.stride()[:3], *o.C.stride()[:3])
    constants: dict[str, int] = dict(zip(("HAS_BIAS", "HAS_PAD", "HAS_DROP"), (t is not None for t in given)))
    constants |= {"SOFTPLUS": o.softplus, "N": d_state, "BD": BLOCK, "num_warps": 1}
    return (
        (o.A.mT.contiguous(), bias, table, pad, drop),
        strides,
        (o.x.shape[1], heads, groups, chunks, size),
        constants,
    )


def _chain(states: Tensor, own: Tensor, decays: Tensor, back: bool = False) -> None:
    batch, count, d_state, heads = states.shape
    grid = (batch, triton.cdiv(d_state * heads, 128))
    channels.chain_chunks[grid](states, own, decays, count, d_state * heads, BLOCK=128, BACK=back, num_warps=4)


def scan_forward(o: ChannelOperands, graded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y as x, the final state (B,H,1,N) float32, steps (2,B,chunks,H) float64: see `channels.walk_chunks`, and
    the states at the chunks' beginnings (B,chunks,N,H)."""
    (batch, length, heads), d_state, size = o.dt.shape, o.B.shape[3], chunk_tokens(o, graded)
    chunks = triton.cdiv(length, size)
    empty = partial(torch.empty, dtype=torch.float32, device=o.x.device)
    states, final = empty(batch, chunks, d_state, heads), empty(batch, d_state, heads)
    states[:, 0] = o.initial[:, :, 0].mT
    y = torch.empty(o.x.shape, dtype=o.x.dtype, device=o.x.device)
    steps = empty(2, batch, chunks, heads, dtype=torch.float64)
    parameters, strides, sizes, constants = _arguments(o, chunks, size)
    inputs = (o.x, o.dt, o.B, o.C, o.table if o.D is None else o.D, *parameters, states)
    constants |= {"BN": triton.next_power_of_2(d_state), "TILE": TILE, "HAS_D": o.D is not None}

    def walk(count: int, own: Tensor, decays: Tensor, *, reads: bool) -> None:
        outputs = (own, decays, y, final, steps, final, o.low, o.high)
        ways = {"FROM_ZERO": not reads, "READS": reads}
        channels.walk_chunks[(count, channel_blocks(o), batch)](
            *inputs, *outputs, *strides, *sizes, 0, 0, **constants, **ways
        )

    if chunks > 1:
        own, decays = torch.empty_like(states), torch.empty_like(states)
        walk(chunks - 1, own, decays, reads=False)
        _chain(states, own, decays)
    walk(chunks, final, final, reads=True)
    return y, final.mT[:, :, None].contiguous(), steps, states


def scan_backward(dy: Tensor, dfinal: Tensor, states: Tensor, o: ChannelOperands) -> ChannelGrads:
    """Return the gradients of what `scan_forward` read, with the states that it left."""
    (batch, length, heads), (groups, d_state), size = o.dt.shape, o.B.shape[2:], chunk_tokens(o, True)
    chunks, blocks, dy = states.shape[1], channel_blocks(o), dy.contiguous()
    empty = partial(torch.empty, dtype=torch.float32, device=o.x.device)
    grads, dA = torch.empty_like(states), torch.empty_like(states)
    grads[:, -1] = dfinal[:, :, 0].mT
    parameters, strides, sizes, constants = _arguments(o, chunks, size)
    wide = {**constants, "BN": triton.next_power_of_2(d_state)}
    if chunks > 1:
        own, decays = torch.empty_like(states), torch.empty_like(states)
        arrays = (o.dt, o.C, dy, *parameters, own, decays, o.low, o.high, *o.dt.stride(), *o.C.stride()[:3])
        channels_grads.walk_back[(chunks, blocks, batch)](*arrays, *sizes, **wide)
        _chain(grads, own, decays, back=True)

    width = size // TILE  # tiles a chunk
    slab = min(chunks, max(1, SLAB // (4 * batch * width * d_state * heads)))
    tiles = empty(batch, slab * width, d_state, heads)
    dx = torch.empty(o.x.shape, dtype=o.x.dtype, device=o.x.device)
    ddt = torch.empty(o.dt.shape, dtype=o.dt.dtype, device=o.dt.device)
    dB, dC = (empty(blocks // groups, batch, length, groups, d_state) for _ in range(2))
    dD, dbias = empty(batch, chunks, heads), empty(batch, chunks, heads)
    skip, has_D = o.table if o.D is None else o.D, {"HAS_D": o.D is not None, "TILE": TILE}
    ways = {"FROM_ZERO": False, "READS": False}
    for at in range(0, chunks, slab):
        grid, where = (min(slab, chunks - at), blocks, batch), (*strides, *sizes, at, slab * width)
        unused = (grads, grads, dx, grads, grads)
        arrays = (o.x, o.dt, o.B, o.C, skip, *parameters, states, *unused, tiles, o.low, o.high)
        channels.walk_chunks[grid](*arrays, *where, **wide, **has_D, **ways)
        arrays = (o.x, o.dt, o.B, o.C, dy, skip, *parameters, tiles, grads, dx, ddt, dA, dB, dC, dD, dbias)
        channels_grads.tile_grads[grid](*arrays, o.low, o.high, *where, **constants, **has_D)
    first = grads[:, 0].mT[:, :, None].contiguous()
    return ChannelGrads(
        dx, ddt, dA.sum((0, 1)).mT.contiguous(), dB.sum(0), dC.sum(0), dD.sum((0, 1)), dbias.sum((0, 1)), first
    )
