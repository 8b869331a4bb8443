"""Our models against fla's own, on the same weights: where flash-linear-attention is installed. Without a GPU:

    TRITON_INTERPRET=1 pytest -m slow tests/models/checkpoint/test_fla_itself.py

Its kernels run in Triton's interpreter then: float32, one configuration each, and 60 tokens, read step by step.
"""

from __future__ import annotations

import os

import pytest
import torch

import rnn_longctx
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.checkpoint import save
from rnn_longctx.models.checkpoint.fla import TYPES
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)
pytest.importorskip("fla")

from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime.autotuner import Autotuner

pytestmark = pytest.mark.slow
CLOSE = 1e-4
SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 97}
THEIRS = {
    "gla": {"num_heads": 2, "intermediate_size": 96},
    "retnet": {"num_heads": 2, "intermediate_size": 96},
    "hgrn2": {"expand_ratio": 32, "intermediate_size": 96},
    "mamba": {"state_size": 4},
    "gated_deltanet": {"num_heads": 2, "head_dim": 16, "num_v_heads": 4, "intermediate_size": 96},
    "kda": {"num_heads": 2, "head_dim": 16, "intermediate_size": 96},
    "delta_net": {"num_heads": 2, "use_gate": True, "intermediate_size": 96},
    "rwkv7": {"head_dim": 16, "num_heads": 4, "intermediate_size": 96},
}
OURS = {
    "gla": "gla:heads=2,expand_k=1",
    "retnet": "retnet:heads=4,expand_v=1",
    "hgrn2": "hgrn2:heads=2",
    "mamba": "mamba1:d_state=4,dt_rank=3",
    "gated_deltanet": "gated-deltanet:heads=2,head_dim=16,expand_v=1,neg_eigval=true",
    "kda": "kda:heads=2,head_dim=16,lower_bound=-5",
    "delta_net": "deltanet:heads=4,expand_v=2",
    "rwkv7": ["rwkv7:headdim=16", "rwkv7-ffn:expand=1.5"],
}


@pytest.fixture(autouse=True)
def _one_configuration(monkeypatch):
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, _: self.configs[:1])


@torch.no_grad()
def stirred(module: torch.nn.Module, factor: float) -> torch.nn.Module:
    """Weights far enough from where they begin for every part to matter; bounds stay in their order. factor: of
    matrices; theirs, and ours of the delta rule, begin at a fifth of our others."""
    for name, p in module.named_parameters():
        if name.endswith("bound"):
            p.add_(0.2 * torch.rand(()))
        elif p.ndim == 1 or "bounds" in name:
            p.add_(0.3 * torch.randn_like(p))
        elif not p.any():  # of a low-rank map
            p.normal_(std=0.2)
        elif "dt_proj" not in name and "A_log" not in name:
            p.mul_(factor)
    return module.eval()


@torch.no_grad()
def same(theirs: torch.nn.Module, ours: LM) -> None:
    ids = torch.randint(97, (2, 60))
    expected, cache = theirs(ids, use_cache=False).logits, Cache()
    streamed = torch.cat([ours.logits(ours(piece, cache)) for piece in ids.split([1, 30, 29], 1)], 1)
    for found in (ours.logits(ours(ids)), streamed):
        off = float((found - expected).abs().max())
        print(f"off by {off:.1e} of a spread of {float(expected.std()):.2f}")
        assert off <= CLOSE


def test_every_type_is_tried():
    assert set(TYPES) - {"mamba3"} == set(THEIRS) == set(OURS)  # (its forward is mamba-ssm's kernels, for a GPU alone)


@pytest.mark.parametrize("kind", THEIRS)
def test_theirs_is_read(kind, tmp_path):
    config = AutoConfig.for_model(kind, **SHAPE, **THEIRS[kind], fuse_cross_entropy=False)
    if kind == "mamba":  # transformers' own has the name
        from fla.models.mamba import MambaConfig, MambaForCausalLM

        theirs = stirred(MambaForCausalLM(MambaConfig(**SHAPE, **THEIRS[kind])), 5)
    else:
        theirs = stirred(AutoModelForCausalLM.from_config(config), 5)
    theirs.save_pretrained(tmp_path)
    same(theirs, rnn_longctx.load(tmp_path))


@pytest.mark.parametrize("kind", OURS)
def test_ours_is_read_by_theirs(kind, tmp_path):
    around = {"mamba": {}, "rwkv7": {"norm": "layer"}}.get(kind, {"mlp": 1.5})
    config = ModelConfig(OURS[kind], d_model=64, n_layer=6 if kind == "rwkv7" else 3, vocab_size=97, **around)
    ours = stirred(LM(config), 5 if kind in ("gated_deltanet", "kda", "delta_net") else 1)
    save(ours, tmp_path, layout="fla")
    if kind == "mamba":
        from fla.models.mamba import MambaForCausalLM as Model
    else:
        Model = AutoModelForCausalLM
    theirs, report = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    same(theirs.eval(), ours)
