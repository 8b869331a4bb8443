"""Every task is held to the contract, with tokenizers of several kinds; each check can fail."""

from __future__ import annotations

import numpy as np
import pytest
from echo_task import Echo
from made_tokenizers import NAMES, made_tokenizer

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.tasks import TASKS, Example
from rnn_longctx.tasks.mqar import MQAR
from rnn_longctx.tasks.passkey import Passkey
from rnn_longctx.testing.tasks import CHECKS, check_task


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", TASKS)
def test_every_task(name: str, kind: str, seed: int) -> None:
    check_task(TASKS[name](), made_tokenizer(kind), seed)


def test_the_checks_can_fail(seed: int) -> None:
    """Each check refuses a task that is wrong in its way."""

    class Wrong(Echo):
        def example(self, length, i, n, rng, tokenizer):
            return super().example(max(length + 1, 9), i, n, np.random.default_rng(), tokenizer)

        def right(self, reply, example, tokenizer):
            return 0.5

        def shortest(self, tokenizer):
            return 100

    class Elsewhere(Passkey):
        def example(self, length, i, n, rng, tokenizer):
            example = super().example(length, i, n, rng, tokenizer)
            return Example(example.ids, example.answers, example.depth, answer="nowhere")

    for check in CHECKS:
        with pytest.raises(AssertionError, match=r"^(echo|passkey)"):
            check(Elsewhere() if "in_the_context" in check.__name__ else Wrong(), ByteTokenizer(), seed)


def test_longer_recall_has_the_same_pairs(seed):
    task, tokenizer = MQAR(pairs=5), made_tokenizer(NAMES[0])
    length = task.shortest(tokenizer)
    assert length == 20
    short, long = (task.example(n, 0, 1, np.random.default_rng(seed), tokenizer) for n in (length, 77))
    assert (long.ids[:10] == short.ids[:10]).all() and (long.ids[-10:] == short.ids[-10:]).all()
    assert long.answers[-10:].tolist() == short.answers[-10:].tolist() and not long.answers[:-10].any()
    half = short.ids[short.answers].copy()
    half[0] = 0
    assert task.right(half, short, tokenizer) == pytest.approx(0.8)
