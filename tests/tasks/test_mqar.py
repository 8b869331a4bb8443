from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.mqar import MQAR, ForgettingMQAR, mqar_batch


@pytest.mark.parametrize("forgetting", [False, True])
def test_answers_are_the_last_values_bound(forgetting: bool) -> None:
    rng = np.random.default_rng()
    firsts = 0
    for _ in range(20):
        vocab, rows = 2 * int(rng.integers(1, 40)), int(rng.integers(1, 9))
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
                if key in memory:
                    assert memory[key] != value, "what is bound again is another value"
                    firsts += 1
                memory[key] = value
            assert len(memory) == pairs == len(set(keys[bound:])), "every key is asked for once"
            assert [memory[k] for k in keys[bound:]] == values[bound:]
            assert [i for i, t in enumerate(told) if t] == list(range(2 * bound + 1, len(row), 2))
    assert (firsts > 0) == forgetting


@pytest.mark.parametrize("forgetting", [False, True])
def test_an_earlier_value_is_a_wrong_answer(forgetting: bool, seed: int) -> None:
    """Of a model that answers by the first value of a key, half of the answers are wrong where keys are bound again."""
    task = ForgettingMQAR(pairs=8, vocab_size=64) if forgetting else MQAR(pairs=8, vocab_size=64)
    for asked in ("end", "spread"):
        task, rng = replace(task, asked=asked), np.random.default_rng(seed)
        for length in (40, 41, 100):
            example = task.example(length, 0, 1, rng, ByteTokenizer())
            first = {}
            for key, value in zip(example.ids[:-1].tolist(), example.ids[1:].tolist()):
                if key < 32:
                    first.setdefault(key, value)
            keys = example.ids[np.flatnonzero(example.answers) - 1]
            reply = np.array([first[key] for key in keys.tolist()])
            assert len(first) == 8 and task.right(reply, example, ByteTokenizer()) == (0.5 if forgetting else 1.0)


def test_spread_questions_stand_at_distances_of_the_power_law(seed: int) -> None:
    """As zoology's: weights of g ** -0.99 over the distances g = 1, 2, ... in pairs, without two at one place."""
    task, rng, length = MQAR(pairs=1, vocab_size=64, asked="spread"), np.random.default_rng(seed), 66
    distances = np.zeros(32)
    for _ in range(2000):
        example = task.example(length, 0, 1, rng, ByteTokenizer())
        ((answer,),) = example.answers.nonzero()
        assert answer % 2 and example.ids[answer - 1] == example.ids[0] and example.ids[answer] == example.ids[1]
        assert (np.delete(example.ids, [0, answer - 1]) >= 32).all(), "no other key"
        distances[(answer - 3) // 2] += 1
    expected = np.arange(1, 33) ** -0.99 / (np.arange(1, 33) ** -0.99).sum()
    for g in (1, 4, 16):  # the share of distances up to g, six standard errors at most from what it should be
        share = expected[:g].sum()
        assert abs(distances[:g].sum() / 2000 - share) < 6 * (share * (1 - share) / 2000) ** 0.5


def test_mistakes() -> None:
    rng = np.random.default_rng()
    for pairs in (0, 9):
        with pytest.raises(InputError, match="1 to 8 keys"):
            mqar_batch(rng, 2, pairs, 16)


def test_results_of_other_ids_are_filed_apart():
    tasks = [MQAR(4), MQAR(4, 64), ForgettingMQAR(4)]
    assert [task.text for task in tasks] == ["mqar", "mqar of 64 ids", "forgetting-mqar"]
    assert len({(task.label, task.text) for task in tasks}) == 3
