"""Sumformer (arXiv 2307.02301): what a token reads of the others is a sum, of what a small network makes of each.

    y_i = psi(x_i, sum_k phi(x_k))                          `SetSumformer`, the paper's: over all elements of a set
    y_t = psi(x_t, S_t / t),  S_t = sum_{k<=t} phi(x_k)     `sumformer`, the mixer: over the tokens so far

phi and psi are networks of one hidden layer. The paper shows that the first form comes as near as wanted to every
continuous function of a set that is equivariant to its order. Each element sees all others, so it is none for language.
The mixer is this project's own and outside of that theorem: a sum of all that came before knows neither order nor what
follows, and its mean keeps a size that does not grow with the text. It never forgets: one token in t is 1 / t of it.

In the scan's words x is phi(x_t) with a one behind it, which counts the tokens in the state, so that a policy that
forgets forgets of both; B and C are 1, and log_decay is 0. Both are float32 in a state of float32, which counts up to
16 million tokens read one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.interface import Shape
from rnn_longctx.models.mixer_reading import Rest
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.span import Span
from rnn_longctx.spec import tuned


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a network of one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class SetSumformer(nn.Module):
    """The layer of the paper, for sets and for classification: it is no mixer of a language model.

    Args:
        d_model: numbers of an element.
        width: numbers of the sum.
        hidden: of phi and of psi.
        causal: refused where it is asked for.
    Raises:
        InputError: a causal form, which this one does not have, or a size below 1.
    """

    def __init__(self, d_model: int, width: int, hidden: int, causal: bool = False):
        super().__init__()
        if causal:
            raise InputError(
                "Sumformer's sum is over all elements and has no causal form: for language take the mixer sumformer, "
                "whose mean is over the tokens so far"
            )
        check_sizes(d_model=d_model, width=width, hidden=hidden)
        self.phi, self.psi = network(d_model, hidden, width), network(d_model + width, hidden, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return as much as x (B, n, d_model). mask: (B, n) bool, False where an element is padding, which enters no
        sum; None: nowhere."""
        each = self.phi(x)
        if mask is not None:
            each = each.masked_fill(~mask[..., None], 0.0)
        total = each.sum(1, keepdim=True).expand(-1, x.shape[1], -1)
        return self.psi(torch.cat([x, total], -1))


def check_sizes(**sizes: int) -> None:
    """Raise InputError where a size is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"sumformer: {name} is at least 1, got {size}")


@dataclass(frozen=True)
class SumformerConfig:
    """The shape of a layer.

    Attributes:
        width: numbers of the sum.
        hidden: of phi and of psi.
    """

    width: int = tuned(256, over=(32, 64, 128, 256, 512))
    hidden: int = tuned(256, over=(32, 64, 128, 256, 512))

    def __post_init__(self) -> None:
        check_sizes(width=self.width, hidden=self.hidden)


@MIXERS.register
class Sumformer(Recurrent):
    """A layer that reads the mean of the tokens so far. Its state has one head, of width + 1 numbers."""

    name, Config = "sumformer", SumformerConfig
    examples = ("sumformer:width=7,hidden=12",)
    stepped = False

    def __init__(self, config: SumformerConfig, model: Shape):
        super().__init__()
        self.config, width = config, model.d_model
        self.phi = network(width, config.hidden, config.width)
        self.psi = network(width + config.width, config.hidden, width)
        with torch.no_grad():
            for p in self.psi[-1].parameters():
                p.div_(math.sqrt(model.n_layer))

    @classmethod
    def of(cls, config: SumformerConfig, model: Shape) -> Sumformer:
        return cls(config, model)

    @property
    def heads(self) -> int:
        return 1

    @property
    def headdim(self) -> int:
        return self.config.width + 1

    @property
    def d_state(self) -> int:
        return 1

    @property
    def no_rates(self) -> str:
        return "never forgets"

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, Gates, Rest]:
        each = self.phi(u)
        wide = torch.promote_types(each.dtype, torch.float32)  # bfloat16 counts to 256
        x = F.pad(each.to(wide), (0, 1), value=1.0)[:, :, None]  # (B, T, 1, width + 1)
        one = x.new_ones(x.shape[:3])  # (B, T, 1)
        return ScanInputs(x, one[..., None], one[..., None]), Gates(torch.zeros_like(one), one), Rest(token=u)

    def output_gate(self, rest: Rest) -> None:
        """No scan applies a division."""

    def output(self, y: Tensor, rest: Rest) -> Tensor:
        assert rest.token is not None
        total, count = y[:, :, 0].split([self.config.width, 1], -1)
        # below 1 only at padding, which has read nothing, and where a policy lets a state forget
        mean = total / count.clamp(min=torch.finfo(y.dtype).tiny)
        return self.psi(torch.cat([rest.token, mean.to(rest.token.dtype)], -1))
