"""LongNet over several ranks is LongNet on one: outputs, carries and gradients, in float64."""

from __future__ import annotations

import contextlib
import copy
import random
from functools import cache

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.flash import Pattern
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers import dilated
from rnn_longctx.models.mixers.dilated_ranks import Cut, columns, held_here
from rnn_longctx.models.mixers.longnet import LongNetConfig
from rnn_longctx.recurrence.shard import Shard
from rnn_longctx.recurrence.span import Span
from rnn_longctx.train.parallel import reduce_gradients, sequence_parallel, shard, stretch

WIDTH, CLOSE = 16, 1e-10
SETTINGS = [  # (heads, segments, dilations)
    (2, "7", "1"),
    (4, "4/12/36", "1/2/3"),  # every head has a shift of its own
    (2, "6/24/96", "1/4/16"),  # fewer heads than a dilation: positions that no head takes
    (8, "6/30", "3/5"),  # more heads than a dilation; some tokens of a head are taken by no pattern
    (4, "5/20/400", "5/4/8"),  # a segment of which a head takes one token; one over all ranks
    (2, "4/6/200", "1/1/2"),  # segments that lie across each other's ends
]

pytestmark = pytest.mark.filterwarnings("ignore:longnet. more is read")


def spec(heads: int, segments: str, dilations: str) -> str:
    return f"longnet:heads={heads},segments={segments},dilations={dilations}"


@cache
def groups(world: int) -> dist.ProcessGroup | None:
    """This rank's group of `world` ranks; the others have theirs."""
    size = dist.get_world_size()
    made = [dist.new_group(list(range(first, first + world))) for first in range(0, size, world)]
    return None if world == size else made[dist.get_rank() // world]


def model_of(mixer: str | list[str], device: torch.device, layers: int = 1) -> LM:
    model = LM(ModelConfig(mixer, d_model=WIDTH, n_layer=layers, vocab_size=9)).to(device, torch.float64)
    torch.nn.init.normal_(model.backbone.embedding.weight)
    return model


@contextlib.contextmanager
def way(kernels: bool):
    """Work layers out by the kernels, or by plain products, several chunks of them."""
    before = dilated.readable, dilated.CHUNK
    if not kernels:
        dilated.readable, dilated.CHUNK = (lambda q: False), 3
    try:
        yield
    finally:
        dilated.readable, dilated.CHUNK = before


def assert_same(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        ours, expected, rtol=CLOSE, atol=CLOSE, msg=lambda text: f"{what}, rank {dist.get_rank()}: {text}"
    )


# --- run on every rank


def check_layer(device: torch.device, world: int, setting: tuple, calls: list[list[int]], kernels: bool) -> None:
    """A stream in calls, each of the given tokens on every rank; with a loss of all outputs and the last carry."""
    with way(kernels):
        group, mixer = groups(world), model_of(spec(*setting), device).layers[0].mixer
        rank, inputs = dist.get_rank(group), []
        for lengths in calls:
            inputs.append(torch.randn(2, sum(lengths), WIDTH, dtype=torch.float64, device=device))
        into = [torch.randn_like(u) for u in inputs]

        def read(spread: bool):
            carry, outputs, loss, read = None, [], 0.0, []
            mixer.zero_grad()
            for lengths, u, g in zip(calls, inputs, into):
                own, span = slice(None), Span()
                if spread:
                    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
                    since = torch.full((world, 2), -1)
                    span = Span(shard=Shard(group, rank, lengths, since, torch.tensor(rank == 0)))
                read.append(u[:, own].clone().requires_grad_())
                y, carry = mixer(read[-1], carry, span)
                outputs.append(y)
                loss = loss + (y * g[:, own]).sum()
            if spread:
                uses = rank == world - 2  # its gradient is the sum of what ranks do with it: here one alone uses it
                loss = loss + uses * marked(carry)
            else:
                loss = loss + marked(carry)
            loss.backward()
            if spread:
                reduce_gradients(mixer, group)
            grads = {n: p.grad.clone() for n, p in mixer.named_parameters()}
            return outputs, carry, [u.grad for u in read], grads

        def marked(carry) -> torch.Tensor:
            marks = torch.arange(carry.keys.shape[2] * carry.keys.shape[3], dtype=torch.float64, device=device)
            marks = (marks * 0.7).sin().view(carry.keys.shape[2:])
            return ((carry.keys + carry.values.square()) * marks).sum()

        (alone, after, du, grads), (ours, own_after, own_du, own_grads) = read(False), read(True)
        for i, lengths in enumerate(calls):
            own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
            assert_same(ours[i], alone[i][:, own], f"outputs of call {i}")
            assert_same(own_du[i], du[i][:, own], f"gradient of the inputs of call {i}")
        assert torch.equal(own_after.position, after.position) and not own_after.forgotten.any()
        for name in ("keys", "values"):
            assert_same(getattr(own_after, name), getattr(after, name), name)
        for name, grad in grads.items():
            assert grad.norm() > 0
            assert_same(own_grads[name], grad, name)


def check_held(device: torch.device, lengths: list[int]) -> None:
    """Before each rank's first token stands what a stream of all tokens before it holds, and nothing else."""
    rank = dist.get_rank()
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    for heads, *texts in SETTINGS:
        patterns = LongNetConfig(heads, *texts).patterns
        k, v = torch.randn(2, 2, sum(lengths), heads, 3, dtype=torch.float64, device=device)
        none = [(k.new_zeros(2, heads, p.memory, 3),) * 2 for p in patterns]
        shared = Shard(None, rank, lengths, torch.full((4, 2), -1), torch.tensor(rank == 0))
        held = held_here(k[:, own], v[:, own], none, Cut.of(shared, 0, patterns))
        for pattern, (empty, _), pair in zip(patterns, none, held):
            for x, ours in zip((k, v), pair):
                expected = dilated._held_after(x[:, : own.start], empty, pattern, 0) if rank else empty
                assert torch.equal(ours, expected)


def check_model(device: torch.device, world: int, mixers: list[str], length: int) -> None:
    """Training and a stream over ranks, layers of LongNet between recurrent ones too."""
    group, model = groups(world), model_of(mixers, device, 2)
    ids = torch.randint(9, (2, length + 1), device=device)
    alone = copy.deepcopy(model)
    (alone.losses(alone(ids[:, :-1]), ids[:, 1:]).sum() / ids[:, 1:].numel()).backward()
    inputs, targets = shard(ids, group)
    with sequence_parallel(model, group):
        (model.losses(model(inputs), targets).sum() / ids[:, 1:].numel()).backward()
    reduce_gradients(model, group)
    for (name, ours), expected in zip(model.named_parameters(), alone.parameters()):
        assert_same(ours.grad, expected.grad, name)
    held, once = Cache(), Cache()
    with torch.inference_mode():
        expected = alone(ids, once)
        begin = 0
        for piece in ids[:, :-1].tensor_split(3, 1):
            with sequence_parallel(model, group):
                own = stretch(piece.shape[1], group)
                hidden = model(piece[:, own], held)
            assert_same(hidden, expected[:, begin : begin + piece.shape[1]][:, own], "hidden states")
            begin += piece.shape[1]
        assert_same(model(ids[:, -1:], held), expected[:, -1:], "what goes on alone")
        assert held.position.tolist() == once.position.tolist()


def check_what_travels(device: torch.device) -> None:
    """One exchange a layer where a segment goes over ranks, of as many numbers as `Cut` says; none elsewhere."""
    rank, sent, exchange, others = dist.get_rank(), [], dist.all_to_all_single, (dist.broadcast, dist.reduce)

    def counted(received, given, *args, **kwargs):
        sent.append((given.numel(), received.numel()))
        return exchange(received, given, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        for segments, dilations, rows in (
            ("8/32", "1/4", [0, 0, 0, 0]),  # each within a rank
            ("8/64", "1/4", [0, 8, 0, 8]),  # over pairs of ranks
            ("8/32/128", "1/4/8", [0, 4, 8, 12]),  # over all
        ):
            dist.broadcast = dist.reduce = None  # all segments end with the call: nobody holds anything then
            mixer, sent[:] = model_of(spec(2, segments, dilations), device).layers[0].mixer, []
            shared = Shard(None, rank, [32] * 4, torch.full((4, 3), -1), torch.tensor(rank == 0))
            u = torch.randn(3, 32, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
            y, carry = mixer(u, None, Span(shard=shared))
            y.sum().backward()
            assert not carry.keys.any()
            each = 3 * 2 * 2 * WIDTH // 2  # rows, keys and values, heads, channels
            assert Cut.of(shared, 0, mixer.patterns).rows_received(rank) == rows[rank]
            if any(rows):
                assert [received for _, received in sent] == [each * rows[rank], sent[0][0]], sent
                assert sent[1][0] == sent[0][1], "the gradients go back the same way"
            else:
                assert not sent
    finally:
        dist.all_to_all_single, (dist.broadcast, dist.reduce) = exchange, others


def check_refusals(device: torch.device) -> None:
    model, ids = model_of(spec(2, "8/32", "1/4"), device), torch.randint(9, (2, 8))
    with sequence_parallel(model):
        with pytest.raises(InputError, match="one document a row"):
            model(ids, reset=torch.zeros(2, 8, dtype=torch.bool))
        with pytest.raises(InputError, match="padding cannot"):
            model(ids, mask=torch.arange(8)[None].expand(2, -1) > 1)
        with pytest.raises(InputError, match="16 tokens in 2 segments of 8 are read by at most as many ranks, got 4"):
            model(ids[:, :4])
        with pytest.raises(InputError, match=r"must hold 1 tokens or more.* 0\]"):
            model(ids[:, : 3 - dist.get_rank()])
    cache = Cache()
    mask = torch.arange(8) >= torch.tensor([[0], [3]])
    model(ids, cache, mask)
    with sequence_parallel(model), pytest.raises(InputError, match="all rows of as many tokens"):
        model(ids, cache)
    other = model_of("full-attention:heads=2", device)
    with pytest.raises(InputError, match=r"attention layers \(full-attention\)"), sequence_parallel(other):
        pass


def check_benchmark(device: torch.device) -> None:
    from rnn_longctx.eval.bench import parallel_longnet as ranked  # and all tables and plots

    ranked.REPEATS = 1
    layer = ranked.layer_of(spec(2, "8/32/128", "1/4/8"), 128, WIDTH).to(device, torch.float64)
    rows = list(ranked.longnet_rows(layer, 128))
    figures = [(row["what"], row["length"], row["ranks"], row["bytes_a_token"]) for row in rows]
    assert figures == [] if dist.get_rank() else figures == [
        *(("forward", 32, 1, 0), ("both", 32, 1, 0)),
        *(("forward", 64, 1, 0), ("forward", 64, 2, 8 * 2 * WIDTH * 4 / 32)),
        *(("both", 64, 1, 0), ("both", 64, 2, 8 * 2 * WIDTH * 4 / 32)),
        *(("forward", 128, 1, 0), ("forward", 128, 4, 8 * 2 * WIDTH * 12 / 32)),
        *(("both", 128, 1, 0), ("both", 128, 4, 8 * 2 * WIDTH * 12 / 32)),
    ]  # fmt: skip
    for row in rows:
        assert row["seconds"] > 0 and row["note"] == "", row
        if row["ranks"] > 1:
            assert row["error"] < 1e-12, row
            (first,) = [r for r in rows if r["what"] == row["what"] and r["length"] == 32]
            (alone,) = [
                r for r in rows if r["what"] == row["what"] and r["length"] == row["length"] and r["ranks"] == 1
            ]
            assert row["efficiency"] == pytest.approx(first["seconds"] / row["seconds"])
            assert row["of_ideal"] == pytest.approx(alone["seconds"] / row["seconds"] / row["ranks"])
    with pytest.raises(InputError, match="16 tokens in 2 segments of 8 are read by at most as many ranks, got 4"):
        next(ranked.longnet_rows(layer, 16))
    with pytest.raises(InputError, match="24 tokens in 3 segments of 8"):
        next(ranked.longnet_rows(layer, 27))  # shares of 6: the fourth segment is none that is read


def check_half_precision(device: torch.device) -> None:
    """On the kernels, in bfloat16: nearly as far from float64 as one rank is."""
    choose.FUSED_LAYERS = True
    world, rank = dist.get_world_size(), dist.get_rank()
    text = "longnet:heads=4,segments=256/1k/8k,dilations=1/4/16"
    exact = LM(ModelConfig(text, d_model=256, n_layer=1, vocab_size=9)).layers[0].mixer.to(device, torch.float64)
    narrow = copy.deepcopy(exact).bfloat16()
    lengths = [3000 + 17 * i for i in range(world)]
    u = torch.randn(2, sum(lengths), 256, device=device, dtype=torch.bfloat16)
    into, own = torch.randn_like(u), slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    shared = Shard(None, rank, lengths, torch.full((world, 2), -1), torch.tensor(rank == 0, device=device))

    def read(layer, tokens: slice, span: Span) -> list[torch.Tensor]:
        layer.zero_grad()
        x = u[:, tokens].to(layer.in_proj.weight.dtype).requires_grad_()
        y = layer(x, None, span)[0]
        (y * into[:, tokens].to(y.dtype)).sum().backward()
        if span.shard is not None:
            reduce_gradients(layer)
        return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]

    expected, alone = read(exact, slice(None), Span()), read(narrow, slice(None), Span())
    ours = read(narrow, own, Span(shard=shared))
    for i, (a, one, b) in enumerate(zip(ours, alone, expected, strict=True)):
        one, b = (one[:, own], b[:, own]) if i < 2 else (one, b)
        assert (a.double() - b).norm() < 2 * (one.double() - b).norm() + 0.002 * b.norm(), i


# --- the tests


@pytest.fixture(scope="module")
def gloo():
    ranks = Ranks(__file__, 4, "gloo")
    yield ranks
    ranks.close()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_layer_over_ranks_is_that_of_one(gloo, seed, setting, world, kernels):
    """Of shards of any lengths, equal or not, that end inside segments; and of a stream in calls."""
    random.seed(seed)
    each = random.choice([24, 25, 48])
    uneven = [[random.randint(1, 60) + 12 for _ in range(world)] for _ in range(2)]
    for calls in ([[each] * world], uneven, [[1, *[30] * (world - 1)]], [[30] * (world - 1) + [1]]):
        print(calls)
        gloo.run("check_layer", world, setting, calls, kernels, seed=seed)


def test_what_is_held_before_a_shard(gloo, seed):
    random.seed(seed)
    for _ in range(3):
        gloo.run("check_held", [random.randint(8, 50) for _ in range(4)], seed=seed)


@pytest.mark.parametrize("world", [2, 4])
def test_a_model_over_ranks_is_that_of_one(gloo, seed, world):
    random.seed(seed)
    longnet = spec(4, "4/16/64", "1/2/8")
    for mixers in ([longnet], [longnet, "mamba2:d_state=4,headdim=8"]):
        gloo.run("check_model", world, mixers, random.randint(150, 260), seed=seed)


def test_what_travels(gloo, seed):
    gloo.run("check_what_travels", seed=seed)


def test_the_benchmark(gloo, seed):
    gloo.run("check_benchmark", seed=seed)


def test_what_the_benchmark_does_not_take(monkeypatch):
    from rnn_longctx.eval.bench.parallel import bench_parallel
    from rnn_longctx.eval.bench.parallel_longnet import geometric

    assert geometric(2**20) == (
        "longnet:heads=8,segments=2048/8192/32768/131072/524288/1048576,dilations=1/4/16/64/256/1024"
    )
    assert geometric(5000) == "longnet:heads=8,segments=2048/5000,dilations=1/4"
    assert geometric(5001) == "longnet:heads=8,segments=2048/5004,dilations=1/4"
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for settings, message in (
        ({"mixer": "longnet"}, "a process for each rank: torchrun .* --mixer longnet"),
        ({"mixer": "gla"}, "expected mamba2 or longnet, got 'gla'"),
        ({"mixer": "longnet:segments=8/4,dilations=1/2"}, "segments must grow"),
        ({"mixer": "longnet", "length": "-3"}, "a positive whole number"),
        ({}, "CUDA devices and a process for each rank"),
    ):
        with pytest.raises(InputError, match=message):
            next(bench_parallel(**settings))


def test_what_cannot_be_followed_is_refused(gloo, seed):
    gloo.run("check_refusals", seed=seed)


def test_columns_are_where_tokens_stand():
    """Against the positions of what is held: none is left out, and of the outer columns only."""
    for w, r in ((12, 3), (20, 1), (16, 8), (8, 8)):
        pattern = Pattern(w, r)
        for _ in range(60):
            end = random.randint(1, 60)
            begin, last = sorted(random.choices(range(end + 1), k=2))
            position = dilated.taken_before(pattern, 2 * r, end, torch.device("cpu"))
            inside = (position >= max(begin, end // w * w)) & (position < last)
            found = columns(pattern, end, begin, last)
            assert not inside[:, : found.start].any() and not inside[:, found.stop :].any()
            assert int(inside.any(0).sum()) >= found.stop - found.start - 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_gpus(seed):
    ranks = Ranks(__file__, 2, "nccl")
    try:
        for setting in SETTINGS:
            ranks.run("check_layer", 2, setting, [[41, 37], [30, 53]], False, seed=seed)
        ranks.run("check_model", 2, [spec(4, "4/16/64", "1/2/8"), "mamba2:d_state=4,headdim=8"], 201, seed=seed)
        ranks.run("check_half_precision", seed=seed)
    finally:
        ranks.close()
