"""Examples of any task in the rows of a batch, of which passkeys are one."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rnn_longctx.config import from_dict, load_yaml, to_dict
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.train import TrainConfig, train
from rnn_longctx.train.config import DataConfig, EvaluateConfig, MixedTask, PassingConfig, PasskeyConfig
from rnn_longctx.train.corpus import load_corpus
from rnn_longctx.train.mix import _example_length

MQAR_96 = MixedTask("mqar:pairs=8,vocab_size=64", 0.5, (80, 96))


def with_mix(config: TrainConfig, *mix: MixedTask, **more: Any) -> TrainConfig:
    return replace(config, data=replace(config.data, passkey=PasskeyConfig(), mix=list(mix)), **more)


@pytest.mark.parametrize("passing", [None, PassingConfig(50, 0, "previous", 0.5)])
@pytest.mark.parametrize("fill", [False, True])
def test_passkeys_are_a_mixed_task(config: TrainConfig, passing: PassingConfig | None, fill: bool) -> None:
    passkey = PasskeyConfig(0.4, (104, 110), style="auto", fill=fill)
    one = replace(config, data=replace(config.data, passkey=passkey), passing=passing, batch_size=16)
    task = "passkey:style=auto,learn=both" if fill else "passkey"
    two = with_mix(one, MixedTask(task, 0.4, (104, 110), fill))
    corpus = load_corpus(one.data, ByteTokenizer(), one.longest)
    for step in range(3):
        a, b = corpus.batch(one, step), corpus.batch(two, step)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.answer, b.answer) and bool(a.answer.any())


def test_several_tasks_share_the_rows(config: TrainConfig) -> None:
    c = with_mix(config, MQAR_96, MixedTask("passkey", 0.25, (110, 110)), batch_size=64)
    corpus = load_corpus(c.data, ByteTokenizer(), c.longest)
    counts = np.zeros(2, dtype=int)
    for step in range(20):
        batch = corpus.batch(c, step)
        of_mqar = batch.answer.sum(1) == 8
        of_passkey = batch.answer.sum(1) == 7  # a space, five digits, a full stop
        assert bool((of_mqar | of_passkey | ~batch.answer.any(1)).all())
        for row in torch.nonzero(of_mqar)[:, 0].tolist():
            values = {}  # what each key is bound to before it is asked for
            ids, answer = batch.ids[row].tolist(), batch.answer[row].tolist()
            start = next(i for i in range(len(ids)) if max(ids[i:]) < 64)
            for i in range(start, len(ids) - 1):
                if answer[i]:
                    assert values[ids[i]] == ids[i + 1]
                elif ids[i] < 32 <= ids[i + 1]:
                    values[ids[i]] = ids[i + 1]
        counts += int(of_mqar.sum()), int(of_passkey.sum())
    assert abs(counts - np.array([0.5, 0.25]) * 64 * 20).max() <= 20


def test_a_run_of_another_task(config: TrainConfig) -> None:
    """It is trained and measured; an answer's weight changes what is learned."""
    c = with_mix(config, MQAR_96, steps=4, checkpoint_every=2, log_every=2, evaluate=EvaluateConfig([100], 2, 3))
    lines: list[str] = []
    train(c, lines.append)
    assert not any("passkey" in line for line in lines)
    for words in (r"step 4/4 loss \S+ mqar \S+", r"step 2 at 100 tokens: loss \S+ mqar \S+", r"mqar_accuracy \S+"):
        assert any(re.search(words, line) for line in lines), words
    with (Path(c.out) / "eval.csv").open() as file:
        scores = [float(row["passkey_accuracy"]) for row in csv.DictReader(file)]
    assert len(scores) == 3 and all(0 <= score <= 1 for score in scores)
    log = (Path(c.out) / "log.csv").read_bytes()
    train(c)
    assert (Path(c.out) / "log.csv").read_bytes() == log
    heavy = replace(c, out=f"{c.out}-heavy", data=replace(c.data, answer_weight=9.0))
    train(heavy)
    assert (Path(heavy.out) / "log.csv").read_bytes() != log


def test_no_task_at_all(config: TrainConfig) -> None:
    c = with_mix(config, passing=PassingConfig(50, 0, "previous", 0.5))
    corpus = load_corpus(c.data, ByteTokenizer(), c.longest)
    assert not any(bool(corpus.batch(c, step).answer.any()) for step in range(3))


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ([{"task": "pascode", "lengths": [110, 120]}], 'data.mix\\[0\\].task: unknown task .* did you mean "passkey"'),
        ([{"task": "mqar:pairs=8,vocab_size=512", "lengths": [80, 96]}], "has 512 ids, and the model 256"),
        ([{"task": "passkey", "lengths": [20, 96]}], "data.mix\\[0\\].lengths: 20 is too short"),
        ([{"task": "passkey"}], "data.mix\\[0\\].lengths: 256 is longer than train_length 120; examples are mixed"),
        ([{"task": "passkey", "fraction": 0.6, "lengths": [110, 120]}] * 2, "the fractions are more than 1 together"),
    ],
)
def test_wrong_mixes(config: TrainConfig, mix: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        data = from_dict(DataConfig, {"text": config.data.text, "mix": mix}, "data")
        train(replace(config, data=data))
    assert "\n" not in str(error.value)


def test_a_mix_on_a_config_with_passkeys() -> None:
    """They are left out by null, or by a fraction of 0."""
    path = Path(__file__).parents[2] / "configs" / "train" / "recurrences" / "gla.yaml"
    mix = 'data.mix=[{task: "mqar:pairs=8,vocab_size=64", fraction: 0.5, lengths: [80, 96]}]'
    with pytest.raises(InputError, match=r"data\.mix: takes the place of passkey; .* set passkey to null"):
        load_yaml(TrainConfig, path, [mix])
    for none in ("data.passkey=null", "data.passkey.fraction=0"):
        config = load_yaml(TrainConfig, path, [mix, none])
        assert [mixed.task for mixed in config.data.mixed] == ["mqar:pairs=8,vocab_size=64"]
        assert from_dict(TrainConfig, to_dict(config)) == config
    neither = load_yaml(TrainConfig, path, ["data.passkey=null"])
    assert not neither.data.mixed and neither.data.within(256) == neither.data and neither.data.weight_of_answers == 1


def test_mix_or_passkey() -> None:
    for more in ({"mix": [MQAR_96], "passkey": PasskeyConfig(0.2)}, {"answer_weight": 2.0}, {"answer_weight": -1.0}):
        with pytest.raises(InputError, match=r"mix|answer_weight"):
            DataConfig(**more)  # type: ignore[arg-type]


def streamed(config: TrainConfig, mixed: MixedTask) -> TrainConfig:
    """A run whose rows read the text in order, each full of examples."""
    return with_mix(config, mixed, passing=PassingConfig(40, 0, "previous", 0.5), batch_size=8)


def test_the_rows_own_text_is_the_filler(config: TrainConfig) -> None:
    """With in_text the text stands where the filler was, as in a row without examples; all else is as without it."""
    mixed = MixedTask("passkey:style=headerless", 1.0, (112, 120))
    plain, in_text, bare = (
        streamed(config, m) for m in (mixed, replace(mixed, in_text=True), replace(mixed, fraction=0.0))
    )
    corpus = load_corpus(plain.data, ByteTokenizer(), plain.longest)
    for step in range(4):
        filler, text, alone = (corpus.batch(c, step) for c in (plain, in_text, bare))
        assert torch.equal(filler.answer, text.answer) and text.answer.sum(1).tolist() == [7] * 8
        for row in range(8):
            said, kept, own = (bytes(b.ids[row].tolist()) for b in (filler, text, alone))
            sentence = re.search(rb"\nThe passkey is (\d{5})\. Remember it\. \1 is the passkey\.\n", said)
            question = re.search(rb"\nWhat is the passkey\? The passkey is (\d{5})\.$", said)
            assert sentence and question and sentence[1] == question[1]
            for part in (sentence, question):
                assert kept[part.start() : part.end()] == part[0]
            begin = said.rfind(b"\0", 0, sentence.start()) + 1  # of the example; before it the text stands anyway
            assert kept[:begin] == said[:begin] and kept[begin : sentence.start()] == own[begin : sentence.start()]
            assert kept[sentence.end() : question.start()] == own[sentence.end() : question.start()]


def test_only_a_task_with_filler_stands_in_text(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"data\.mix\[0\]\.in_text: mqar has no filler"):
        train(with_mix(config, replace(MQAR_96, in_text=True)))


@pytest.mark.parametrize("fill", [False, True])
def test_lengths_are_drawn_as_asked(config: TrainConfig, fill: bool) -> None:
    """Of examples from 4 to 1024 tokens at the end of long rows, half are shorter than 64 log-uniformly, and one in
    seventeen uniformly."""
    task = "induction:vocab_size=8"
    shares = {}
    for draw in ("uniform", "log-uniform"):
        mixed = MixedTask(task, 1.0, (4, 1024), fill, draw)  # type: ignore[arg-type]
        rng = np.random.default_rng()
        drawn = [_example_length(mixed, rng, 5000, True) for _ in range(2000)]
        assert min(drawn) >= 4 and max(drawn) <= 1024
        shares[draw] = np.mean(np.array(drawn) < 64)
    assert abs(shares["uniform"] - 60 / 1021) < 0.03 and abs(shares["log-uniform"] - 0.5) < 0.06
    assert _example_length(MixedTask(task, 1.0, (4, 1024), False, "uniform"), np.random.default_rng(), 5000, False) == 0
    assert _example_length(MixedTask(task, 1.0, (4, 1024), True, "uniform"), np.random.default_rng(), 3, False) == 0
