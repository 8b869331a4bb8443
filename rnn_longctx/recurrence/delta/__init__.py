"""The delta rule: what a key held is erased before something new is written to it.

Shapes: B batch, T tokens, H heads, P headdim (of the values), N d_state (of the keys), G groups of heads sharing their
keys and queries. In the scan's words x are the values, B the keys, C the queries. Per head, with a state S (P, N) and
a = exp(log_decay):

    S_t = S_{t-1} diag(a_t) - erase_t (S' read_t) along_t^T + input_scale_t * x_t B_t^T        S' = S_{t-1} diag(a_t)
    y_t = S_t C_t + D * x_t

which is Gated DeltaNet (one decay a head), KDA (one a channel), DeltaNet (none), GDN-2 and RWKV-7 (S' = S_{t-1}): see
`rnn_longctx.recurrence.gates.DeltaGates`.
"""

from rnn_longctx.recurrence.delta.delta import DELTA

__all__ = ["DELTA"]
