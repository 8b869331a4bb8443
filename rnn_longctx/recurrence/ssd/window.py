"""Sliding window: the state holds the last r tokens only (arXiv 2410.07145 v1, section on sliding windows).

    S^(r)_t = S_t - exp(sum of log_decay over the last r tokens) * S_{t-r}

No subtraction is made here, so nothing cancels. The stream is cut into blocks of r tokens; a token at offset o of a
block sees its own block up to o (a scan started from zero) and the block before from offset o + 1 on. Both blocks are
cut into the same chunks, so of the block before a token needs the rest of one chunk (a masked product) and the sum of
the whole chunks after it, kept as states. Every factor is a product of decays that lie between the two tokens.

Memory: the delay line (2 r inputs) and r / chunk states. The block grid is the stream's, not a row's: where it lies
changes no result. Padding may stand only before a row's first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.recurrence.carry import ScanCarry, WindowCarry
from rnn_longctx.recurrence.gates import Gates

CHUNK = 64
Piece = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def window_scan(
    x: Tensor, gates: Gates, B: Tensor, C: Tensor, *, size: int, carry: ScanCarry, drop: Tensor | None, piece: Piece
) -> tuple[Tensor, ScanCarry]:
    """As `chunked_scan`, each token seeing itself and the `size` - 1 tokens before it."""
    log_decay, scale, length = gates.log_decay, gates.input_scale, x.shape[1]
    w = carry.window or empty(x, log_decay, B, size, carry)
    marks = drop.any(0).nonzero().flatten().tolist() if drop is not None else []
    outputs, t = [], 0
    while t < length:
        if drop is not None and drop[:, t].any():
            w = _forget(w, ~drop[:, t])
        offset = w.x.shape[1]
        chunk = offset // CHUNK
        u = min(length, t + min((chunk + 1) * CHUNK, size) - offset, *(m for m in marks if m > t))
        ld, C_part = log_decay[:, t:u], C[:, t:u]
        y, block = piece(x[:, t:u], ld, scale[:, t:u], B[:, t:u], C_part, w.block)

        # what the block before still gives: decayed to that block's end already, and from there to here
        head = w.head[:, None] + ld.cumsum(1)  # (B, c, H[, N])
        rest = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, size))
        o = torch.arange(offset, offset + u - t, device=x.device)
        later = torch.arange(rest.start, rest.stop, device=x.device) > o[:, None]  # (c, chunk)
        y = y + _before(C_part, head, w.x_before[:, rest], w.B_before[:, rest], w.after[:, chunk], later)

        outputs.append(y)
        w = extend(w, block, x[:, t:u] * scale[:, t:u, :, None], B[:, t:u], ld)
        t = u
    return torch.cat(outputs, 1), ScanCarry(w.block, carry.position, carry.log_decay, w)


def window_state(carry: ScanCarry) -> Tensor:
    """The windowed state S^(r) (B, H, P, N) of a carry: the last r inputs, each decayed by what came after it."""
    w = carry.window
    if w is None:
        return carry.state
    if w.block.dtype in (torch.bfloat16, torch.float16):  # kept so, and worked out wide
        return window_state(carry.kept_in(torch.float32))
    offset = w.x.shape[1]
    chunk = min(offset // CHUNK, w.after.shape[1] - 1)
    rest = slice(offset, min((chunk + 1) * CHUNK, w.size))
    per_group = w.x.shape[2] // w.B_before.shape[2]
    B = w.B_before[:, rest].repeat_interleave(per_group, 2)
    before = w.after[:, chunk] + torch.einsum("bshp,bshn->bhpn", w.x_before[:, rest], B)
    decay = w.head.exp()
    return w.block + before * (decay[:, :, None] if decay.ndim == 3 else decay[..., None, None])


def _before(C: Tensor, head: Tensor, x: Tensor, B: Tensor, after: Tensor, later: Tensor) -> Tensor:
    """(B,c,H,P) of c tokens from the block before: `x`, `B` its chunk at the same offsets, `after` what follows."""
    heads = x.shape[2]
    C = C.repeat_interleave(heads // C.shape[2], 2)  # (B, c, H, N)
    B = B.repeat_interleave(heads // B.shape[2], 2)
    C = C * (head if head.ndim == 4 else head[..., None]).exp()
    weights = torch.einsum("bthn,bshn->bhts", C, B) * later
    return torch.einsum("bhts,bshp->bthp", weights, x) + torch.einsum("bthn,bhpn->bthp", C, after)


def extend(w: WindowCarry, block: Tensor, x: Tensor, B: Tensor, log_decay: Tensor) -> WindowCarry:
    """The carry after c more tokens of its block: the block's state, x (B,c,H,P) times the input scale, B (B,c,G,N),
    log_decay (B,c,H[,N])."""
    w = WindowCarry(
        w.size,
        block,
        w.head + log_decay.sum(1),
        torch.cat([w.x, x], 1),
        torch.cat([w.B, B], 1),
        torch.cat([w.log_decay, log_decay], 1),
        w.x_before,
        w.B_before,
        w.after,
    )
    return _turn(w) if w.x.shape[1] == w.size else w


def _turn(w: WindowCarry) -> WindowCarry:
    """The full block becomes the block before, and a new one begins."""
    x, B = _decayed(w.x, w.B, _after_each(w.log_decay))
    return WindowCarry(
        w.size,
        torch.zeros_like(w.block),
        torch.zeros_like(w.head),
        w.x[:, :0],
        w.B[:, :0],
        w.log_decay[:, :0],
        x,
        B,
        _after_chunks(x, B, w.size),
    )


def level(windows: list[WindowCarry]) -> list[WindowCarry]:
    """The same carries with their blocks begun at one place, so that their rows can be put together: as many tokens in
    each one's current block as in the one that has fewest. Those before go into the block before."""
    offset = min(w.x.shape[1] for w in windows)
    return [_moved(w, w.x.shape[1] - offset) for w in windows]


def _moved(w: WindowCarry, count: int) -> WindowCarry:
    """The carry whose blocks begin `count` tokens later: so many of the current one's tokens are of the block before.
    Worked out at least in float32."""
    if count == 0:
        return w
    dtypes = {f.name: v.dtype for f in fields(w) if isinstance(v := getattr(w, f.name), Tensor)}
    wide = {name: getattr(w, name).to(torch.promote_types(dtype, torch.float32)) for name, dtype in dtypes.items()}
    w = replace(w, **wide)
    gone, log_decay = w.log_decay[:, :count], w.log_decay[:, count:]
    old = _decayed(w.x_before[:, count:], w.B_before[:, count:], gone.sum(1, keepdim=True))
    new = _decayed(w.x[:, :count], w.B[:, :count], _after_each(gone))
    x_before, B_before = (torch.cat(pair, 1) for pair in zip(old, new))
    x, B = _decayed(w.x[:, count:], w.B[:, count:], _after_each(log_decay))
    block = torch.einsum("bshp,bshn->bhpn", x, B.repeat_interleave(x.shape[2] // B.shape[2], 2))
    moved = WindowCarry(
        w.size,
        block,
        log_decay.sum(1),
        w.x[:, count:],
        w.B[:, count:],
        log_decay,
        x_before,
        B_before,
        _after_chunks(x_before, B_before, w.size),
    )
    return replace(moved, **{name: getattr(moved, name).to(dtype) for name, dtype in dtypes.items()})


def _decayed(x: Tensor, B: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """x (B,c,H,P) times the decay after each token, log_decay (B,c or 1,H); where that is per channel (B,c or 1,H,N),
    B (B,c,G or H,N) times it."""
    if log_decay.ndim == 3:
        return x * log_decay.exp()[..., None], B
    return x, B.repeat_interleave(x.shape[2] // B.shape[2], 2) * log_decay.exp()


def _after_chunks(x: Tensor, B: Tensor, size: int) -> Tensor:
    """`WindowCarry.after` of a block's r tokens, each decayed to the block's end."""
    # every chunk but the first, and one of zeros: each adds to the states of all chunks before it
    chunks = -(-size // CHUNK)
    x_KC, B_KC = (
        F.pad(v[:, CHUNK:], (0, 0, 0, 0, 0, chunks * CHUNK - max(0, size - CHUNK))).unflatten(1, (chunks, CHUNK))
        for v in (x, B)
    )
    added = torch.einsum("bkcgrp,bkcgn->bkgrpn", x_KC.unflatten(3, (B.shape[2], -1)), B_KC).flatten(2, 3)
    return added.flip(1).cumsum(1).flip(1)


def _after_each(log_decay: Tensor) -> Tensor:
    """Sum of the log-decays after each token of a block, without subtracting."""
    later = torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], 1)
    return later.flip(1).cumsum(1).flip(1)


def empty(x: Tensor, log_decay: Tensor, B: Tensor, size: int, carry: ScanCarry) -> WindowCarry:
    """The carry before a row's first token; x, log_decay and B are the tokens' that follow."""
    batch, _, heads, headdim = x.shape
    zeros = x.new_zeros
    per_channel = log_decay.ndim == 4
    B_heads = heads if per_channel else B.shape[2]
    return WindowCarry(
        size,
        torch.zeros_like(carry.state),
        torch.zeros_like(log_decay[:, 0]),
        x[:, :0],
        B[:, :0],
        log_decay[:, :0],
        zeros(batch, size, heads, headdim),
        zeros(batch, size, B_heads, B.shape[3]),
        zeros(batch, -(-size // CHUNK), heads, headdim, B.shape[3]),
    )


def _forget(w: WindowCarry, keep: Tensor) -> WindowCarry:
    """Rows where `keep` (B,) is False lose what they have read."""
    k = keep.to(w.x.device, w.x.dtype)
    four, five = k[:, None, None, None], k[:, None, None, None, None]
    return WindowCarry(
        w.size, w.block * four, w.head, w.x * four, w.B, w.log_decay, w.x_before * four, w.B_before, w.after * five
    )
