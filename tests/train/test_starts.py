"""Where streams begin: states that rows passed on, noise, and the checkpoint of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import TINY, Killed, assert_same_run, final, random_start, states

import rnn_longctx
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.train import TrainConfig, train
from rnn_longctx.train import starts as starts_module
from rnn_longctx.train.carries import state_map
from rnn_longctx.train.config import OptimizerConfig, PassingConfig
from rnn_longctx.train.corpus import Batch, Corpus, load_corpus
from rnn_longctx.train.starts import Starts


def passes(config: TrainConfig, **settings: Any) -> TrainConfig:
    settings = {"segment": 50, "bptt": 0, "carry": 1.0} | settings
    data = replace(config.data, passkey=replace(config.data.passkey, fraction=0.0))
    return replace(config, data=data, optimizer=OptimizerConfig(lr=0.0), passing=PassingConfig(**settings))


def corpus_of(config: TrainConfig) -> Corpus:
    return load_corpus(config.data, ByteTokenizer(), config.longest)


def test_rows_read_on_in_the_text(config: TrainConfig) -> None:
    c = passes(config)
    corpus = corpus_of(c)
    text = bytes(corpus.train.tolist()) * 2  # from the end it goes on at the beginning
    steps = len(corpus.train) // 120 + 2
    chosen = [corpus.batch(c, i) for i in range(steps)]
    for before, after in zip(chosen, chosen[1:]):
        assert torch.equal(before.ids[:, -1], after.ids[:, 0])
    whole = [bytes(torch.cat([b.ids[row, :-1] for b in chosen[:20]]).tolist()) for row in range(4)]
    assert all(w in text for w in whole) and len({*whole}) == 4
    assert torch.equal(corpus.batch(c, 7).ids, corpus_of(c).batch(c, 7).ids), "a function of the step alone"
    keys = replace(c, data=replace(c.data, passkey=replace(c.data.passkey, fraction=0.25)))
    with_answer = torch.stack([corpus.batch(keys, i).answer.any(1) for i in range(60)])
    assert (with_answer.sum(1) <= 2).all() and with_answer.any(0).all(), "any row may get a passkey"


def test_a_row_goes_on_from_the_state_it_ended_with(config: TrainConfig) -> None:
    """At a learning rate of 0, twelve steps are one long reading of the text."""
    c = passes(config)
    directory = train(replace(c, save_dtype="float32"))
    corpus = corpus_of(c)
    ids = torch.cat([corpus.batch(c, i).ids[:, :-1] for i in range(c.steps)], 1)
    model = rnn_longctx.load(directory)
    cache = model.new_cache()
    for step in ids.split(120, 1):  # with gradients, as it was trained: without, other code rounds otherwise
        for piece in step.split(50, 1):
            model(piece, cache)
    for (conv, state), layer in zip(final(c)["starts"]["kept"], cache.layers, strict=True):
        torch.testing.assert_close(conv, layer.conv, rtol=0, atol=0)
        torch.testing.assert_close(state, layer.scan.state, rtol=0, atol=0)


def test_carry_is_a_chance(config: TrainConfig) -> None:
    c = passes(config, carry=0.3)
    assert c.passing is not None
    corpus, model = corpus_of(c), Mamba2LM(TINY)
    starts, kept = Starts(model, c.passing, c.seed), random_start(model, 4)
    assert all(not t.any() for pair in states(starts.begin(0, corpus.batch(c, 0))) for t in pair), (
        "nothing to go on from"
    )
    starts.end(0, kept)
    carried = []
    for i in range(1, 200):
        batch = corpus.batch(c, i)
        assert batch.carried is not None
        carried.append(batch.carried)
        for pair, before in zip(states(starts.begin(i, batch)), states(kept)):
            for t, b in zip(pair, before):
                assert torch.equal(t[batch.carried], b[batch.carried]) and not t[~batch.carried].any()
    assert abs(float(torch.stack(carried).float().mean()) - 0.3) < 0.1
    starts.forget()
    assert all(not t.any() for pair in states(starts.begin(7, corpus.batch(c, 7))) for t in pair)


def shaped(config: TrainConfig, start: str, rows: int) -> tuple[Mamba2LM, Batch, Starts]:
    """A model with larger states, rows that begin, and what they start from."""
    c = passes(config, start=start)
    assert c.passing is not None
    model = Mamba2LM(replace(TINY, d_state=64))
    batch = Batch(torch.zeros(rows, 2, dtype=torch.int64), torch.zeros(rows, 1, dtype=torch.bool))
    return model, batch, Starts(model, c.passing, c.seed)


def test_noise(config: TrainConfig) -> None:
    _, batch, starts = shaped(config, "noise", 8)
    noise, again, other = (states(starts.begin(i, batch)) for i in (5, 5, 6))
    for (conv, state), (_, same), (_, next) in zip(noise, again, other):
        assert not conv.any() and state.shape == (8, 4, 8, 64)
        assert torch.equal(state, same) and not torch.equal(state, next)
        assert abs(float(state.std()) / starts_module.NOISE - 1) < 0.05 and abs(float(state.mean())) < 0.01
    assert not torch.equal(noise[0][1], noise[1][1])


def test_fitted_noise(config: TrainConfig) -> None:
    model, batch, starts = shaped(config, "fitted-noise", 32)
    assert all(not state.any() for _, state in states(starts.begin(0, batch))), "nothing measured yet"
    mean, std = torch.randn(2, 4), torch.rand(2, 4) + 0.1
    made = [m[:, None, None] + s[:, None, None] * torch.randn(32, 4, 8, 64) for m, s in zip(mean, std)]
    ended = model.new_cache(32)
    for layer, state in zip(ended.layers, made):
        layer.scan.state = state
    starts.end(0, ended)
    starts.end(1, model.new_cache(32))  # not a step to measure at
    drawn = states(starts.begin(2, batch))
    for i, (conv, state) in enumerate(drawn):
        assert not conv.any()
        torch.testing.assert_close(state.mean((0, 2, 3)), mean[i], rtol=0, atol=0.05)
        torch.testing.assert_close(state.std((0, 2, 3)), std[i], rtol=0.05, atol=0)
    _, _, kept = shaped(config, "fitted-noise", 32)
    kept.load_state_dict(starts.state_dict())
    assert all(torch.equal(a, b) for x, y in zip(drawn, states(kept.begin(2, batch))) for a, b in zip(x, y))


def test_starts_of_an_older_version(config: TrainConfig) -> None:
    """Its snapshots have the two tensors of each layer and no positions, and means by layer and head."""
    c = passes(config)
    assert c.passing is not None
    model, shape = Mamba2LM(TINY), (2, TINY.n_layer, TINY.nheads)
    kept = [[torch.randn_like(t) for t in layer] for layer in states(model.new_cache(4))]
    starts = Starts(model, c.passing, c.seed)
    starts.load_state_dict({"kept": kept, "fitted": None})
    batch = replace(corpus_of(c).batch(c, 1), carried=torch.ones(4, dtype=torch.bool))
    for layer, begun in zip(kept, states(starts.begin(1, batch)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, begun))
    fitted = torch.rand(shape)
    noise = Starts(model, replace(c.passing, start="fitted-noise"), c.seed)
    noise.load_state_dict({"kept": None, "fitted": fitted})
    again = Starts(model, replace(c.passing, start="fitted-noise"), c.seed)
    again.load_state_dict(noise.state_dict())
    for a, b in zip(states(noise.begin(2, batch)), states(again.begin(2, batch)), strict=True):
        assert torch.equal(a[1], b[1]) and a[1].any()


def test_a_step_that_fails_passes_nothing_on(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    begin = Starts.begin

    def poisoned(self: Starts, step: int, batch: Batch) -> Cache:
        start = begin(self, step, batch)
        scans = [state for _, state in states(start)]
        begun.append(all(bool(s.isfinite().all()) for s in scans) and any(bool(s.any()) for s in scans))
        return state_map(lambda t: t * float("nan"), start) if step == 4 else start

    monkeypatch.setattr(Starts, "begin", poisoned)
    train(passes(config))
    assert begun == [False, True, True, True, True, False, True, True, True, True, True, True]


def test_a_run_from_a_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    model = Mamba2LM(replace(TINY, d_state=4))
    model.train_length, model.name, model.tokenizer = 60, "first", ByteTokenizer()
    checkpoint.save(model, tmp_path / "first", provenance={"from": "nowhere"})
    before = (tmp_path / "first" / "model.safetensors").read_bytes()
    c = replace(config, init=str(tmp_path / "first"), model=None, save_dtype="float32")
    still = replace(c, optimizer=OptimizerConfig(lr=0.0), out=str(tmp_path / "still"))
    same = rnn_longctx.load(train(still))
    for name, weight in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight), name
    assert same.train_length == 120 and same.config == model.config
    origin = same.provenance["init"]
    assert origin["name"] == "first" and origin["provenance"] == {"from": "nowhere"}
    assert origin["weights"] == same.weights_hash and str(tmp_path) not in str(same.provenance)
    moved = rnn_longctx.load(train(c))
    assert moved.weights_hash != same.weights_hash
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == before, "the file is not trained in place"
    checkpoint.save(moved, tmp_path / "first")
    with pytest.raises(InputError, match=r"another config \(init was first@\w+, is first@\w+\)"):
        train(c)


def test_mistakes_of_a_start(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"init: .*neither a directory nor a hub id") as error:
        train(replace(config, init=str(tmp_path / "nowhere")))
    assert "\n" not in str(error.value) and not Path(config.out).exists()
    model = Mamba2LM(TINY)
    model.tokenizer = LazyTokenizer("somewhere/else", "it", 256)
    checkpoint.save(model, tmp_path / "else")
    with pytest.raises(InputError, match=r"data\.tokenizer: bytes, but that is not what .*; set data\.tokenizer="):
        train(replace(config, init=str(tmp_path / "else")))


def test_a_start_with_a_remedy_folded_in(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, at the beginning, at the checkpoint's own training length; a killed run goes on to the same end."""
    model = Mamba2LM(replace(TINY, A_init=(1e-3, 1.0), A_log_uniform=True))
    model.train_length, model.name, model.tokenizer = 60, "first", ByteTokenizer()
    checkpoint.save(model, tmp_path / "first", provenance={"from": "nowhere"})
    c = replace(config, init=str(tmp_path / "first"), model=None, mitigation="a-floor", save_dtype="float32")
    expected = rnn_longctx.load(tmp_path / "first")
    rnn_longctx.fold(expected, "a-floor")
    assert not torch.equal(expected.mixers[0].A_log, model.mixers[0].A_log)
    still = replace(c, optimizer=OptimizerConfig(lr=0.0), out=str(tmp_path / "still"))
    found = rnn_longctx.load(train(still))
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    assert found.provenance["folded"] == expected.provenance["folded"]
    assert found.provenance["folded"][0]["calibration"].endswith("8 x 60") and found.train_length == 120
    origin, given = found.provenance["init"], rnn_longctx.load(tmp_path / "first")
    assert (origin["weights"], origin["provenance"]) == (given.weights_hash, {"from": "nowhere"})
    assert found.provenance["recipe"]["mitigation"] == "a-floor"

    whole = replace(c, out=str(tmp_path / "whole"))
    train(whole)
    batch = Corpus.batch

    def killer(self: Corpus, config: TrainConfig, step: int) -> Batch:
        if step == 9:
            raise Killed
        return batch(self, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "batch", killer)
        with pytest.raises(Killed):
            train(c)
    moved = rnn_longctx.load(train(c))
    assert_same_run(c, whole)
    assert moved.provenance["folded"] == expected.provenance["folded"]
    with pytest.raises(InputError, match="another config"):
        train(replace(c, mitigation=None))
    for wrong, words in (("a-flor", 'did you mean "a-floor"'), ("state-norm", "cannot be folded into weights")):
        with pytest.raises(InputError, match=f"mitigation: .*{words}") as error:
            train(replace(c, mitigation=wrong, out=str(tmp_path / "never")))
        assert "\n" not in str(error.value) and not (tmp_path / "never").exists()
