"""What the contract cannot see of the tasks in symbols: what stands where, how it is drawn, and what a guess scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.spec import parse
from rnn_longctx.tasks import TASKS, Example, Task
from rnn_longctx.tasks.induction import Induction
from rnn_longctx.tasks.noisy_recall import NoisyRecall
from rnn_longctx.tasks.planted import Planted
from rnn_longctx.tasks.selective_copying import SelectiveCopying
from rnn_longctx.tasks.symbols import SymbolTask

BYTES = ByteTokenizer()
SIGMAS = 6  # how far a share may lie from what it should be: less than once in a hundred million tests


def task_of(text: str) -> Task:
    return parse(text, TASKS, "task")


def examples(task: Task, length: int, n: int, seed: int) -> list[Example]:
    return [task.example(length, i, n, np.random.default_rng([seed, i]), BYTES) for i in range(n)]


def assert_share(count: float, n: int, share: float) -> None:
    assert abs(count / n - share) <= SIGMAS * math.sqrt(max(share * (1 - share), 1 / n) / n), (count / n, share)


IN_SYMBOLS = [text for name, task in TASKS.items() if issubclass(task, SymbolTask) for text in task.examples or (name,)]
RECALL = ["mqar:vocab_size=64", "mqar:asked=spread,vocab_size=64", "forgetting-mqar:vocab_size=20"]


@pytest.mark.parametrize("text", IN_SYMBOLS)
def test_symbols_do_not_end_a_document_and_a_name_tells_parameters(text, seed):
    task = task_of(text)
    for length in (task.shortest(BYTES), 150):
        for example in examples(task, length, 5, seed):
            assert example.ids.min() > 0 and example.ids.max() < task.vocab_size <= 256, "a byte-level model has them"
    others = [other for other in IN_SYMBOLS if other != text and task_of(other).name == task.name]
    assert task.label not in {task_of(other).label for other in others}


@pytest.mark.parametrize("text", [*IN_SYMBOLS, *RECALL])
def test_chance_is_what_a_guess_scores(text, seed):
    task, rng, n = task_of(text), np.random.default_rng(seed), 1500
    own = examples(task, task.shortest(BYTES) + 20, 40, seed)
    said = np.unique(np.concatenate([e.ids[e.answers] for e in examples(task, 150, 400, seed)]))
    assert 1 / len(said) >= task.chance, "there are no more answers than that"
    said = np.arange(said.max() - round(1 / task.chance) + 1, said.max() + 1)
    total = sum(task.right(rng.choice(said, own[i % 40].answers.sum()), own[i % 40], BYTES) for i in range(n))
    assert_share(total, n, task.chance)


def test_induction_is_a_marker_that_stands_anywhere(seed):
    task, n, length = Induction(), 3000, 20
    places = np.zeros(length)
    for example in examples(task, length, n, seed):
        first, second = np.flatnonzero(example.ids == 1)
        assert second == length - 2 and example.ids[-1] == example.ids[first + 1] and example.answers.sum() == 1
        assert example.about["gap"] == second - first
        assert abs(first / (length - 3) - example.depth) <= 0.05 + 1 / (length - 3)
        places[first] += 1
    for count in places[: length - 3]:  # the last place is that of the marker, its symbol, and both again
        assert_share(count, n, 1 / (length - 3))
    training = [task.training(length, np.random.default_rng([seed, i]), BYTES) for i in range(400)]
    assert {int(np.flatnonzero(e.ids == 1)[0]) for e in training} == set(range(length - 3))


def test_selective_copying_says_the_data_in_their_order(seed):
    task, n, length = SelectiveCopying(copied=3), 2000, 13
    places = np.zeros(length)
    for example in examples(task, length, n, seed):
        context = example.ids[: length - 4]
        assert example.ids[length - 4] == 2 and set(context[context < 3].tolist()) <= {1}
        assert example.ids[example.answers].tolist() == context[context >= 3].tolist()
        places[np.flatnonzero(context >= 3)] += 1
    for count in places[: length - 4]:
        assert_share(count, n, 3 / 9)
    swapped = example.ids[example.answers].copy()
    swapped[0] = 3 + (swapped[0] - 2) % 13
    assert task.right(swapped, example, BYTES) == pytest.approx(2 / 3)


def test_noise_stands_anywhere_but_inside_a_pair(seed):
    task, n, length = NoisyRecall(pairs=2, noises=4, vocab_size=32), 2000, 12
    noisy = np.zeros(length)
    for example in examples(task, length, n, seed):
        ids = example.ids
        keys = np.flatnonzero(ids < 14)
        assert ids.min() >= 1 and (ids[keys + 1] >= 14).all() and (ids[keys + 1] < 27).all()
        rest = np.delete(ids, np.concatenate([keys, keys + 1]))
        assert (rest >= 28).all() and len(rest) == 4 and example.about["noise"] == pytest.approx(1 / 3)
        bound = dict(zip(ids[keys[:2]].tolist(), ids[keys[:2] + 1].tolist()))
        assert len(bound) == 2 and sorted(ids[keys[2:]].tolist()) == sorted(bound)
        assert [bound[int(key)] for key in ids[keys[2:]]] == ids[keys[2:] + 1].tolist()
        assert np.flatnonzero(example.answers).tolist() == (keys[2:] + 1).tolist()
        noisy += ids >= 28
    assert_share(noisy[0], n, 4 / 8)  # of eight units, pairs and tokens of noise, the first is one of the four tokens
    assert_share(noisy[-1], n, 4 / 8)


def planted_gaps(task: Planted, length: int, n: int, seed: int) -> np.ndarray:
    """The gaps of examples, from their tokens."""
    gaps = []
    for example in examples(task, length, n, seed):
        first, second = np.flatnonzero(example.ids == 2)
        assert second == length - 2 and example.ids[first + 1] >= 3
        assert example.about["gap"] == second - first
        gaps.append(second - first)
    return np.array(gaps)


@pytest.mark.parametrize(("text", "longest"), [("planted", 98), ("planted:gap=30", 30)])
def test_gaps_are_log_uniform(text, longest, seed):
    n = 3000
    gaps = planted_gaps(task_of(text), 100, n, seed)
    assert gaps.min() >= 2 and gaps.max() <= longest
    for g in (2, 5, 12, longest - 1):
        share = math.log((g + 1) / 2) / math.log((longest + 1) / 2)
        assert_share((gaps <= g).sum(), n, share)
    training = [task_of(text).training(100, np.random.default_rng([seed, i]), BYTES) for i in range(800)]
    below = sum(e.about["gap"] <= 5 for e in training)
    assert_share(below, 800, math.log(3) / math.log((longest + 1) / 2))


def test_depths_of_planted_links_are_of_the_gap(seed):
    by_depth: dict[float, list[float]] = {}
    for example in examples(Planted(), 500, 200, seed):
        by_depth.setdefault(example.depth, []).append(example.about["gap"])
    assert sorted(by_depth) == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    for deep, deeper in zip(sorted(by_depth), sorted(by_depth)[1:]):
        assert min(by_depth[deep]) >= max(by_depth[deeper]), "the deepest is the shortest gap"


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
def test_strength_is_how_often_the_link_holds_and_noise_what_is_no_blank(strength, noise, seed):
    task, n, length = Planted(strength=strength, noise=noise, vocab_size=7), 1500, 30
    held = values = total = 0
    others = np.zeros(3)
    for example in examples(task, length, n, seed):
        ids = example.ids
        first = int(np.flatnonzero(ids == 2)[0])
        shift = (ids[-1] - ids[first + 1]) % 4
        held += shift == 0
        others[shift - 1] += shift > 0
        assert example.about["holds"] == (shift == 0)
        rest = np.delete(ids, [first, first + 1, length - 2, length - 1])
        assert ((rest == 1) | (rest >= 3)).all()
        values, total = values + (rest >= 3).sum(), total + len(rest)
    assert_share(held, n, strength)
    assert_share(values, total, noise)
    for count in others:  # where it does not hold, all other values alike
        assert_share(count, n, (1 - strength) / 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("induction:vocab_size=3", "vocab_size is at least 4, got 3"),
        ("selective-copying:copied=0", "copied is at least 1, got 0"),
        ("selective-copying:vocab_size=4", "vocab_size is at least 5, got 4"),
        ("noisy-recall:pairs=120", "120 pairs: a vocabulary of 256 with 16 ids of noise has 119 keys"),
        ("noisy-recall:noises=300", "a vocabulary of 256 with 300 ids of noise has 0 keys"),
        ("planted:strength=1.5", "strength is a share from 0 to 1, got 1.5"),
        ("planted:noise=-0.1", "noise is a share from 0 to 1, got -0.1"),
        ("planted:gap=1", "gap is at least 2, got 1"),
        ("listops:longest=3", "longest is from 4 to 8000 tokens, got 3"),
        ("mqar:asked=late", "asked"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        task_of(text)
    assert "\n" not in str(error.value)
