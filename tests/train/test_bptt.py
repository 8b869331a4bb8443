"""Gradients through segments, against the whole stream in one call."""

from __future__ import annotations

import random
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from made_prompts import training_sequence
from torch import Tensor
from training_runs import TINY, random_start, states

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.train import TrainConfig
from rnn_longctx.train.bptt import MicroBatch, accumulate
from rnn_longctx.train.carries import state_map
from rnn_longctx.train.config import MixedTask, PassingConfig
from rnn_longctx.train.corpus import Batch, load_corpus
from rnn_longctx.train.learner import Learner


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
