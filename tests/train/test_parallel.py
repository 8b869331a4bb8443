"""One context over several ranks is one context: outputs, gradients, caches, in float64 against one rank."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from functools import cache

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.restart import Restart
from rnn_longctx.recurrence.carry import tree_map
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy
from rnn_longctx.train.parallel import reduce_gradients, sequence_parallel, shard, stretch

VOCAB, HEADS, HEADDIM, D_STATE = 61, 6, 8, 8
CLOSE = 1e-9
POLICIES = {
    "plain": PLAIN,
    "rri": ScanPolicy(add=math.log(0.98), gain=0.75),
    "gates": ScanPolicy(mul=tuple(0.2 * h for h in range(HEADS)), add=-0.01, gain=1.5, min_dt=0.2),
    "reset": ScanPolicy(reset=23, mul=0.3),
    "start": ScanPolicy(start=torch.linspace(-1, 1, HEADS * HEADDIM * D_STATE).view(HEADS, HEADDIM, D_STATE), mul=0.1),
}
REFUSED = {
    "caps": ScanPolicy(caps=(Cap(1.0, 16),)),
    "window": ScanPolicy(window=13),
    "start": ScanPolicy(reset=5, start=torch.zeros(HEADS, HEADDIM, D_STATE)),
}


@cache
def groups(world: int) -> dist.ProcessGroup | None:
    """This rank's group of `world` ranks; the others have theirs."""
    size = dist.get_world_size()
    made = [dist.new_group(list(range(first, first + world))) for first in range(0, size, world)]
    return None if world == size else made[dist.get_rank() // world]


@torch.no_grad()
def small(device: torch.device) -> Mamba2LM:
    """The same on every rank, float64; heads that forget at once and heads that hardly do."""
    model = Mamba2LM(Mamba2Config(24, 2, VOCAB, D_STATE, headdim=HEADDIM, ngroups=2))
    for mixer in model.mixers:
        mixer.A_log.uniform_(math.log(0.01), math.log(8.0))
        mixer.dt_bias.uniform_(-4.0, 1.0)
        mixer.D.normal_()
        mixer.conv1d.bias.normal_(0, 0.5)
    model.backbone.embedding.weight.normal_()
    return model.to(device, torch.float64)


def tokens(device: torch.device, batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), device=device)


def use(model: Mamba2LM, policy: ScanPolicy) -> None:
    for mixer in model.mixers:
        mixer.policy = policy


def grads(model: Mamba2LM) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours, expected) -> None:
    """Tensors, caches or lists of them, relative to the largest value of each."""
    found: tuple[list, list] = ([], [])
    for leaves, value in zip(found, (ours, expected)):
        tree_map(lambda t, leaves=leaves: leaves.append(t) or t, value)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE * max(1.0, b.abs().max().item()))


def learn(model: Mamba2LM, ids: torch.Tensor, reset: torch.Tensor | None, group, spread: bool):
    """Two calls with a cache between them, which gradients flow through: hidden states, the caches after each, and all
    gradients, of losses and of the last cache."""
    model.zero_grad()
    hidden, caches, loss, held = [], [], 0.0, Cache()
    half = ids.shape[1] // 3
    marks = torch.linspace(-1, 1, HEADDIM * D_STATE, dtype=model.dtype, device=model.device).view(HEADDIM, D_STATE)
    for part, begun in ((ids[:, : half + 1], None), (ids[:, half:], reset)):
        own, goal = shard(part, group) if spread else (part[:, :-1], part[:, 1:])
        if begun is not None:
            begun = begun[:, half:][:, stretch(part.shape[1] - 1, group) if spread else slice(None)]
        with sequence_parallel(model, group) if spread else contextlib.nullcontext():
            h = model(own, held, reset=begun)
        loss = loss + model.losses(h, goal).sum() / ids[:, 1:].numel()
        hidden.append(h.detach())
        caches.append(tree_map(torch.clone, held))
    share = dist.get_world_size(group) if spread else 1  # every rank has the last cache: each takes its part
    for layer in held.layers:
        loss = loss + ((layer.scan.state * marks).mean() + layer.conv.square().mean()) / share
    loss.backward()
    if spread:
        reduce_gradients(model, group)
    return hidden, tree_map(torch.detach, caches), grads(model)


# --- run on every rank


def check_learning(device: torch.device, world: int, policy: str, length: int, documents: bool) -> None:
    group, model = groups(world), small(device)
    use(model, POLICIES[policy])
    ids = tokens(device, 2, length + 1)
    reset = torch.rand(2, length, device=device) < 0.04 if documents else None
    expected, caches, expected_grads = copy.deepcopy(learn(model, ids, reset, None, False))
    ours, own_caches, own_grads = learn(model, ids, reset, group, True)
    for h, e in zip(ours, expected):
        assert_same(h, e[:, stretch(e.shape[1], group)])
    assert_same(own_caches, caches)
    for name, grad in expected_grads.items():
        assert grad.norm() > 0, name
        assert_same(own_grads[name], grad)


def check_reading(device: torch.device, world: int, lengths: list[int]) -> None:
    """Stretches of any lengths; a stream in several calls; and on from there on one rank alone."""
    group, model = groups(world), small(device)
    rank = dist.get_rank(group)
    ids = tokens(device, 3, 2 * sum(lengths) + 9)
    held, alone = Cache(), Cache()
    with torch.inference_mode():
        expected = model(ids, alone)
        first = 0
        for sizes in (lengths, lengths[::-1]):
            with sequence_parallel(model, group):
                own = slice(first + sum(sizes[:rank]), first + sum(sizes[: rank + 1]))
                assert_same(model(ids[:, own], held), expected[:, own])
            first += sum(sizes)
            assert held.position.tolist() == [first] * 3
        assert_same(model(ids[:, first:], held), expected[:, first:])
        assert_same(held, alone)


def check_refusals(device: torch.device, world: int) -> None:
    group, model = groups(world), small(device)
    with sequence_parallel(model, group):
        for name, policy in REFUSED.items():
            use(model, policy)
            with pytest.raises(InputError, match=rf"{name}.*over {world} ranks"):
                model(tokens(device, 1, 40))
        use(model, POLICIES["start"])
        with pytest.raises(InputError, match=f"start.*over {world} ranks"):
            model(tokens(device, 1, 40), reset=torch.zeros(1, 40, dtype=torch.bool))
        use(model, PLAIN)
        short = 2 if dist.get_rank(group) == world - 1 else 40
        with pytest.raises(InputError, match=r"each rank must hold 3 tokens or more.* 2\]"):
            model(tokens(device, 1, short))
        with pytest.raises(InputError, match="padding cannot"):
            model(tokens(device, 1, 9), mask=torch.arange(9)[None] > 2)
        model.restart = Restart(16)
        with pytest.raises(InputError, match=f"restart every 16.*over {world} ranks"):
            model(tokens(device, 1, 40))
        with pytest.raises(InputError, match="already"), sequence_parallel(model, group):
            pass
    with pytest.raises(InputError, match="not Linear"), sequence_parallel(torch.nn.Linear(2, 2), group):
        pass


def check_low_precision(device: torch.device, world: int, dtype: torch.dtype, backend: str | None,
                        length: int = 201) -> None:  # fmt: skip
    """Against float64, nearly as far off as one rank is. What little a parameter's gradient is in bf16 differs more."""
    group, exact = groups(world), small(device)
    ids = tokens(device, 1, length + 1)
    model = copy.deepcopy(exact).to(dtype)
    model.use_backend(backend)
    expected = copy.deepcopy(learn(exact, ids, None, None, False))
    alone = copy.deepcopy(learn(model, ids, None, None, False))
    ours = learn(model, ids, None, group, True)
    for h, one, e in zip(ours[0], alone[0], expected[0]):
        own = stretch(e.shape[1], group)
        assert _error(h, e[:, own]) < 2 * _error(one[:, own], e[:, own]) + 1e-6
    for name, grad in expected[2].items():
        most = 4 * _error(alone[2][name], grad) + (0.05 if dtype == torch.bfloat16 else 1e-5)
        assert _error(ours[2][name], grad) < most, name


def check_benchmark(device: torch.device) -> None:
    from rnn_longctx.eval.bench.parallel import parallel_rows  # and all tables and plots

    rows = list(parallel_rows(small(device), 203, 16, 70, (2, 30)))
    assert len(rows) == (9 if dist.get_rank() == 0 else 0)
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["note"] == "", row
        if row["what"] == "data":
            assert row["length"] == 60 * row["ranks"]
            assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["length"])
        else:
            assert row["error"] < 1e-12, row
    asked = [(what, ranks) for ranks in (1, 2, 4) for what in ("read", "train", "data")]
    assert [(row["what"], row["ranks"]) for row in rows] == asked[: len(rows)]


def _error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours.double() - expected).norm() / expected.norm()).item()


# --- the tests


@pytest.fixture(scope="module")
def gloo():
    ranks = Ranks(__file__, 4, "gloo")
    yield ranks
    ranks.close()


def test_stretches_are_nearly_equal(monkeypatch):
    for world, length in ((1, 7), (3, 10), (4, 7), (4, 3)):
        monkeypatch.setattr(dist, "get_world_size", lambda _, world=world: world)
        cuts = []
        for rank in range(world):
            monkeypatch.setattr(dist, "get_rank", lambda _, rank=rank: rank)
            cuts.append(stretch(length))
            ids, targets = shard(torch.arange(length + 1)[None])
            assert torch.equal(ids + 1, targets) and ids.shape[1] == cuts[-1].stop - cuts[-1].start
        assert cuts[0].start == 0 and cuts[-1].stop == length
        assert all(a.stop == b.start for a, b in zip(cuts, cuts[1:]))
        sizes = [c.stop - c.start for c in cuts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_is_that_of_one_rank(gloo, seed, world, policy):
    random.seed(seed)
    length = random.choice([n for n in range(60, 400) if n % world])
    documents = policy != "start" and random.random() < 0.5
    print(f"{length} tokens, documents: {documents}")
    gloo.run("check_learning", world, policy, length, documents, seed=seed)


@pytest.mark.parametrize("world", [2, 4])
def test_reading_is_that_of_one_rank(gloo, seed, world):
    random.seed(seed)
    gloo.run("check_reading", world, [random.randint(3, 200) for _ in range(world)], seed=seed)


def test_what_cannot_be_followed_is_refused(gloo, seed):
    for world in (2, 4):
        gloo.run("check_refusals", world, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(gloo, seed, dtype):
    gloo.run("check_low_precision", 4, dtype, None, seed=seed)


def test_the_benchmark(gloo, seed):
    gloo.run("check_benchmark", seed=seed)


@pytest.mark.slow
def test_the_fused_scan(gloo, seed):
    """On a CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    gloo.run("check_low_precision", 2, torch.float32, "triton", seed=seed, timeout=300)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_gpus(seed):
    ranks = Ranks(__file__, 2, "nccl")
    try:
        for policy in POLICIES:
            ranks.run("check_learning", 2, policy, 333, policy != "start", seed=seed)
        ranks.run("check_reading", 2, [50, 71], seed=seed)
        for dtype in (torch.float32, torch.bfloat16):
            ranks.run("check_low_precision", 2, dtype, "triton", 20001, seed=seed)
    finally:
        ranks.close()
