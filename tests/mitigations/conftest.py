"""A small model of 3 layers whose heads hardly forget, and a text to calibrate on."""

import pytest
import torch

from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def model():
    config = Mamba2Config(d_model=32, n_layer=3, headdim=16, d_state=8, A_init=(1e-3, 1.0), A_log_uniform=True)
    lm = Mamba2LM(config).double().eval()
    lm.train_length, lm.tokenizer = 32, ByteTokenizer()
    return lm


@pytest.fixture
def made():
    return Text("made", bytes(torch.randint(32, 127, (5000,)).tolist()))
