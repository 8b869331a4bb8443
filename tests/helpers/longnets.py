"""Small models of LongNet, and how often its patterns give a query a key."""

from __future__ import annotations

import torch

from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.longnet import LongNetConfig

WIDTH = 16
SETTINGS = [  # (heads, segments, dilations)
    (2, "7", "1"),
    (4, "4/12/36", "1/2/3"),  # every head has a shift of its own
    (2, "6/24/96", "1/4/16"),  # fewer heads than a dilation: positions that no head takes
    (8, "6/30", "3/5"),  # more heads than a dilation; some tokens of a head are taken by no pattern
    (4, "5/20", "5/4"),  # a segment of which a head takes one token
    (1, "4/8/16", "4/4/8"),  # most tokens are taken by no pattern
]


def spec(heads: int, segments: str, dilations: str, positions: str = "rope") -> str:
    return f"longnet:heads={heads},segments={segments},dilations={dilations},positions={positions}"


def model_of(text: str, layers: int = 1) -> LM:
    model = LM(ModelConfig(text, d_model=WIDTH, n_layer=layers, vocab_size=9)).double().eval()
    torch.nn.init.normal_(model.backbone.embedding.weight)
    return model


def multiplicities(config: LongNetConfig, length: int) -> torch.Tensor:
    """(H, T, T): how often the patterns give a query, in rows, a key, in columns."""
    counts = torch.zeros(config.heads, length, length, dtype=torch.float64)
    for w, r in zip(map(int, str(config.segments).split("/")), map(int, str(config.dilations).split("/"))):
        for head in range(config.heads):
            for begin in range(0, length, w):
                taken = [t for t in range(begin, min(begin + w, length)) if (t - begin) % r == head % r]
                for query in taken:
                    for key in taken:
                        counts[head, query, key] += key <= query
    return counts
