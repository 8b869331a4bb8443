"""Mixers from outside the package, whose carries no room knows: what they hold is handed from segment to segment."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import Killed, assert_same_run, final

import rnn_longctx
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import carry
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.train import TrainConfig, train
from rnn_longctx.train.bptt import MicroBatch, accumulate
from rnn_longctx.train.carries import states
from rnn_longctx.train.config import PassingConfig
from rnn_longctx.train.corpus import Batch, Corpus, load_corpus
from rnn_longctx.train.learner import Learner


@carry
@dataclass
class Average:
    total: Tensor  # (B, d_model)


@dataclass(frozen=True)
class AverageConfig:
    decay: float = 0.9


@MIXERS.register
class DecayingAverage(nn.Module):
    """A carry of one tensor."""

    name, Config, attends = "toy-average", AverageConfig, False

    def __init__(self, config: AverageConfig, model: Any):
        super().__init__()
        self.decay, self.d_model = config.decay, model.d_model
        self.proj = nn.Linear(model.d_model, model.d_model)

    @classmethod
    def of(cls, config: AverageConfig, model: Any) -> DecayingAverage:
        return cls(config, model)

    def forward(self, u: Tensor, carry: Average | None, span: Any) -> tuple[Tensor, Average]:
        total, x, totals = (carry or self.new_carry(len(u))).total, self.proj(u), []
        for t in range(u.shape[1]):
            if span.reset is not None:
                total = torch.where(span.reset[:, t, None], 0.0, total)
            total = self.decay * total + x[:, t]
            totals.append(total)
        return torch.stack(totals, 1), Average(total)

    def new_carry(self, rows: int) -> Average:
        return Average(self.proj.weight.new_zeros(rows, self.d_model))

    def state_size(self) -> StateSize:
        return StateSize({"average": self.d_model})


@carry
@dataclass
class Past:
    keys: Tensor  # (B, S, d_model), of all tokens read
    held: Tensor  # (B,) int64, how many of the last ones are the row's


@dataclass(frozen=True)
class AttentionConfig:
    pass


@MIXERS.register
class Attention(nn.Module):
    """A carry that grows."""

    name, Config, attends = "toy-attention", AttentionConfig, True

    def __init__(self, config: AttentionConfig, model: Any):
        super().__init__()
        self.d_model = model.d_model
        self.proj = nn.Linear(model.d_model, model.d_model, bias=False)

    @classmethod
    def of(cls, config: AttentionConfig, model: Any) -> Attention:
        return cls(config, model)

    def forward(self, u: Tensor, carry: Past | None, span: Any) -> tuple[Tensor, Past]:
        past, new = carry or self.new_carry(len(u)), self.proj(u)
        keys = torch.cat([past.keys, new], 1)
        before, places = past.keys.shape[1], torch.arange(keys.shape[1])
        seen = places <= torch.arange(before, keys.shape[1])[:, None]  # (T, S + T)
        seen = seen & (places >= (before - past.held)[:, None, None])
        scores = (new @ keys.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ keys, Past(keys, past.held + u.shape[1])

    def new_carry(self, rows: int) -> Past:
        return Past(self.proj.weight.new_zeros(rows, 0, self.d_model), torch.zeros(rows, dtype=torch.int64))

    def state_size(self) -> StateSize:
        return StateSize(per_token=self.d_model)


MIXED = {
    "average": ["toy-average"],
    "attention": ["toy-attention"],
    "all": ["toy-average", "mamba2:d_state=8,headdim=8", "toy-attention"],
}


def shape(name: str, vocab_size: int = 97) -> ModelConfig:
    return ModelConfig(MIXED[name], d_model=16, n_layer=3, vocab_size=vocab_size)


@pytest.mark.parametrize("name", MIXED)
def test_bptt_all_is_the_gradient_of_the_whole_stream(name: str) -> None:
    model = LM(shape(name)).double()
    ids, answer = torch.randint(0, 97, (3, 62)), torch.rand(3, 61) < 0.2
    start = model.new_cache(3)
    loss, _, after = accumulate(
        Learner(model), MicroBatch.of(Batch(ids, answer)), PassingConfig(20, "all"), start, 0.0, nullcontext
    )
    gradients = [p.grad for p in model.parameters()]
    cache = model.new_cache()
    expected = model.losses(model(ids[:, :-1], cache), ids[:, 1:]).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0.0)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-7, atol=1e-9 * float(exact.abs().max()))
    torch.testing.assert_close(states(after), [t.detach() for t in states(cache)], rtol=1e-9, atol=1e-12)
    assert after.position.tolist() == [61] * 3 and not any(t.requires_grad for t in states(after))
    cut = accumulate(Learner(model), MicroBatch.of(Batch(ids, answer)), PassingConfig(20, 0), start, 0.0, nullcontext)
    torch.testing.assert_close(cut[0], loss, rtol=1e-9, atol=0.0)


RUNS = {"average": ("average", "previous"), "attention": ("attention", "zero"), "noise": ("all", "noise")}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on(
    name: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixers, start = RUNS[name]
    passing = PassingConfig(50, 1, start, 0.5)  # type: ignore[arg-type]
    config = replace(config, model=shape(mixers, 256), steps=6, checkpoint_every=2, passing=passing)
    whole = replace(config, out=str(tmp_path / "whole"))
    trained = rnn_longctx.load(train(whole))
    batch = Corpus.batch

    def killer(self: Corpus, config: TrainConfig, step: int) -> Batch:
        if step == 5:
            raise Killed
        return batch(self, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "batch", killer)
        with pytest.raises(Killed):
            train(config)
    capsys.readouterr()
    train(config)
    assert ("state norm" in capsys.readouterr().out) == (mixers == "all"), "nothing is said of a state that is none"
    no_number = () if mixers == "all" else ("state_norm", "state_norm_max")  # no layer has a state
    assert_same_run(config, whole, but=no_number)
    assert trained.config == config.model


def test_rows_go_on_from_their_carries(config: TrainConfig) -> None:
    """At a learning rate of 0, the steps are one long reading, and what is kept is what reading by hand leaves."""
    optimizer = replace(config.optimizer, lr=0.0)
    data = replace(config.data, passkey=replace(config.data.passkey, fraction=0.0))
    passing = PassingConfig(50, 0, "previous", 1.0)
    c = replace(config, model=shape("average", 256), steps=3, optimizer=optimizer, data=data, passing=passing)
    model = rnn_longctx.load(train(replace(c, save_dtype="float32")))
    corpus = load_corpus(c.data, ByteTokenizer(), c.longest)
    cache = model.new_cache()
    for step in range(3):  # with gradients, as it was trained: without, other code rounds otherwise
        for piece in corpus.batch(c, step).ids[:, :-1].split(50, 1):
            model(piece, cache)
    starts = final(c)["starts"]
    kept = [tensor for layer in starts["kept"] for tensor in layer]
    torch.testing.assert_close(kept, states(cache), rtol=0, atol=0)
    assert [t.tolist() for t in starts["integers"]] == [[360] * 4]


def test_starts_that_a_model_has_not(config: TrainConfig) -> None:
    for mixers, start, words in (
        ("attention", "previous", "grow without end"),
        ("average", "noise", "no layer of the model has one"),
        ("average", "fitted-noise", "no layer of the model has one"),
    ):
        passing = PassingConfig(50, 0, start)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"passing.start: .*{words}") as error:
            train(replace(config, model=shape(mixers, 256), passing=passing))
        assert "\n" not in str(error.value)
