"""Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of a key and a value, then every key is asked for.

The keys are asked one after another in random order, so that a sequence is as short as its pairs allow. In
forgetting-MQAR half of the keys are bound twice, and the last value counts: the first has to be forgotten.
"""

from __future__ import annotations

import numpy as np

from rnn_longctx.errors import InputError


def mqar_batch(rng: np.random.Generator, rows: int, pairs: int, vocab_size: int,
               forgetting: bool = False) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`rows` sequences with `pairs` keys, ids below vocab_size // 2, and values, the ids from there on.

    Returns:
        ids (rows, T) int64: key value key value ... (pairs + rebound bindings), then key value ... (the answers), with
        rebound = pairs // 2 where forgetting, else 0, and T = 2 * (2 * pairs + rebound);
        answers (rows, T) bool, True at the values that are to be told.
    Raises:
        InputError: more pairs than keys, or none.
    """
    half = vocab_size // 2
    if not 1 <= pairs <= half:
        raise InputError(f"{pairs} pairs: a vocabulary of {vocab_size} has 1 to {half} keys")
    bindings = pairs + (pairs // 2 if forgetting else 0)
    keys = rng.permuted(np.broadcast_to(np.arange(half), (rows, half)), axis=1)[:, :pairs]
    bound = rng.permuted(np.concatenate([keys, keys[:, : bindings - pairs]], axis=1), axis=1)
    values = rng.integers(half, vocab_size, (rows, bindings))
    now, row = np.zeros((rows, half), dtype=np.int64), np.arange(rows)
    for j in range(bindings):
        now[row, bound[:, j]] = values[:, j]
    asked = rng.permuted(keys, axis=1)
    told = np.take_along_axis(now, asked, axis=1)
    all_keys, all_values = np.concatenate([bound, asked], axis=1), np.concatenate([values, told], axis=1)
    ids = np.stack([all_keys, all_values], axis=2).reshape(rows, -1)
    answers = np.zeros(ids.shape, dtype=bool)
    answers[:, 2 * bindings + 1 :: 2] = True
    return ids, answers
