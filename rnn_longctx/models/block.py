"""What mixers are stacked into: residual blocks with a norm each, embeddings before, a norm behind."""

from __future__ import annotations

from torch import nn

from rnn_longctx.models.mixers.mamba2 import Mamba2, Mamba2Config
from rnn_longctx.models.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm residual block: h <- h + mixer(norm(h)). The sum is made together with the norm after it."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2(config)


class Backbone(nn.Module):
    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # type: ignore[arg-type]
