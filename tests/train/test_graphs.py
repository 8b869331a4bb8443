"""Reads replayed from CUDA graphs are the reads they were recorded from; a run of them goes on after a kill."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import rows, run_and_kill

from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.train import TrainConfig, graphs, train
from rnn_longctx.train import learner as learner_module
from rnn_longctx.train.bptt import MicroBatch, accumulate
from rnn_longctx.train.carries import integers, states
from rnn_longctx.train.config import OptimizerConfig, PassingConfig
from rnn_longctx.train.corpus import Batch
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.optimizer import make_optimizer

SHAPE = Mamba2Config(d_model=128, n_layer=3, vocab_size=97, d_state=64, headdim=32, A_init=(1e-2, 1.0))
PASSING = {"whole": None, "0": PassingConfig(96, 0), "2": PassingConfig(70, 2), "all": PassingConfig(64, "all")}
HALF = partial(torch.autocast, "cuda", torch.bfloat16)


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert Learner(Mamba2LM(replace(SHAPE, n_layer=1)), recorded=True).graphs is None


class Buffers(torch.autograd.Function):
    """A read as a graph runs it: in place, between buffers that its next run overwrites."""

    @staticmethod
    def forward(ctx: Any, run: dict, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for own, t in zip(run["in"], given, strict=True):
            if own.data_ptr() != t.data_ptr():
                own.data.copy_(t)
        for t in run.get("gradients", []):
            t.fill_(torch.nan)
        with torch.enable_grad():
            run["made"] = run["read"](*run["in"])
        for own, t in zip(run.setdefault("out", [t.detach().clone() for t in run["made"]]), run["made"]):
            own.copy_(t.detach())
        ctx.run = run
        return tuple(t.detach() for t in run["out"])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        run = ctx.run
        asked = [t for t in run["in"] if t.requires_grad]
        found = torch.autograd.grad(run["made"], asked, grads)
        for own, t in zip(run.setdefault("gradients", [t.clone() for t in found]), found):
            own.copy_(t)
        given = iter(run["gradients"])
        return None, *(next(given).detach() if t.requires_grad else None for t in run["in"])


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Learners that record on a CPU, in float64."""

    def graphed(read: Any, buffers: tuple, pool: Any = None) -> Any:
        run = {"in": buffers, "read": read}
        return lambda *given: Buffers.apply(run, *given)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setattr(graphs, "recorded", graphed)
    monkeypatch.setattr(graphs.Graphs, "fits", lambda self: True)

    def learner(model: Any) -> Learner:
        recording = Learner(model)
        recording.graphs = graphs.Graphs(model, learner_module.read)
        return recording

    return learner


@pytest.mark.parametrize("name", PASSING)
def test_nothing_of_a_buffer_is_kept(name: str, imitated: Any) -> None:
    """What a read leaves in a graph's memory is gone with the next; gradients and states are as without."""
    eager = Learner(Mamba2LM(replace(SHAPE, d_model=32, d_state=8)).double())
    replayed = imitated(copy.deepcopy(eager.model))
    passing = PASSING[name]
    for length in (300, 210):
        batch = Batch(torch.randint(97, (3, length + 1)), torch.rand(3, length) < 0.1)
        start = eager.model.new_cache(3) if passing else None
        first = update(eager, batch, passing, nullcontext, start)
        found = update(replayed, batch, passing, nullcontext, start)
        if passing:  # the next stream goes on from this one, whose states are kept
            batch = replace(batch, ids=torch.randint(97, (3, length + 1)))
            later = [update(each, batch, passing, nullcontext, own[2]) for each, own in
                     ((eager, first), (replayed, found))]  # fmt: skip
            torch.testing.assert_close(*map(plain, later), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(plain(found), plain(first), rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for one, other in zip(eager.parameters(), replayed.parameters()):
                change = 0.01 * torch.randn_like(one)
                one += change
                other += change
    assert replayed.graphs.recordings


def update(learner: Learner, batch: Batch, passing: PassingConfig | None, context: Any, start: Any) -> tuple:
    learner.zero_grad(set_to_none=True)
    found = accumulate(learner, MicroBatch.of(batch), passing, start, 0.5, context)
    return *found, {name: p.grad.clone() for name, p in learner.named_parameters()}


def plain(updated: tuple) -> tuple:
    """With the states and positions of its cache in the place of the cache."""
    loss, answer_loss, cache, gradients = updated
    return loss, answer_loss, states(cache), integers(cache), gradients


def near(found: Any, expected: Any) -> None:
    """To some 1e-5 of the largest value: products are cut otherwise here and there."""
    if isinstance(expected, Cache):
        return near(states(found), states(expected))
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * max(1e-3, expected.abs().max().item()))
    elif isinstance(expected, dict):
        for name in expected:
            near(found[name], expected[name])
    else:
        for a, b in zip(found, expected, strict=True):
            near(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("context", [nullcontext, HALF], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", PASSING)
def test_replayed_is_read(name: str, context: Any) -> None:
    """Over updates, so that what was recorded meets other weights, and streams of another length and other rows."""
    eager = Learner(Mamba2LM(SHAPE).cuda())
    replayed = Learner(copy.deepcopy(eager.model), recorded=True)
    optimizers = [make_optimizer(learner.model, OptimizerConfig(lr=1e-3)) for learner in (eager, replayed)]
    passing, start = PASSING[name], None
    for length, count in ((300, 3), (210, 3), (300, 2)):
        ids, answer = torch.randint(97, (count, length + 1)).cuda(), torch.rand(count, length).cuda() < 0.1
        if start is None or len(start.position) != count:
            start = eager.model.new_cache(count) if passing else None
        expected = update(eager, Batch(ids, answer), passing, context, start)
        found = update(replayed, Batch(ids, answer), passing, context, start)
        if context is nullcontext:
            near(found, expected)
        else:
            for grad, other in zip(found[3].values(), expected[3].values()):
                assert (grad - other).norm() <= 2e-2 * other.norm()
        start = expected[2] if passing else None
        for optimizer in optimizers:
            optimizer.step()
        replayed.model.load_state_dict(eager.model.state_dict())  # compared update by update
    assert replayed.graphs is not None and replayed.graphs.recordings


@pytest.mark.gpu
def test_what_cannot_be_replayed_is_read() -> None:
    """Documents that begin inside, a policy set later: neither is left out."""
    eager = Learner(Mamba2LM(SHAPE).cuda())
    replayed = Learner(copy.deepcopy(eager.model), recorded=True)
    ids, answer = torch.randint(97, (2, 201)).cuda(), torch.zeros(2, 200, dtype=torch.bool).cuda()
    reset = torch.rand(2, 200).cuda() < 0.05
    passing, start = PassingConfig(64, "all"), eager.model.new_cache(2)
    assert replayed.graphs is not None
    for batch, policy, more in (
        (Batch(ids, answer), ScanPolicy(), True),
        (replace(Batch(ids, answer), reset=reset), ScanPolicy(), False),
        (Batch(ids, answer), ScanPolicy(add=-0.1), False),
    ):
        for learner in (eager, replayed):
            for mixer in learner.model.mixers:
                mixer.policy = policy
        known = len(replayed.graphs.recordings)
        near(update(replayed, batch, passing, nullcontext, start), update(eager, batch, passing, nullcontext, start))
        assert (len(replayed.graphs.recordings) > known) is more


@pytest.mark.gpu
@pytest.mark.parametrize("passing", [None, PassingConfig(50, "all", "previous", 0.5)])
def test_kill_9_on_a_gpu(config: TrainConfig, tmp_path: Path, passing: PassingConfig | None) -> None:
    """Killed by the system and gone on with, the log is that of a run that was not, within the noise of its sums."""
    config = replace(config, device="cuda", passing=passing, steps=60, log_every=1, checkpoint_every=10)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    run_and_kill(config, tmp_path / "config.yaml", deadline=120)
    train(config)
    one, two = rows(config), rows(whole)
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 61))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two)) < 1e-2
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one[:10], one[10:20])) > 5e-2, "it learns"
