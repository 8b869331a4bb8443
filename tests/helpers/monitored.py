"""What tests of the monitor share: tiny models whose heads forget, or never do, and what a monitor reports of them."""

import math

import torch
import transformers as hf

from rnn_longctx import CollapseMonitor, adopt
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

EVERY, LENGTH, SHORT = 16, 64, 32
FORGET_NOT, FORGET = (1e-6, 1e-5), (1.0, 16.0)
RRI = "rri:alpha=0.5,beta=1"
NEAR = {"rtol": 0, "atol": 1e-5}


def ids_of(low=97, high=123, length=1024, rows=1):
    return torch.randint(low, high, (rows, length))


def text(low=97, high=123):
    return Text("letters", bytes(torch.randint(low, high, (4096,)).tolist()))


def model(A_init=FORGET_NOT):
    shape = {"d_model": 32, "n_layer": 3, "headdim": 16, "d_state": 8, "dt_init": (0.05, 0.2)}
    lm = Mamba2LM(Mamba2Config(**shape, A_init=A_init)).eval()
    for mixer in lm.mixers:
        torch.nn.init.constant_(
            mixer.conv1d.bias, 0.5
        )  # inputs of a mean, so that a state without decay grows with them
    lm.train_length, lm.tokenizer, lm.name = LENGTH, ByteTokenizer(), "tiny"
    return lm


def calibrated(lm):
    return CollapseMonitor.calibrated(lm, text(), every=EVERY)


def transformer(family="mamba2"):
    common = {"hidden_size": 32, "vocab_size": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    config = {
        "mamba2": lambda: hf.Mamba2Config(
            **common, num_heads=8, head_dim=8, state_size=16, n_groups=1, num_hidden_layers=2, chunk_size=8
        ),
        "bamba": lambda: hf.BambaConfig(**common, **attention, **mamba, num_hidden_layers=3, attn_layer_indices=[1]),
        "mamba": lambda: hf.MambaConfig(**common, state_size=4, num_hidden_layers=2, expand=2, time_step_rank=4),
    }[family]()
    lm = hf.AutoModelForCausalLM.from_config(config).eval()
    for module in lm.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if hasattr(module, "A_log"):
            torch.nn.init.constant_(module.A_log, math.log(1e-5))
            torch.nn.init.constant_(module.conv1d.bias, 0.5)  # as above
    lm.generation_config.eos_token_id = None
    adopt(lm, name="tiny", tokenizer=ByteTokenizer(), train_length=SHORT)
    return lm


@torch.no_grad()
def watched(lm, monitor, ids, **more):
    with monitor.on(lm, lambda report: None, **more) as watch:
        for _ in lm.stream(ids, segment=200):
            pass
    return watch.reports


def first(reports, status="collapsed"):
    return next(r.position for r in reports if r.status == status)
