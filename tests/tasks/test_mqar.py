from __future__ import annotations

import numpy as np
import pytest

from rnn_longctx.errors import InputError
from rnn_longctx.tasks.mqar import mqar_batch


@pytest.mark.parametrize("forgetting", [False, True])
def test_answers_are_the_last_values_bound(forgetting: bool) -> None:
    rng = np.random.default_rng()
    firsts = 0
    for _ in range(20):
        vocab, rows = 2 * int(rng.integers(5, 40)), int(rng.integers(1, 9))
        pairs = int(rng.integers(1, vocab // 2 + 1))
        ids, answers = mqar_batch(rng, rows, pairs, vocab, forgetting)
        rebound = pairs // 2 if forgetting else 0
        assert ids.shape == answers.shape == (rows, 2 * (2 * pairs + rebound)) and ids.dtype == np.int64
        for row, told in zip(ids.tolist(), answers.tolist()):
            memory: dict[int, int] = {}
            keys, values = row[::2], row[1::2]
            assert max(keys) < vocab // 2 <= min(values)
            bound = pairs + rebound
            for key, value in zip(keys[:bound], values[:bound]):
                firsts += key in memory and memory[key] != value
                memory[key] = value
            assert len(memory) == pairs == len(set(keys[bound:])), "every key is asked for once"
            assert [memory[k] for k in keys[bound:]] == values[bound:]
            assert [i for i, t in enumerate(told) if t] == list(range(2 * bound + 1, len(row), 2))
    assert (firsts > 0) == forgetting


def test_mistakes() -> None:
    rng = np.random.default_rng()
    for pairs in (0, 9):
        with pytest.raises(InputError, match="1 to 8 keys"):
            mqar_batch(rng, 2, pairs, 16)
