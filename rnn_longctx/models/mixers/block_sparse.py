"""Block-sparse attention: sink blocks, a window, and blocks that a learned gate chooses for each token.

What is read: `rnn_longctx.models.sparse`. The gate is after SeerAttention (arXiv 2410.13276), but it chooses for a
token and not for a block of queries, which would look ahead; and keys are pooled with learned weights, which begin as a
mean:

    g_n = sum of a_i k_i over block n,  a = softmax(k_i p / sqrt(D))       p (D)
    s_n = (W_q q) (W_k g_n) / sqrt(G)                                      W_q, W_k (G, D), of each head its own

of queries and keys before they are turned by their positions: blocks are chosen by what they hold and not by where
they stand. Which blocks are the `top` best has no gradient. So a chosen block's tokens are weighed by sigmoid(s_n), a
bias of log sigmoid(s_n) on their scores: the loss of a language model moves a block's score up where reading more of it
helps. W_k begins as W_q, so that at first s_n is about the query times the block's mean key.

With gate = 0 nothing of that is learned (an ablation): blocks are chosen by the query times the block's mean key, as in
MoBA (arXiv 2502.13189), and all that is read is weighed alike.

The scores of all blocks, for a distillation of the choice: `BlockSparse.block_scores`; what was chosen: `kept`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.sparse import (
    Call,
    SparseAttention,
    check_blocks,
    in_float32,
    pooled,
    pooling_weights,
    too_few_blocks,
)
from rnn_longctx.spec import tuned


@dataclass(frozen=True)
class BlockSparseConfig:
    """The shape of a layer.

    Attributes:
        block: b, tokens of a block.
        window: tokens of the blocks that are read whatever they hold, a multiple of b: a token's own and those before.
        sinks: the first blocks of a document, which are read, too.
        top: how many other blocks a token reads; all, where there are fewer.
        gate: G, the channels in which a head's queries and blocks are compared; 0: there is no gate.
        positions: "rope", or "none": then a token knows the order of what it reads by the causal mask alone.
    """

    heads: int = 4
    block: int = tuned(32, over=(4, 8, 16, 32, 64, 128))
    window: int = tuned(64, over=(8, 16, 32, 64, 128, 256))
    sinks: int = tuned(1, over=(0, 1, 2))
    top: int = tuned(4, over=(1, 2, 4, 8, 16))
    gate: int = tuned(16, over=(4, 8, 16, 32))
    positions: Literal["rope", "none"] = "rope"

    def __post_init__(self) -> None:
        check_blocks("block-sparse", self)
        if self.sinks < 0 or self.gate < 0:
            raise InputError(
                f"block-sparse: expected no sink block or some, and no gate or one of some channels, got sinks = "
                f"{self.sinks}, gate = {self.gate}"
            )

    def unfit(self, length: int) -> str | None:
        """Return why so many tokens are too few for the settings, or None."""
        return too_few_blocks("block-sparse", self, length)


@MIXERS.register
class BlockSparse(SparseAttention):
    """A layer of block-sparse attention."""

    name = "block-sparse"
    Config: ClassVar[Any] = BlockSparseConfig
    examples = (  # (blocks are chosen within a test's stream)
        "block-sparse:heads=2,block=6,window=12,top=2,gate=4",
        "block-sparse:heads=2,block=7,window=7,sinks=0,top=3,gate=4,positions=none",
        "block-sparse:heads=2,block=6,window=6,top=2,gate=0",
    )

    def __init__(self, config: BlockSparseConfig, model: Shape):
        super().__init__(config, model)
        if not config.gate:
            return
        size, heads = self.head_dim, self.kv_heads
        self.pool = nn.Parameter(torch.zeros(heads, size))
        gate = torch.randn(heads, size, config.gate) * size**-0.5
        self.gate_query = nn.Parameter(self.by_head(gate, 0).clone())
        self.gate_key = nn.Parameter(gate)

    @property
    def sinks(self) -> int:
        return self.config.sinks

    @property
    def features(self) -> int:
        return self.config.gate or self.head_dim

    def summary(self, keys: Tensor, values: Tensor) -> Tensor:
        with in_float32(keys) as wide:
            keys = keys.to(wide)
            if not self.config.gate:
                return keys.mean(2)
            means = pooled(keys, pooling_weights(keys, self.pool.to(wide)))
            return torch.einsum("behd,hdg->behg", means, self.gate_key.to(wide))

    def scores(self, queries: Tensor, summaries: Tensor) -> Tensor:
        with in_float32(queries) as wide:
            queries, summaries = queries.to(wide), self.by_head(summaries.to(wide), 2)
            if self.config.gate:
                queries = torch.einsum("bthd,hdg->bthg", queries, self.gate_query.to(wide))
            return (queries.transpose(1, 2) / math.sqrt(self.features)) @ summaries.permute(0, 2, 3, 1)

    def read(self, call: Call, queries: slice) -> Tensor:
        choice = self.chosen(call, queries)
        if not self.config.gate:
            return self.attended(call, queries, choice)
        bias = F.logsigmoid(choice.scores)
        sink = torch.arange(bias.shape[3], device=bias.device) < choice.sinks
        return self.attended(call, queries, choice, bias.masked_fill(sink, 0))
