"""What fla's kernels make of every chunk by itself, by the textbook: for tests of the kernels that walk over chunks."""

import torch


def chunk_parts(inputs, gates, C):
    """k, w, u and the decays of chunks of C tokens as fla's kernels hand them on: (I + L)^-1 of each chunk."""
    (B, T, H, _), G = inputs.x.shape, inputs.B.shape[2]
    x, key = inputs.x, inputs.B.repeat_interleave(H // G, 2)
    decay = gates.log_decay if gates.per_channel else gates.log_decay[..., None]
    beta, w, u, k = gates.input_scale[..., None], torch.zeros_like(key), torch.zeros_like(x), torch.zeros_like(key)
    cum = torch.zeros_like(decay)
    for t in range(0, T, C):
        s = slice(t, min(t + C, T))
        cum[:, s] = decay[:, s].cumsum(1)
        size = cum[:, s].shape[1]
        for b in range(B):
            for h in range(H):
                a, q = cum[b, s, h], key[b, s, h]
                pairs = (
                    ((a[:, None] - a[None]).exp() * (q[:, None] * q[None])).sum(-1)
                    if gates.per_channel
                    else ((a - a.mT).exp() * (q @ q.mT))
                )
                inverse = torch.linalg.inv(torch.eye(size).double() + (beta[b, s, h] * pairs).tril(-1))
                w[b, s, h] = inverse @ (beta[b, s, h] * q * a.exp())
                u[b, s, h] = inverse @ (beta[b, s, h] * x[b, s, h])
        k[:, s] = key[:, s] * (cum[:, s][:, -1:] - cum[:, s]).exp() if gates.per_channel else key[:, s]
    cum = cum / torch.log(torch.tensor(2.0))
    return (k if gates.per_channel else inputs.B), w, u, cum if gates.per_channel else cum[..., 0]
