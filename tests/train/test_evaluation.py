"""Evaluation during training, and stages of lengths."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_tokenizers import NAMES, made_tokenizer
from torch.nn import functional as F
from training_runs import TINY, final, rows

import rnn_longctx
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.tasks.passkey import Passkey, passkey_batch
from rnn_longctx.train import TrainConfig, evaluation, loop, train
from rnn_longctx.train.config import EvaluateConfig, OptimizerConfig, PassingConfig
from rnn_longctx.train.corpus import Corpus, load_corpus
from rnn_longctx.train.evaluation import Evaluation, examples_of, held_out_loss, late_loss, recall, stage_of
from rnn_longctx.train.optimizer import learning_rate
from rnn_longctx.train.state import RunState


def table(config: TrainConfig) -> list[dict[str, float]]:
    with (Path(config.out) / "eval.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_late_loss_is_that_of_the_second_half(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SEGMENT", 32)
    corpus, model = load_corpus(config.data, ByteTokenizer(), 120), Mamba2LM(TINY).double()
    ids = torch.cat(list(corpus.validation(111, 4)))
    losses = F.cross_entropy(model.logits(model(ids[:, :-1])).detach().transpose(1, 2), ids[:, 1:], reduction="none")
    assert len(ids) % 4, "a last batch of fewer rows"
    assert late_loss(model, corpus, 111, 4, nullcontext) == pytest.approx(float(losses[:, 55:].mean()), rel=1e-9)
    assert held_out_loss(model, corpus, 111, 4, nullcontext) == pytest.approx(float(losses.mean()), rel=1e-9)
    assert math.isnan(held_out_loss(model, corpus, 50_000, 4, nullcontext))


def score(model: Any, tokenizer: Any, n: int, rows: int) -> float:
    """Of a model at passkeys in prompts of 230 tokens."""
    task = Passkey(style="headerless")
    return recall(model, task, examples_of(task, tokenizer, 230, n, 3), tokenizer, rows, nullcontext)


def test_passkeys_are_right_when_every_token_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SEGMENT", 50)
    n, wrong = 17, set(random.sample(range(17), 5))
    asked = 0

    class Model:
        device = torch.device("cpu")

        def new_cache(self) -> list[torch.Tensor]:
            return []

        def __call__(self, ids: torch.Tensor, cache: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
            cache.append(ids)
            return torch.cat(cache, 1), ids.shape[1]

        def logits(self, hidden: tuple[torch.Tensor, int]) -> torch.Tensor:
            nonlocal asked
            seen, last = hidden
            assert last == 6, "the end of the prompt, and the answer but its last digit"
            said = []
            for row in seen:
                text = bytes(row.tolist()).decode()
                assert text[:-5].endswith("The passkey is") and text[-5] == " "
                key = text.split("The passkey is ")[1][:5]
                assert key[:4] == text[-4:]
                at = random.randrange(5) if asked in wrong else None
                said.append([32, *(ord(c) if i != at else ord(c) ^ 1 for i, c in enumerate(key))])
                asked += 1
            likely = F.one_hot(torch.tensor(said), 256).float()
            return F.pad(likely, (0, 44), value=2.0)  # rows that stand for no token are never the answer

    found = score(Model(), ByteTokenizer(), n, 4)
    assert found == pytest.approx(12 / 17) and asked == n


@pytest.mark.parametrize("kind", NAMES)
def test_passkeys_are_judged_with_any_tokenizer(kind: str) -> None:
    """A model that says the replies is right, one that says another's is wrong; one token more is not asked for."""
    tokenizer, n = made_tokenizer(kind), 6
    prompts = passkey_batch(tokenizer, 230, n, 3)
    size = tokenizer.vocab_size

    class Model:
        device = torch.device("cpu")

        def __init__(self, by: int):
            self.replies = {tuple(p.ids): prompts[(i + by) % n].reply for i, p in enumerate(prompts)}

        def new_cache(self) -> list[torch.Tensor]:
            return []

        def __call__(self, ids: torch.Tensor, cache: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
            cache.append(ids)
            return torch.cat(cache, 1), ids.shape[1]

        def logits(self, hidden: tuple[torch.Tensor, int]) -> torch.Tensor:
            seen, last = hidden
            said = [np.resize(self.replies[tuple(row[:230].tolist())], last) for row in seen]
            assert last == max(len(p.reply) for p in prompts)
            return F.one_hot(torch.from_numpy(np.stack(said)), size).float()

    assert score(Model(0), tokenizer, n, n) == 1 and score(Model(1), tokenizer, n, n) == 0


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "llama-2"])
def test_the_last_passkeys_end_at_the_training_length(
    kind: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt and answer are longer than what was trained on, and the longest are as long."""
    tokenizer, lengths = made_tokenizer(kind), []
    monkeypatch.setattr(evaluation, "held_out_loss", lambda *_: 1.0)
    measured = lambda model, task, examples, *_: lengths.append(len(examples[0].prompt)) or 1.0  # noqa: E731
    monkeypatch.setattr(evaluation, "recall", measured)
    (tmp_path / "log.csv").write_text("step,tokens,loss\n1,1,1.0\n")
    data = replace(config.data, passkey=replace(config.data.passkey, fraction=0.5, lengths=[100, 120]))
    corpus = Corpus([], torch.zeros(0), [], tokenizer)
    evaluation.final_metrics(replace(config, data=data), corpus, None, tmp_path, nullcontext)
    (length,) = lengths
    longest = max(len(p.reply) for p in passkey_batch(tokenizer, length, 100, config.seed, "headerless"))
    assert 120 - 6 <= length <= 120 - longest


def test_evaluation_during_a_run(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    c = replace(config, steps=7, evaluate=EvaluateConfig([111, 120], every=3, passkeys=2), save_dtype="float32")
    directory = train(c)
    found = table(c)
    assert list(found[0]) == evaluation.COLUMNS
    assert [(r["step"], r["length"]) for r in found] == [(s, n) for s in (0, 3, 6, 7) for n in (111, 120)]
    assert [r["tokens"] for r in found[::2]] == [s * 480 for s in (0, 3, 6, 7)]
    assert found[-1]["loss"] < found[1]["loss"] and all(r["passkey_accuracy"] == 0 for r in found)
    model, corpus = rnn_longctx.load(directory), load_corpus(c.data, ByteTokenizer(), 120)
    assert late_loss(model, corpus, 120, 4, nullcontext) == pytest.approx(found[-1]["loss"], rel=1e-4)
    assert rnn_longctx.load(Path(c.out) / "last").weights_hash == model.weights_hash
    said = capsys.readouterr().out
    assert re.search(r"step 6 at 111 tokens: loss \d\.\d+ passkey accuracy 0\.00\n", said)
    assert re.search(r"step \d/7 loss \d\.\d+ (passkey loss \d\.\d+ )?\d+K tok/s", said)
    plain = replace(c, evaluate=None, out=f"{c.out}-plain")
    train(plain)
    for name, weight in final(plain)["model"].items():
        assert torch.equal(weight, final(c)["model"][name]), "looking changes nothing"


def test_the_best_by_passkeys_then_by_loss_is_kept(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {0: [0.0, -5.0], 2: [0.5, -6.0], 4: [0.5, -4.0], 6: [0.4, -1.0], 8: [0.5, -4.0], 10: [0.0, 0.0]}
    monkeypatch.setattr(Evaluation, "__call__", lambda self, step, tokens: scores.get(step, [0.2, -1.0]))
    c = replace(config, evaluate=EvaluateConfig([120], every=2, passkeys=1))
    train(c)
    kept = {n: rnn_longctx.load(Path(c.out) / n).provenance["metrics"]["step"] for n in ("best", "last")}
    assert kept == {"best": 4, "last": 12}


def test_scores(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = replace(config, evaluate=EvaluateConfig([111, 120], passkeys=3))
    corpus = load_corpus(c.data, ByteTokenizer(), 120)
    monkeypatch.setattr(evaluation, "late_loss", lambda m, c, length, *_: length / 100)
    monkeypatch.setattr(evaluation, "recall", lambda m, t, examples, *_: len(examples[0].prompt) / 1000)
    assert Evaluation(c, corpus, None, tmp_path, nullcontext)(5, 9) == pytest.approx([0.1155, -1.155])
    monkeypatch.setattr(evaluation, "late_loss", lambda *_: math.nan)
    assert Evaluation(c, corpus, None, tmp_path, nullcontext)(5, 9)[1] == -math.inf, "the worst of all"
    lossy = replace(c, evaluate=EvaluateConfig([111], passkeys=0))
    assert Evaluation(lossy, corpus, None, tmp_path, nullcontext)(5, 9) == [0.0, -math.inf]


@pytest.mark.parametrize(
    ("length", "words"), [(5000, "5000 is too long: the held-out text has"), (50, "takes at least")]
)
def test_lengths_that_do_not_fit(config: TrainConfig, length: int, words: str) -> None:
    with pytest.raises(InputError, match=f"evaluate.lengths: .*{words}") as error:
        train(replace(config, evaluate=EvaluateConfig([120, length])))
    assert "\n" not in str(error.value)


# --- stages


def staged(config: TrainConfig, schedule: str, **more: Any) -> TrainConfig:
    return replace(config, train_length=schedule, **more)


def test_a_schedule_of_lengths(config: TrainConfig) -> None:
    c = staged(config, "112:3,115:2:3,120:4:1", log_every=1)
    assert c.steps == 9 and c.longest == 120 and c.stages == [(112, 3, 4), (115, 2, 3), (120, 4, 1)]
    assert [c.at(i).train_length for i in range(3)] == [112, 115, 120]
    assert [c.at(i).data.passkey.lengths for i in range(3)] == [(110, 112), (110, 115), (110, 120)]
    assert replace(c, train_length="2k").train_length == 2048
    train(replace(c, optimizer=OptimizerConfig(lr=1e-3)))
    log = rows(c)
    assert [r["length"] for r in log] == [112] * 3 + [115] * 2 + [120] * 4
    assert log[-1]["tokens"] == 3 * 4 * 112 + 2 * 3 * 115 + 4 * 1 * 120
    rates = [1e-3 * learning_rate(c.schedule, i, 9) for i in range(9)]
    assert [r["lr"] for r in log] == pytest.approx(rates, rel=1e-5)
    assert rnn_longctx.load(Path(c.out) / "model").train_length == 120


def test_a_new_stage_begins_at_zero(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, batch = [], Corpus.batch

    def spy(self: Corpus, c: TrainConfig, step: int) -> Any:
        seen.append(c.train_length)
        return batch(self, c, step)

    kept, begin = [], loop.Starts.begin

    def begun(self: Any, step: int, b: Any) -> Any:
        kept.append(self.last is not None)
        return begin(self, step, b)

    monkeypatch.setattr(Corpus, "batch", spy)
    monkeypatch.setattr(loop.Starts, "begin", begun)
    train(staged(config, "112:3,120:3", passing=PassingConfig(50, 0, "previous", 1.0)))
    assert seen == [112] * 3 + [120] * 3 and kept == [False, True, True, False, True, True]


def stages(config: TrainConfig, losses: list[float]) -> list[int]:
    state, entered, taken = RunState(), [], iter(losses)
    for step in range(config.steps):
        state.step = step
        state.stage = stage_of(config, state, lambda: next(taken), print)
        entered.append(state.stage)
    assert next(taken, None) is None, "asked as often as expected"
    return entered


def test_the_gate(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evaluation, "ASK_EVERY", 2)
    c = staged(config, "112:3,115:4,120:5")
    assert stages(c, [1.0, 1.05, 1.05]) == [0] * 3 + [1] * 4 + [2] * 5
    assert "stays" not in capsys.readouterr().out
    assert stages(c, [1.0, 1.06, math.nan, 1.04, 0.9]) == [0] * 7 + [1] * 2 + [2] * 3
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "step 3: stays at 112 tokens, not on to 115: held-out loss at 112 is 1.0600, more than 5% above 1.0000"
    )
    assert [line.split(":")[0] for line in said] == ["step 3", "step 5", "step 7", "step 9"]
    # what counts is the lowest loss so far: 5% a stage do not add up
    assert stages(c, [2.0, 1.0, 1.06, 1.06, 1.0]) == [0] * 3 + [1] * 8 + [2]
    assert stages(replace(c, train_length=120, steps=5), []) == [0] * 5, "one stage asks nothing"


def test_a_stage_that_may_not_begin_is_in_the_log(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "ASK_EVERY", 2)
    losses = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(loop, "late_loss", lambda *_: next(losses))
    c = staged(config, "112:3,120:6", log_every=1)
    train(c)
    assert [r["length"] for r in rows(c)] == [112] * 7 + [120] * 2
    assert "step 5: stays at 112 tokens, not on to 120" in capsys.readouterr().out


def test_stages_need_held_out_text(config: TrainConfig) -> None:
    with pytest.raises(InputError, match="train_length: a schedule is gated on held-out text"):
        train(staged(replace(config, data=replace(config.data, held_out=0.0)), "112:3,120:6"))


def test_the_recipe_is_recorded(config: TrainConfig) -> None:
    c = staged(config, "112:1,120:1", passing=PassingConfig(50, "all"))
    facts = json.loads((train(c) / "config.json").read_text())["provenance"]["recipe"]
    assert facts["train_length"] == "112:1,120:1" and facts["steps"] == 2
    assert facts["passing"] == {"segment": 50, "bptt": "all", "start": "previous", "carry": 0.9}
