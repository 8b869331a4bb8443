"""The most pairs of key and value that a state can hold, by counting bits; no model is shown to come near it.

    s numbers of b bits hold at most s * b bits
    K keys, each with one of V values, need K * log2(V) bits    =>    K <= s * b / log2(V)

Assumed: values are drawn independently and evenly, every key may be asked for afterwards, all answers are right, and
nothing but the state is carried on (counters of positions aside). arXiv 2605.05066 bounds models of one step and one
state by O(poly(d) / log V) pairs; its constant is not known, so that only the bits are counted here.
"""

from __future__ import annotations

import math

import torch

from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.tasks.mqar import KINDS

COLUMN = "most_pairs"  # of models.csv and of every table that follows from it
LABEL = "upper bound: bits of the state over bits of a pair"
WORDS = (
    f"{COLUMN}: {LABEL}, state * b / log2(V), with b = 32 bits a number (64 in float64) and V values, the vocabulary "
    "(of associative recall its half). What the bits have room for, not what a model reaches; without a remedy"
)


def most_pairs(state_elements: int, values: int, bits: int = 32) -> int | None:
    """Return the most pairs whose `values` are told apart that so many numbers of `bits` hold; None of one value alone,
    which takes no bits."""
    return None if values < 2 else math.floor(state_elements * bits / math.log2(values))


def of_model(model: LanguageModel, task: str = "text") -> int | None:
    """Return the bound of a model; None where its state grows with every token, as a hybrid's does.

    task: text, whose values are the vocabulary, or a kind of associative recall, whose values are half of it.
    """
    size = model.state_size()
    if size.per_token:
        return None
    full = size.total(max(size.windows, default=0))
    values = model.vocab_size // 2 if task in KINDS else model.vocab_size
    return most_pairs(full, values, 64 if model.dtype == torch.float64 else 32)
