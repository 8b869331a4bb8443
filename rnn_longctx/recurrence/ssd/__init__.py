"""One recurrence, written once.

Shapes: B batch, T tokens, H heads, P headdim, N d_state, G groups of heads sharing B and C, L layers.
Log-decays are natural logs. Per head, with a state S of shape (P, N):

    S_t = exp(log_decay_t) * S_{t-1} + input_scale_t * x_t B_t^T
    y_t = S_t C_t + D * x_t
"""

from rnn_longctx.recurrence.ssd.scan import SSD

__all__ = ["SSD"]
