"""What tests of `evaluate` share: a small model, and one value of its table."""

import torch

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


def make_model(seed=0):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8, A_init=(1e-3, 1.0), A_log_uniform=True))
    model.train_length, model.tokenizer, model.name = 64, ByteTokenizer(), "tiny"
    return model.eval()


def value(frame, length, metric="nats_per_token", mitigation="none", **where):
    rows = frame[(frame.length == length) & (frame.metric == metric) & (frame.mitigation == mitigation)]
    assert len(rows) == 1, rows
    return rows.iloc[0]
