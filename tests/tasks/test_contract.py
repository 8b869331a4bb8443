"""Every task is held to the contract, with tokenizers of several kinds; each check can fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from echo_task import Echo
from made_tokenizers import NAMES, made_tokenizer

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.spec import parse
from rnn_longctx.tasks import TASKS, Example, Task, TooShort
from rnn_longctx.tasks.mqar import MQAR
from rnn_longctx.tasks.passkey import Passkey
from rnn_longctx.testing.tasks import CHECKS, check_exact_length, check_task


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("text", [text for name, task in TASKS.items() for text in task.examples or (name,)])
def test_every_task(text: str, kind: str, seed: int) -> None:
    check_task(parse(text, TASKS, "task"), made_tokenizer(kind), seed)


@dataclass(frozen=True)
class Copy(Task):
    """A generated task that says nothing of training; its answer has a token for every `each` of its prompt."""

    name = "copy"
    generated = True
    each: int = 100

    def example(self, length, i, n, rng, tokenizer):
        if length < 3:
            raise TooShort("a copy", 3, length)
        prompt = rng.integers(0, 256, length)
        ids = np.concatenate([prompt, prompt[: 1 + length // self.each]])
        return Example(ids, np.arange(len(ids)) >= length)


@pytest.mark.parametrize("each", [100, 7])
def test_a_generated_task_is_trained_on_as_it_is(each: int, seed: int) -> None:
    task, tokenizer = Copy(each), ByteTokenizer()
    check_exact_length(task, tokenizer, seed)
    example = task.training(57, np.random.default_rng(seed), tokenizer)
    assert len(example.ids) == 57 and example.answers.sum() == 1 + len(example.prompt) // each
    for short in (1, 3):
        with pytest.raises(TooShort, match="takes at least"):
            task.training(short, np.random.default_rng(seed), tokenizer)


def test_lengths_that_no_training_example_has_are_refused(seed: int) -> None:
    class Even(Copy):
        def example(self, length, i, n, rng, tokenizer):
            example = super().example(length, i, n, rng, tokenizer)
            ids = np.concatenate([example.ids[:length], rng.integers(0, 256, 2 + length % 2)])
            return Example(ids, np.arange(len(ids)) >= length)

    with pytest.raises(InputError, match="copy: no example of 57 tokens"):
        Even().training(57, np.random.default_rng(seed), ByteTokenizer())
    with pytest.raises(AssertionError, match="makes no example of 83 tokens to train on"):
        check_exact_length(Even(), ByteTokenizer(), seed)


def test_the_checks_can_fail(seed: int) -> None:
    """Each check refuses a task that is wrong in its way."""

    class Wrong(Echo):
        def example(self, length, i, n, rng, tokenizer):
            example = super().example(max(length + 1, 9), i, n, np.random.default_rng(), tokenizer)
            return replace(example, sources=((len(example.ids) - 1,),) * int(example.answers.sum()))

        def right(self, reply, example, tokenizer):
            return 0.5

        def shortest(self, tokenizer):
            return 100

        @property
        def chance(self):
            return 1.0

    class Elsewhere(Passkey):
        def example(self, length, i, n, rng, tokenizer):
            example = super().example(length, i, n, rng, tokenizer)
            return Example(example.ids, example.answers, example.depth, answer="nowhere")

    for check in CHECKS:
        with pytest.raises(AssertionError, match=r"^(echo|passkey)"):
            check(Elsewhere() if "in_the_context" in check.__name__ else Wrong(), ByteTokenizer(), seed)


@pytest.mark.parametrize(
    "text",
    [
        *("passkey", "multikey", "words", "mqar", "mqar:asked=spread", "forgetting-mqar", "noisy-recall", "induction"),
        *("planted", "selective-copying"),
    ],
)
def test_sources_say_the_answers(text: str, seed: int) -> None:
    """A space before a key has no source; all else stands there as it is answered, of a passkey twice."""
    task = parse(text, TASKS, "task")
    for name in NAMES if task.vocab_size is None else NAMES[:1]:
        tokenizer = made_tokenizer(name)
        for length in (task.shortest(tokenizer) + 40, 1300):
            example = task.example(length, 3, 10, task.generator(seed, length, 3), tokenizer)
            places = np.flatnonzero(example.answers)
            found = [(place, tokens) for place, tokens in zip(places, example.sources, strict=True) if tokens]
            assert all((example.ids[list(tokens)] == example.ids[place]).all() for place, tokens in found)
            assert {len(tokens) for _, tokens in found} == {2 if task.generated else 1}
            assert len(found) >= len(places) - task.generated


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
