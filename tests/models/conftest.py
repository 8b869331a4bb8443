"""Small models whose gates do something: decays slow and fast, steps short and long, every bias in use."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from adopted_families import DELTA_FAMILIES, FAMILIES, VOCAB
from checkpoint_files import official_config
from torch import nn

from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
def _randomise(model: nn.Module) -> nn.Module:
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "A_log":
            p.uniform_(math.log(0.01), math.log(16.0))
        elif last == "dt_bias":
            p.uniform_(-4.0, 1.0)
        elif last in ("D", "bias"):
            p.normal_(0.0, 0.5)
        elif "norm" in name:
            p.normal_(1.0, 0.3)
        elif "embedding" in name:
            p.normal_()
    return model


@pytest.fixture
def randomise():
    """Fills A_log, dt_bias, D, biases, norms and the embedding with values far from their defaults."""
    return _randomise


@pytest.fixture
def make():
    """make(**fields of Mamba2Config) -> a small random model in eval mode."""

    def build(dtype: torch.dtype = torch.float32, **fields) -> Mamba2LM:
        shape = {"d_model": 24, "n_layer": 2, "vocab_size": 61, "d_state": 8, "headdim": 8, "ngroups": 2}
        return _randomise(Mamba2LM(Mamba2Config(**{**shape, **fields}))).to(dtype).eval()

    return build


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def build(randomise):
    def made(family, vocab=VOCAB):
        config = FAMILIES[family]()
        config.vocab_size = vocab
        model = randomise(hf.AutoModelForCausalLM.from_config(config)).eval()
        for m in model.modules():
            if isinstance(m, nn.Linear):  # so that every layer matters
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
            if family in DELTA_FAMILIES and isinstance(m, nn.Conv1d):  # so that states are as large as a scan's
                nn.init.normal_(m.weight)
        randomise(model)
        if family in DELTA_FAMILIES:
            nn.init.normal_(model.get_input_embeddings().weight)
        for m in model.modules():  # Qwen's norms scale by 1 + weight
            if type(m).__name__.startswith("Qwen") and type(m).__name__.endswith("RMSNorm"):
                m.weight.data -= 1
        model.generation_config.eos_token_id = None
        return model

    return made


@pytest.fixture
def model(family, build):
    return build(family)


@pytest.fixture
def official(make):
    """(config.json, state dict) of a small model as mamba-ssm writes it: tied head too, padded vocabulary."""
    model = make(vocab_size=64, ngroups=1)
    config = official_config(24, 2, vocab_size=61, d_state=8, headdim=8, chunk_size=32)
    return config, {k: v.detach() for k, v in model.state_dict().items()}


@pytest.fixture
def own(make, tmp_path):
    """A directory in the library's own layout."""
    checkpoint.save(make(), tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def eager():
    """What is compiled is a module of another kind all the same; compiling a family's PyTorch scan takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield
