"""What one chunk of a delta rule writes and leaves of a state, in Triton: what the kernels that walk over chunks share.

    v' = u - w S,    S <- S diag(exp(sum of log_decay)) + v'^T k        see `kernels.states`

Indices are a kernel's own: tokens t (C) of all rows, channels p (BP) of values and n (BN) of keys, and masks of those
that there are. k (B,T,G or H,N), w (B,T,H,N), u (B,T,H,P), g (B,T,H[,N]) in units of log 2, summed within chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 64  # tokens


@triton.jit
def written(
    w_ptr, u_ptr, S, t, head, p, n, of_keys, of_rows,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return v' (C, BP), what a chunk's tokens write to the state S (BP, BN) before it."""
    w = tl.load(w_ptr + (t[:, None] * H + head) * N + n[None, :], mask=of_keys, other=0.0)  # (C, BN)
    u = tl.load(u_ptr + (t[:, None] * H + head) * P + p[None, :], mask=of_rows, other=0.0)  # (C, BP)
    return u - tl.dot(w, tl.trans(S).to(w.dtype))


@triton.jit
def after(
    k_ptr, g_ptr, S, v, t, last, real, head, n, in_n, of_keys,
    G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Return the state after a chunk: of S before it, v' (C, BP), its last token, the mask of those there are (C)."""
    if PER_CHANNEL:
        k = tl.load(k_ptr + (t[:, None] * H + head) * N + n[None, :], mask=of_keys, other=0.0)
        S *= tl.exp2(tl.load(g_ptr + (last * H + head) * N + n, mask=in_n, other=0.0))[None, :]
    else:
        k = tl.load(k_ptr + (t[:, None] * G + head // (H // G)) * N + n[None, :], mask=of_keys, other=0.0)
        g, end = tl.load(g_ptr + t * H + head, mask=real, other=0.0), tl.load(g_ptr + last * H + head)
        v *= tl.where(real, tl.exp2(end - g), 0.0)[:, None]
        S *= tl.exp2(end)
    S += tl.dot(tl.trans(v).to(k.dtype), k)
    return S
