"""Generation: read the prompt as a stream, then one token after another from the carry."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.decode import Decoder
from rnn_longctx.models.mamba2 import Mamba2LM
from rnn_longctx.ssd import fused

SEGMENT = 4096
# Tokens read at once, of all rows together, where a text is only measured. On a CPU a call's activations should stay
# near its caches.
SEGMENTS = {"cpu": 4096, "cuda": 65536}


@torch.no_grad()
def prefill(model: Mamba2LM, ids: Tensor, cache: Cache | None = None, segment: int = SEGMENT) -> tuple[Tensor, Cache]:
    """Read ids (B, T) and return the logits (B, vocab) after the last token, and the cache.

    Under a control only the tokens that its state depends on are read.
    """
    if model.reader is not None:
        if cache is not None:
            raise InputError("a remedy that reads a whole prompt cannot go on from what was read before")
        return model.reader(model, ids, segment)
    if cache is None:
        cache = model.new_cache()
        if model.restart is not None and (start := model.restart.block_start(ids.shape[1])):
            cache.position = torch.full((len(ids),), start, dtype=torch.int64)
            cache.tail = ids[:, max(0, start - model.restart.overlap) : start].to(model.device)
            ids = ids[:, start:]
    *_, last = (hidden[:, -1] for hidden in model.stream(ids, cache, segment))
    return model.logits(last), cache


@torch.no_grad()
def continuation(model: Mamba2LM, logits: Tensor, cache: Cache, temperature: float = 0.0,
                 generator: torch.Generator | None = None) -> Iterator[Tensor]:  # fmt: skip
    """Token after token, (B,) each, after `prefill`; greedy where temperature is 0. Endless. The cache is moved on, but
    where a `Decoder` steps on a GPU."""
    step = None if Decoder.refuses(model, cache) or fused.interpreted() else Decoder(model, cache)
    while True:
        if temperature > 0:
            probabilities = (logits / temperature).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        yield token
        logits = step(token) if step else model.logits(model(token[:, None], cache)[:, -1])


def generate(model: Mamba2LM, ids: Tensor, max_new_tokens: int = 64, *, temperature: float = 0.0,
             seed: int | None = None, cache: Cache | None = None) -> Tensor:  # fmt: skip
    """Continue ids (B, T), T >= 1, by `max_new_tokens` tokens; returns those, (B, max_new_tokens)."""
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    logits, cache = prefill(model, ids, cache)
    tokens = continuation(model, logits, cache, temperature, generator)
    new = [next(tokens) for _ in range(max_new_tokens)]
    return torch.stack(new, 1) if new else ids[:, :0]
