"""Prompts of the tasks as tests want them: with a wording or a haystack of one's own, and to train on."""

from __future__ import annotations

import numpy as np

from rnn_longctx.data import Text, Tokenizer
from rnn_longctx.tasks.base import depth_of
from rnn_longctx.tasks.multikey import MultiKey, labelled
from rnn_longctx.tasks.passkey import Passkey
from rnn_longctx.tasks.prompts import Prompt, Style, fill, haystack_slice
from rnn_longctx.tasks.words import Words


def training_sequence(
    tokenizer: Tokenizer, length: int, rng: np.random.Generator, style: str = "headerless", said_again: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return a passkey prompt at a random depth and its answer, ``" 12345."``: (ids (length,) int64, mask (length,)
    bool, True on the answer, and with `said_again` where the key's own sentence repeats it, too)."""
    example = Passkey(style=style, learn="both" if said_again else "reply").training(length, rng, tokenizer)
    return example.ids, example.answers


def multikey_batch(
    tokenizer: Tokenizer,
    length: int,
    n: int,
    seed: int,
    keys: int = 4,
    style: Style | None = None,
    haystack: Text | None = None,
) -> list[Prompt]:
    """Return `passkey_batch` with `keys` labelled keys. Raises InputError when `length` is too small for them."""
    task, prompts = MultiKey(keys=keys), []
    for i in range(n):
        hidden = task.hidden(task.generator(seed, length, i), depth_of(i, n))
        wording = labelled(style or task.wording(length))
        prompts.append(fill(tokenizer, length, wording, hidden, haystack_slice(haystack, i)))
    return prompts


def words_batch(
    tokenizer: Tokenizer, length: int, n: int, seed: int, style: Style | None = None, haystack: Text | None = None
) -> list[Prompt]:
    """Return `passkey_batch` with a word of `WORDS` for the key."""
    task, prompts = Words(), []
    for i in range(n):
        hidden = task.hidden(task.generator(seed, length, i), depth_of(i, n))
        prompts.append(fill(tokenizer, length, style or task.wording(length), hidden, haystack_slice(haystack, i)))
    return prompts
