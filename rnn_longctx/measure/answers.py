"""Whether a model answers a prompt as it should: would it say the reply, and does a text begin with the answer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.segments import SEGMENT
from rnn_longctx.models.stops import unused_rows


@torch.inference_mode()
@in_evaluation
def would_say(
    model: LanguageModel,
    prompts: Tensor,
    replies: Sequence[np.ndarray],
    tokenizer: Tokenizer | None = None,
    segment: int = SEGMENT,
) -> Tensor:
    """Return whether a model would say each reply, greedily, after its prompt, from one pass over both.

    Greedy decoding gives a reply exactly if each of its tokens is the likeliest one after the true ones before it.

    Args:
        prompts: (B, T) int64.
        replies: the ids of each row's reply, (n,) int64; they may differ in length.
        tokenizer: rows of the vocabulary that stand for none of its tokens are never said.
        segment: tokens of each row that are read at once.
    Returns: (B,) bool on the model's device.
    """
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(r) for r in replies], batch_first=True, padding_value=-1)
    ids = torch.cat([prompts, padded.clamp(min=0).to(prompts.device)], 1).to(model.device)
    padded, last = padded.to(model.device), prompts.shape[1] - 1
    cache = model.new_cache()
    for piece in ids[:, :last].split(segment, 1):
        model(piece, cache)
    logits = model.logits(model(ids[:, last:-1], cache))
    unused = unused_rows(tokenizer, logits.shape[-1], logits.device)
    likeliest = (logits if unused is None else logits.masked_fill(unused, -math.inf)).argmax(-1)
    return ((likeliest == padded) | (padded < 0)).all(1)


def begins_with(text: str, answer: str, alphabet: str = r"\d") -> bool:
    """Return whether a text, spaces before it aside, begins with the answer and no further character of its alphabet.

    alphabet: a regular expression of one character: digits, of which a sixth after five right ones is wrong.
    """
    match = re.match(f"{alphabet}*", text.strip())
    return match is not None and match[0] == answer
