"""Answers of a model to prompts: what it says after each, and whether that is what was asked for."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.models.generate import continuation, prefill
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.segments import SEGMENT
from rnn_longctx.models.stops import unused_rows


@dataclass(frozen=True)
class Answers:
    """What a model said, greedily, after prompts of one length that were read side by side.

    Attributes:
        ids: (B, n) int64 on the CPU.
        first_token_seconds: from the start of the prompts to the first token of the answers.
        next_token_seconds: for each token after it, the mean.
    """

    ids: Tensor
    first_token_seconds: float
    next_token_seconds: float

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """Return the answers as text, without spaces around them."""
        return [tokenizer.decode(row).strip() for row in self.ids.tolist()]


@torch.inference_mode()
def say_answers(model: LanguageModel, prompts: Tensor, new_tokens: int, segment: int = SEGMENT) -> Answers:
    """Read prompts (B, T) and say `new_tokens` tokens after each, the likeliest every time; no token ends an answer.

    segment: tokens of all rows together that are read at once, at least one a row.
    """
    began = time.perf_counter()
    logits, cache = prefill(model, prompts, segment=max(1, segment // len(prompts)))
    logits.argmax(-1).cpu()  # waits for a GPU
    at_first = time.perf_counter()
    tokens = continuation(model, logits, cache)
    ids = torch.stack([next(tokens) for _ in range(new_tokens)], 1).cpu()
    seconds_each = (time.perf_counter() - at_first) / max(1, new_tokens - 1)
    return Answers(ids, at_first - began, seconds_each)


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
