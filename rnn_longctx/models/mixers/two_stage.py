"""Two-stage sparse attention: a coarse stage reads summaries of completed blocks, and its scores say in which few of
them a fine stage reads the tokens.

After Native Sparse Attention (NSA, arXiv 2502.11089); MoBA (2502.13189) chooses by blocks' mean keys, and DSA by an
indexer of its own. A block is summarised by weights over its tokens, which begin as a mean:

    a = softmax(k_i p / sqrt(D)) over block n      K_n = sum of a_i k_i,  V_n = sum of a_i v_i           p (D) a head
    coarse   y_c = softmax over completed blocks n (q K_n / sqrt(D)) V_n
    fine     y_f = softmax over the window and the `top` blocks with the largest q K_n (q k_i / sqrt(D)) v_i
    y = sigmoid(m_c u) y_c + sigmoid(m_f u) y_f                                                m_c, m_f (d_model) a head

What is chosen has no gradient; the coarse stage learns its scores by what it reads with them, of all blocks and not of
the chosen alone. It compares queries and keys before they are turned by their positions, the fine stage after that.
(NSA has further keys and values for each stage, an MLP in the place of a, and a window with a softmax of its own.)

What is read: `rnn_longctx.models.sparse`. What was chosen: `TwoStage.kept`. What a layer keeps is what full attention
keeps, and 2 d_model numbers a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

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
from rnn_longctx.spec import quiet, tuned


@dataclass(frozen=True)
class TwoStageConfig:
    """The shape of a layer.

    Attributes:
        block: b, tokens of a block.
        window: tokens of the blocks that the fine stage reads whatever they hold, a multiple of b: a token's own and
            those before.
        top: how many other blocks it reads; all, where there are fewer.
        positions: "rope", or "none": then a token knows the order of what it reads by the causal mask alone.
        coarse: False leaves out what the coarse stage reads (an ablation): blocks are chosen by their mean keys, and
            y = sigmoid(m_f u) y_f.
    """

    heads: int = 4
    block: int = tuned(16, over=(4, 8, 16, 32, 64, 128))
    window: int = tuned(64, over=(8, 16, 32, 64, 128, 256))
    top: int = tuned(8, over=(1, 2, 4, 8, 16))
    positions: Literal["rope", "none"] = "rope"
    coarse: bool = quiet(True)

    def __post_init__(self) -> None:
        check_blocks("two-stage", self)

    def unfit(self, length: int) -> str | None:
        """Return why so many tokens are too few for the settings, or None."""
        return too_few_blocks("two-stage", self, length)


@MIXERS.register
class TwoStage(SparseAttention):
    """A layer of two-stage attention."""

    name = "two-stage"
    Config: ClassVar[Any] = TwoStageConfig
    examples = (  # (blocks are chosen within a test's stream)
        "two-stage:heads=2,block=6,window=6,top=3",
        "two-stage:heads=2,block=7,window=14,top=2,positions=none",
        "two-stage:heads=2,block=6,window=6,top=3,coarse=false",
    )

    def __init__(self, config: TwoStageConfig, model: Shape):
        super().__init__(config, model)
        if config.coarse:
            self.pool = nn.Parameter(torch.zeros(self.kv_heads, self.head_dim))
        self.mix = nn.Linear(model.d_model, (2 if config.coarse else 1) * config.heads, bias=False)  # m_c, m_f

    @property
    def features(self) -> int:
        return (2 if self.config.coarse else 1) * self.head_dim

    def summary(self, keys: Tensor, values: Tensor) -> Tensor:
        with in_float32(keys) as wide:
            keys, values = keys.to(wide), values.to(wide)
            if not self.config.coarse:
                return keys.mean(2)
            weights = pooling_weights(keys, self.pool.to(wide))
            return torch.cat([pooled(keys, weights), pooled(values, weights)], 3)

    def scores(self, queries: Tensor, summaries: Tensor) -> Tensor:
        with in_float32(queries) as wide:
            keys = self.by_head(summaries[..., : queries.shape[3]].to(wide), 2).permute(0, 2, 3, 1)  # (B, H, D, m)
            return (queries.to(wide).transpose(1, 2) / math.sqrt(queries.shape[3])) @ keys

    def read(self, call: Call, queries: slice) -> Tensor:
        best, coarse = [], []
        for some in call.parts(queries):
            scores = self.call_scores(call, some)
            if self.config.coarse:
                coarse.append(self.coarse(call, some, scores))
            best.append(self.best(call, some, scores))
        fine = self.attended(call, queries, self.choice(call, queries, best))
        mix = self.mix(call.u[:, queries]).sigmoid().unflatten(2, (-1, self.config.heads, 1))  # (B, t, 2 or 1, H, 1)
        if not self.config.coarse:
            return mix[:, :, 0] * fine
        return mix[:, :, 0] * torch.cat(coarse, 1) + mix[:, :, 1] * fine

    def coarse(self, call: Call, queries: slice, scores: Tensor) -> Tensor:
        """Return (B, t, H, D), what queries read of the summaries of all completed blocks; 0 where there is none.
        scores: `call_scores` of them, which are changed where a block is not completed."""
        # (not -inf: where no block is completed the softmax would be NaN)
        scores, seen = call.places.readable(scores, queries, 1, 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(3)
        if seen is not None:
            weights = weights * seen[:, None]
        values = self.by_head(call.summaries[:, : scores.shape[3], :, self.head_dim :], 2).transpose(
            1, 2
        )  # (B, H, m, D)
        return (weights.to(values.dtype) @ values).transpose(1, 2)
