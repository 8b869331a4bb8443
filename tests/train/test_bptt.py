"""Gradients through segments, against the whole stream in one call; where streams begin."""

from __future__ import annotations

import random
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_prompts import training_sequence
from torch import Tensor
from training_runs import TINY, Killed, assert_same_run, final

import rnn_longctx
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.train import TrainConfig, train
from rnn_longctx.train import starts as starts_module
from rnn_longctx.train.bptt import MicroBatch, accumulate
from rnn_longctx.train.carries import state_map
from rnn_longctx.train.config import MixedTask, OptimizerConfig, PassingConfig
from rnn_longctx.train.corpus import Batch, Corpus, load_corpus
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.starts import Starts


def new_model(**shape: Any) -> Any:
    model: Any = Mamba2LM(replace(TINY, vocab_size=97, A_init=(1e-2, 1.0), **shape)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)  # no zero biases, nothing at its initial value
    return model


def streams(length: int, rows: int = 3) -> Batch:
    answer = torch.rand(rows, length) < 0.1
    answer[0, -1] = True
    return Batch(torch.randint(0, 97, (rows, length + 1)), answer)


def random_start(model: Any, rows: int) -> Cache:
    return state_map(torch.randn_like, model.new_cache(rows))


def states(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, the last inputs of its convolution and its scan's state."""
    return [(layer.conv, layer.scan.state) for layer in cache.layers]


def by_hand(
    model: Any, batch: Batch, start: Cache, weight: float, cuts: list[int]
) -> tuple[Tensor, Tensor, list[Tensor], Cache]:
    """Loss, answer loss, gradients and the cache after; the stream's carries detached at `cuts` and nowhere else."""
    cache, losses = start.clone(), []
    edges = [0, *cuts, batch.answer.shape[1]]
    for t, u in zip(edges, edges[1:]):
        for layer in cache.layers:
            layer.conv, layer.scan.state = layer.conv.detach(), layer.scan.state.detach()
        losses.append(model.losses(model(batch.ids[:, t:u], cache), batch.ids[:, t + 1 : u + 1]))
    whole = torch.cat(losses, 1)
    loss, answer = whole.mean(), whole[batch.answer].mean()
    gradients = torch.autograd.grad(loss + weight * answer, list(model.parameters()))
    return loss, answer, list(gradients), cache


def run(model: Any, batch: Batch, settings: PassingConfig, start: Cache, weight: float) -> tuple:
    model.zero_grad()
    loss, answer, after = accumulate(Learner(model), MicroBatch.of(batch), settings, start, weight, nullcontext)
    return loss, answer, [p.grad for p in model.parameters()], after


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("ngroups", [1, 2])
@pytest.mark.parametrize(("length", "segment"), [(197, 32), (130, 43), (129, 64), (90, 90), (23, 2), (7, 1)])
def test_bptt_all_is_the_gradient_of_the_whole_stream(length: int, segment: int, ngroups: int) -> None:
    model, batch, weight = new_model(ngroups=ngroups), streams(length), random.random()
    start = random_start(model, 3)
    loss, answer, gradients, cache = by_hand(model, batch, start, weight, [])
    found = run(model, batch, PassingConfig(segment, "all"), start, weight)
    close(found[0], loss)
    close(found[1], answer)
    for (name, _), got, expected in zip(model.named_parameters(), found[2], gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()), msg=name)
    for layer, (conv, state) in zip(cache.layers, states(found[3]), strict=True):
        close(conv, layer.conv.detach())
        close(state, layer.scan.state.detach())
        assert not conv.requires_grad and not state.requires_grad


@pytest.mark.parametrize("bptt", [0, 1, 2])
def test_bptt_of_some_boundaries_is_detaching_by_hand(bptt: int) -> None:
    """Blocks of bptt + 1 segments, detached in between."""
    length, segment = 101, 13
    model, batch, weight = new_model(), streams(length), random.random()
    start = random_start(model, 3)
    size = (bptt + 1) * segment
    loss, answer, gradients, _ = by_hand(model, batch, start, weight, list(range(size, length, size)))
    found = run(model, batch, PassingConfig(segment, bptt), start, weight)
    close(found[0], loss)
    close(found[1], answer)
    for got, expected in zip(found[2], gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    others = run(model, batch, PassingConfig(segment, "all"), start, weight)[2]
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(others, gradients)), "the cut is seen"


def test_bf16_autocast() -> None:
    """Every weight learns, also what was first read without gradients, and about what it learns in float32."""
    model, batch = new_model().float(), streams(100)
    start = state_map(torch.Tensor.float, random_start(model, 3))
    settings = PassingConfig(32, "all")
    exact = run(model, batch, settings, start, 0.5)[2]
    model.zero_grad()
    low = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    _, _, after = accumulate(Learner(model), MicroBatch.of(batch), settings, start, 0.5, low)
    assert all(state.dtype == torch.float32 for _, state in states(after))
    missed, whole = 0.0, 0.0
    for (name, p), expected in zip(model.named_parameters(), exact, strict=True):
        # of a few numbers that are sums of what cancels more is rounded away; a lost gradient is off by 1, half by 0.5
        assert p.grad is not None and float((p.grad - expected).norm() / expected.norm()) < 0.4, name
        missed, whole = missed + float((p.grad - expected).square().sum()), whole + float(expected.square().sum())
    assert missed < 0.1**2 * whole


def test_a_longer_stream_takes_no_more_memory() -> None:
    model = new_model()

    def most(length: int) -> int:
        """The most numbers that autograd holds at once."""
        held, peak = 0, 0

        class Saved:
            def __init__(self, t: Tensor):
                nonlocal held, peak
                self.tensor, size = t, t.numel()
                held += size
                peak = max(peak, held)
                weakref.finalize(self, release, size)

        def release(size: int) -> None:
            nonlocal held
            held -= size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            run(model, streams(length), PassingConfig(32, "all"), model.new_cache(3), 1.0)
        return peak

    # the loss of a segment that hands a gradient on saves a little more than a stream of one segment
    assert most(32 * 12) <= 1.05 * most(32 * 3)
    assert most(32) > 3 * 32 * TINY.d_model


@pytest.mark.parametrize("bptt", [0, "all"])
def test_an_answer_teaches_the_key_segments_before_it(bptt: Any) -> None:
    """The key's tokens are replaced by ids found nowhere else, so that their embeddings' gradient is the key's."""
    model = Mamba2LM(replace(TINY, A_init=(1e-3, 1e-2), tie_embeddings=False)).double()
    while True:
        ids, answer = training_sequence(ByteTokenizer(), 300, np.random.default_rng())
        at = bytes(ids.tolist()).find(b"passkey is ") + len("passkey is ")
        if at < 150:
            break
    ids[at : at + 5] = range(200, 205)
    assert (300 - at) // 40 >= 3, "segments between the key and the answer"
    batch = Batch(torch.from_numpy(ids)[None], torch.from_numpy(answer[1:])[None])

    def gradient(weight: float) -> Tensor:
        run(model, batch, PassingConfig(40, bptt), model.new_cache(1), weight)
        return model.backbone.embedding.weight.grad[200:205].clone()

    taught = (gradient(1.0) - gradient(0.0)).abs().amax(1)  # by the answer alone
    assert (taught > 1e-12).all() if bptt == "all" else (taught < 1e-16).all()


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
    with torch.no_grad():
        for step in ids.split(120, 1):
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


def test_noise(config: TrainConfig) -> None:
    c = passes(config, start="noise")
    assert c.passing is not None
    model = Mamba2LM(replace(TINY, d_state=64))
    batch = Batch(torch.zeros(8, 2, dtype=torch.int64), torch.zeros(8, 1, dtype=torch.bool))
    starts = Starts(model, c.passing, c.seed)
    noise, again, other = (states(starts.begin(i, batch)) for i in (5, 5, 6))
    for (conv, state), (_, same), (_, next) in zip(noise, again, other):
        assert not conv.any() and state.shape == (8, 4, 8, 64)
        assert torch.equal(state, same) and not torch.equal(state, next)
        assert abs(float(state.std()) / starts_module.NOISE - 1) < 0.05 and abs(float(state.mean())) < 0.01
    assert not torch.equal(noise[0][1], noise[1][1])


def test_fitted_noise(config: TrainConfig) -> None:
    c = passes(config, start="fitted-noise")
    assert c.passing is not None
    model = Mamba2LM(replace(TINY, d_state=64))
    batch = Batch(torch.zeros(32, 2, dtype=torch.int64), torch.zeros(32, 1, dtype=torch.bool))
    starts = Starts(model, c.passing, c.seed)
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
    kept = Starts(model, c.passing, c.seed)
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


@pytest.mark.parametrize("bptt", [0, 2, "all"])
def test_a_question_teaches_the_segment_of_its_key(config: TrainConfig, bptt: Any) -> None:
    """A passkey in the row's own text, its question many segments after the key: what reads the key is trained by the
    answer where gradients cross that many boundaries."""
    mixed = MixedTask("passkey:style=headerless", 1.0, (120, 120), in_text=True)
    data = replace(config.data, passkey=None, mix=[mixed])
    passing = PassingConfig(8, bptt, "zero")
    c = replace(config, data=data, batch_size=1, passing=passing)
    corpus = load_corpus(data, ByteTokenizer(), c.longest)
    for step in range(50):
        batch = corpus.batch(c, step)
        row = bytes(batch.ids[0].tolist())
        key = row.index(b"The passkey is ") + 15
        if key // 8 < 4:  # the answer stands in the last two of fifteen segments
            break
    batch.ids[0, key] = 7  # a byte that is nowhere else
    assert row.count(bytes([7])) == 0 and int(batch.answer[0].nonzero()[0]) // 8 >= 13
    model: Any = Mamba2LM(replace(TINY, A_init=(1e-3, 1e-2), tie_embeddings=False)).double()
    rows = MicroBatch.of(replace(batch, counted=batch.answer))
    accumulate(Learner(model), rows, passing, None, 1.0, nullcontext)
    reached = float(model.backbone.embedding.weight.grad[7].norm())
    assert (reached > 0) is (bptt == "all")
