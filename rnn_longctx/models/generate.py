"""Generation: read the prompt as a stream, then one token after another from the carry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt import reader_of
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.decode import Decoder
from rnn_longctx.models.mamba2 import Mamba2LM, rows_of
from rnn_longctx.ssd import fused

SEGMENT = 4096
COLDEST = 1e-30  # a temperature below would take logits past float32's range, and is greedy long before
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
            cache.position = torch.full((len(ids),), start, dtype=torch.int64, device="cpu")
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
            probabilities = (logits / max(temperature, COLDEST)).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        yield token
        logits = step(token) if step else model.logits(model(token[:, None], cache)[:, -1])


def prompt_ids(model: Any, prompt: Any) -> Tensor:
    """A prompt as ids (B, T), int64, T >= 1: text, which the model's tokenizer encodes, or whole numbers in the model's
    vocabulary, (B, T) or, as one row, (T). Raises InputError for anything else."""
    if isinstance(prompt, str | bytes):
        if model.tokenizer is None:
            raise InputError(f"the prompt is text, and {model.name} has no tokenizer: give ids (B, T), or a tokenizer")
        prompt = model.tokenizer.encode(prompt)
    wanted = "a prompt is text, or token ids (B, T) or (T) as a tensor, array or list of whole numbers"
    ids = rows_of(prompt, wanted)
    if 0 in ids.shape:
        raise InputError(f"{wanted}, at least one of them; got shape {tuple(ids.shape)}")
    size = getattr(getattr(model, "embedding", None), "num_embeddings", model.config.vocab_size)
    low, high = ids.aminmax()
    if low < 0 or high >= size:
        raise InputError(f"token ids of {model.name} lie in 0 to {size - 1}; got {int(low)} to {int(high)}")
    return ids


def generate(model: Any, prompt: Tensor | Sequence | str, max_new_tokens: int = 64, *, temperature: float = 0.0,
             seed: int | None = None, cache: Cache | None = None) -> Tensor:  # fmt: skip
    """Continue a prompt; returns the new tokens alone, (B, max_new_tokens).

    Args:
        model: this library's, or one of another library, which is adopted.
        prompt: ids (B, T), T >= 1, or (T), one row; or text, for a model with a tokenizer.
        temperature: 0 is greedy.
        cache: what was read before the prompt.
    Raises:
        InputError: no model, no prompt that it reads, what is no number, or below 0.
    """
    model = reader_of(model)
    ids = prompt_ids(model, prompt)
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise InputError(f"max_new_tokens: expected a whole number >= 0, got {max_new_tokens!r:.60}")
    if not isinstance(temperature, Real) or not temperature >= 0:
        raise InputError(f"temperature: expected a number >= 0, got {temperature!r:.60}")
    if not isinstance(seed, Integral | None):
        raise InputError(f"seed: expected a whole number, got {seed!r:.60}")
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    logits, cache = prefill(model, ids, cache)
    tokens = continuation(model, logits, cache, temperature, generator)
    new = [next(tokens) for _ in range(max_new_tokens)]
    return torch.stack(new, 1) if new else ids[:, :0]
