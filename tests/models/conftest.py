"""Small models whose gates do something: decays slow and fast, steps short and long, every bias in use."""

from __future__ import annotations

import pytest
import torch
from adopted_families import FAMILIES, built, filled
from checkpoint_files import official_config

from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def randomise():
    """Fills A_log, dt_bias, D, biases, norms and the embedding with values far from their defaults."""
    return filled


@pytest.fixture
def make():
    """make(**fields of Mamba2Config) -> a small random model in eval mode."""

    def build(dtype: torch.dtype = torch.float32, **fields) -> Mamba2LM:
        shape = {"d_model": 24, "n_layer": 2, "vocab_size": 61, "d_state": 8, "headdim": 8, "ngroups": 2}
        return filled(Mamba2LM(Mamba2Config(**{**shape, **fields}))).to(dtype).eval()

    return build


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def build():
    """build(family) -> a small random model of it, see `built`."""
    return built


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
