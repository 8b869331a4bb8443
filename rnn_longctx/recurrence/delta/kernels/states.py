"""The states of a delta rule from chunk to chunk, with norm caps between them: a Triton kernel.

fla's kernels make, of every chunk of 64 tokens by itself, w and u with which the chunk adds to the state S before it

    v' = u - w S,    S <- S diag(exp(sum of log_decay)) + v'^T k        k decayed to the chunk's end

(arXiv 2406.06484, section 3). What is left is this walk over chunks. fla's own splits the values over several programs;
here one program holds all of a head's state, since the norm is over all of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnn_longctx.recurrence.delta.kernels.chunk import CHUNK, after, written


@triton.jit
def _states(
    k_ptr, w_ptr, u_ptr, g_ptr, v_ptr, h_ptr, start_ptr, end_ptr, cap_ptr, factor_ptr,
    T, first, every,
    G: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """One head of one row. k (B,T,G or H,N), w (B,T,H,N), u and v' (B,T,H,P), g (B,T,H[,N]) in units of log 2, summed
    within chunks; h (B,chunks,H,P,N), the state before every chunk; caps hold after chunk `first`, first + every..."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    chunks = tl.cdiv(T, C)
    p, n, c = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, C)
    in_p, in_n = p < P, n < N
    whole = in_p[:, None] & in_n[None, :]
    at = p[:, None] * N + n[None, :]
    S = tl.load(start_ptr + program * P * N + at, mask=whole, other=0.0)  # (BP, BN)
    cap = tl.load(cap_ptr + head)
    for i in range(chunks):
        t = row * T + tl.cast(i, tl.int64) * C + c
        real = i * C + c < T
        tl.store(h_ptr + ((row * chunks + i) * H + head) * P * N + at, S.to(h_ptr.dtype.element_ty), mask=whole)
        of_keys, of_values = real[:, None] & in_n[None, :], real[:, None] & in_p[None, :]
        v = written(w_ptr, u_ptr, S, t, head, p, n, of_keys, of_values, H, P, N)
        tl.store(v_ptr + (t[:, None] * H + head) * P + p[None, :], v.to(v_ptr.dtype.element_ty), mask=of_values)
        last = row * T + tl.minimum(tl.cast(i, tl.int64) * C + C, T) - 1
        S = after(k_ptr, g_ptr, S, v, t, last, real, head, n, in_n, of_keys, G, H, N, PER_CHANNEL)
        if (i >= first) & ((i - first) % every == 0) & (i * C + C <= T):
            norm = tl.sqrt(tl.sum(S * S))
            factor = tl.where(norm > cap, cap / norm, 1.0)
            S *= factor
            tl.store(factor_ptr + (row * chunks + i) * H + head, factor)
    tl.store(end_ptr + program * P * N + at, S, mask=whole)


def capped_states(
    k: Tensor, w: Tensor, u: Tensor, g: Tensor, start: Tensor, caps: Tensor, first: int, every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk over the chunks of T tokens, capping the norms of the states between some of them.

    Args:
        k, w, u, g: as in the kernel; all contiguous.
        start: (B, H, P, N) float32.
        caps: (H) float32.
        first, every: the caps hold after the chunks first, first + every, ...; a part of a chunk is never followed.
    Returns:
        the states before each chunk (B, chunks, H, P, N) and v' (B, T, H, P) in u's type, the state at the end
        (B, H, P, N), and by what the state after each chunk was multiplied (B, chunks, H), float32.
    """
    batch, length, heads, headdim = u.shape
    d_state, chunks = w.shape[3], triton.cdiv(length, CHUNK)
    BP, BN = triton.next_power_of_2(headdim), triton.next_power_of_2(d_state)
    h = u.new_empty(batch, chunks, heads, headdim, d_state)
    v, end = torch.empty_like(u), torch.empty_like(start)
    factors = torch.ones(batch, chunks, heads, dtype=torch.float32, device=u.device)
    _states[(batch * heads,)](
        k, w, u, g, v, h, start, end, caps, factors, length, first, every,
        k.shape[2], heads, headdim, d_state, BP, BN, CHUNK,
        g.ndim == 4, num_warps=min(16, max(4, BP * BN // 2048)),
    )  # fmt: skip
    return h, v, end, factors
