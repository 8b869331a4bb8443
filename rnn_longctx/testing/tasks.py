"""What every task is held to, with any tokenizer.

    from rnn_longctx.testing.tasks import check_task
    check_task(Copying(symbols=16), rnn_longctx.data.ByteTokenizer())

A check raises AssertionError with a line that says what does not hold. Nothing here needs pytest.
"""

from __future__ import annotations

import numpy as np

from rnn_longctx.data import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.base import Example, Task, TooShort

ROOM = 40  # tokens: answers of other examples may take so many more than that of the first


def check_task(task: Task, tokenizer: Tokenizer, seed: int = 0) -> None:
    """Hold a task to all of `CHECKS`."""
    for check in CHECKS:
        check(task, tokenizer, seed)


def check_same_example_for_the_same_seed(task: Task, tokenizer: Tokenizer, seed: int = 0) -> None:
    length = _length(task, tokenizer)
    for i in range(4):
        one, again = (_example(task, tokenizer, length, i, seed) for _ in range(2))
        same = (one.ids == again.ids).all() and (one.answers == again.answers).all() and one.depth == again.depth
        assert same, f"{task}: example {i} of one seed comes out in two ways: draw from rng alone"
    training = [_training(task, tokenizer, length + ROOM, seed) for _ in range(2)]
    assert (training[0].ids == training[1].ids).all(), f"{task}: training draws from more than rng"
    drawn = {_example(task, tokenizer, length, 0, s).ids.tobytes() for s in range(seed, seed + 20)}
    assert len(drawn) > 1, f"{task}: twenty seeds give the same example"


def check_exact_length(task: Task, tokenizer: Tokenizer, seed: int = 0) -> None:
    least = _length(task, tokenizer)
    for length in (least, least + 1, least + 137):
        for i in range(4):
            example = _example(task, tokenizer, length, i, seed)
            _check_arrays(task, example)
            tokens = len(example.prompt) if task.generated else len(example.ids)
            assert tokens == length, f"{task}: {tokens} tokens where {length} were asked for"
            if task.generated:
                assert example.answers[len(example.prompt) :].all(), f"{task}: its answers do not end the example"
            assert example.depth is None or 0 <= example.depth <= 1, f"{task}: a depth of {example.depth}"
        example = _training(task, tokenizer, length + ROOM, seed)
        _check_arrays(task, example)
        assert len(example.ids) == length + ROOM, f"{task}: {len(example.ids)} tokens to train on, not {length + ROOM}"
        assert not task.generated or example.answers[-1], f"{task}: its answers do not end an example to train on"


def check_the_answer_scores(task: Task, tokenizer: Tokenizer, seed: int = 0) -> None:
    """Its own answer scores 1; another one scores less, and all wrong 0."""
    length = _length(task, tokenizer)
    examples = [_example(task, tokenizer, length, i, seed) for i in range(10)]
    replies = [example.ids[example.answers] for example in examples]
    for i, (example, reply) in enumerate(zip(examples, replies)):
        assert task.right(reply, example, tokenizer) == 1, f"{task}: the answer of example {i} does not score 1"
        for other in replies:
            if len(other) == len(reply) and not (other == reply).any():
                assert task.right(other, example, tokenizer) == 0, f"{task}: another answer than {i}'s scores"
            if len(other) == len(reply) and not (other == reply).all():
                score = task.right(other, example, tokenizer)
                assert 0 <= score < 1, f"{task}: a wrong answer scores {score} in example {i}"
    assert len({reply.tobytes() for reply in replies}) > 1, f"{task}: ten examples have one answer"


def check_the_answer_is_in_the_context(task: Task, tokenizer: Tokenizer, seed: int = 0) -> None:
    """An answer in words stands in its prompt; where depths are given, deeper ones stand later."""
    length = _length(task, tokenizer) + 137
    places: list[tuple[float, float]] = []
    for i in range(10):
        example = _example(task, tokenizer, length, i, seed)
        if example.answer is None:
            continue
        text = "".join(tokenizer.decode(example.prompt.tolist()).split())
        assert example.answer in text, f"{task}: the answer {example.answer} does not stand in its prompt"
        if example.depth is not None:
            places.append((example.depth, text.index(example.answer) / len(text)))
    if len({depth for depth, _ in places}) > 1:
        first, last = min(places), max(places)
        assert first[1] < last[1], f"{task}: at depth {last[0]} the answer stands before that at {first[0]}"


def check_sources_stand_before_their_answers(task: Task, tokenizer: Tokenizer, seed: int = 0) -> None:
    """Where a task names sources, it does so for each answer in turn, and they stand before it; for one at least."""
    for i in range(4):
        example = _example(task, tokenizer, _length(task, tokenizer), i, seed)
        places = np.flatnonzero(example.answers)
        if not example.sources:
            continue
        assert len(example.sources) == len(places), f"{task}: {len(example.sources)} sources of {len(places)} answers"
        for place, tokens in zip(places, example.sources):
            assert all(0 <= t < place for t in tokens), f"{task}: the answer at {place} has sources at {tokens}"
        assert any(example.sources), f"{task}: no answer has a source: leave `sources` out"


def check_too_short_is_refused(task: Task, tokenizer: Tokenizer, seed: int = 0) -> None:
    least = task.shortest(tokenizer)
    assert least >= 1, f"{task}: its shortest example has {least} tokens"
    if least == 1:
        return
    try:
        _example(task, tokenizer, 1, 0, seed)
    except TooShort as error:
        assert "\n" not in str(error) and error.least > 1, f"{task}: {error}"
    except InputError as error:
        raise AssertionError(f"{task}: refuses a length as {error!r}, and not as TooShort") from None
    else:
        raise AssertionError(f"{task}: makes an example of 1 token, and calls {least} the fewest")


def check_chance(task: Task, tokenizer: Tokenizer, seed: int = 0) -> None:
    """What a guess scores is said as a number that is no score of somebody who knows, where it is said at all."""
    assert task.chance is None or 0 < task.chance < 1, f"{task}: a guess cannot score {task.chance}"


CHECKS = (
    check_same_example_for_the_same_seed,
    check_exact_length,
    check_the_answer_scores,
    check_the_answer_is_in_the_context,
    check_sources_stand_before_their_answers,
    check_too_short_is_refused,
    check_chance,
)


def _length(task: Task, tokenizer: Tokenizer) -> int:
    """Return a length that every example fits into."""
    return task.shortest(tokenizer) + ROOM


def _example(task: Task, tokenizer: Tokenizer, length: int, i: int, seed: int) -> Example:
    return task.example(length, i, 10, task.generator(seed, length, i), tokenizer)


def _training(task: Task, tokenizer: Tokenizer, length: int, seed: int) -> Example:
    """Return an example to train on, which a task makes of any length that there is room for."""
    try:
        return task.training(length, np.random.default_rng(seed), tokenizer)
    except InputError as error:
        raise AssertionError(f"{task}: makes no example of {length} tokens to train on: {error}") from None


def _check_arrays(task: Task, example: Example) -> None:
    ids, answers = example.ids, example.answers
    assert ids.dtype == np.int64 and answers.dtype == bool, f"{task}: ids are {ids.dtype}, answers {answers.dtype}"
    assert ids.shape == answers.shape and ids.ndim == 1, f"{task}: {ids.shape} ids, {answers.shape} answers"
    assert answers.any() and not answers[0], f"{task}: an example has answers, and something before the first"
    size = task.vocab_size
    assert size is None or (ids.min() >= 0 and ids.max() < size), f"{task}: an id beyond its {size}"
