"""LongNet's dilated attention against its definition in float64: one softmax over the multiset of keys that the
patterns give a token."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from longnets import SETTINGS, WIDTH, model_of, multiplicities, spec
from torch.utils.flop_counter import FlopCounterMode

from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint, flash
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers import dilated
from rnn_longctx.models.mixers.longnet import DilatedKeys, LongNetConfig
from rnn_longctx.models.restart import Crop
from rnn_longctx.recurrence.span import WHOLE, Span
from rnn_longctx.testing import mixers as contract

pytestmark = pytest.mark.filterwarnings("ignore:longnet. more is read")


def turned(x: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D), channels i and i + D / 2 of which are the parts of a complex number, turned by its position."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * rates
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def oracle(mixer, u: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """What the layer makes of one document u (B, T, d_model) a row; seen: (T, T), keys that are not forgotten."""
    heads = mixer.config.heads
    q, k, v = mixer.in_proj(u).unflatten(-1, (3, heads, WIDTH // heads)).unbind(2)
    if mixer.config.positions == "rope":
        q, k = turned(q), turned(k)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / (WIDTH // heads) ** 0.5
    counts = multiplicities(mixer.config, u.shape[1])
    weights = counts * scores.exp() * (1 if seen is None else seen)
    total = weights.sum(-1, keepdim=True)
    y = torch.einsum("bhts,bshd->bthd", weights / total.where(total > 0, 1), v)
    return mixer.out_proj(y.flatten(2))


def merged_equally(mixer, u: torch.Tensor) -> torch.Tensor:
    """What the layer makes of u where every pattern has a softmax of its own, and what they read has equal weights."""
    heads, patterns = mixer.config.heads, mixer.config.patterns
    q, k, v = mixer.in_proj(u).unflatten(-1, (3, heads, WIDTH // heads)).unbind(2)
    scores = torch.einsum("bthd,bshd->bhts", turned(q), turned(k)) / (WIDTH // heads) ** 0.5
    total, takes = torch.zeros_like(q), torch.zeros(u.shape[1], heads, 1, dtype=u.dtype)
    for pattern in patterns:
        one = LongNetConfig(heads, str(pattern.segment), str(pattern.dilation))
        counts = multiplicities(one, u.shape[1])
        weights = counts * scores.exp()
        weights = weights / weights.sum(-1, keepdim=True).where(counts.sum(-1, keepdim=True) > 0, 1)
        total = total + torch.einsum("bhts,bshd->bthd", weights, v)
        takes += (counts.sum(-1) > 0).T[..., None]
    return mixer.out_proj((total / takes.clamp(min=1)).flatten(2))


def gradients(mixer, u: torch.Tensor, y: torch.Tensor, into: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad((y * into).sum(), [u, *mixer.parameters()]))


@pytest.fixture(params=["kernels", "plain"])
def path(request, monkeypatch) -> str:
    """Both ways to work a layer out; of the plain one several chunks."""
    if request.param == "plain":
        monkeypatch.setattr(dilated, "readable", lambda q: False)
        monkeypatch.setattr(dilated, "one_softmax", None)
        monkeypatch.setattr(dilated, "CHUNK", 3)
    else:
        monkeypatch.setattr(dilated, "_plain", None)
    return request.param


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_patterns_merged_equally(setting):
    """The ablation: outputs and gradients, in one call and in pieces."""
    mixer = model_of(spec(*setting) + ",merge=equal").layers[0].mixer
    u = torch.randn(2, 47, WIDTH, dtype=torch.float64, requires_grad=True)
    into = torch.randn_like(u)
    expected = merged_equally(mixer, u)
    of_expected = gradients(mixer, u, expected, into)
    outputs, carry = [], None
    for piece in u.split([20, 1, 26], 1):
        y, carry = mixer(piece, carry, WHOLE)
        outputs.append(y)
    for y in (mixer(u, None, WHOLE)[0], torch.cat(outputs, 1)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        for a, b in zip(gradients(mixer, u, y, into), of_expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_one_softmax_over_the_multiset(setting, positions, path):
    """Lengths that segments do not divide; gradients go through the denominators."""
    mixer = model_of(spec(*setting, positions)).layers[0].mixer
    for length in (2, 23, random.randrange(24, 90)):
        u = torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
        y, expected, into = mixer(u, None, WHOLE)[0], oracle(mixer, u), torch.randn_like(u)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        for a, b in zip(gradients(mixer, u, y, into), gradients(mixer, u, expected, into), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_stream_cut_anywhere(setting, monkeypatch):
    """The kernels go on from what is held, at whatever place of a segment a call begins; more than they take at once is
    read in turns."""
    monkeypatch.setattr(flash, "BATCH", 2)
    mixer, length = model_of(spec(*setting)).layers[0].mixer, 100
    r = math.lcm(*(pattern.dilation for pattern in mixer.patterns))
    u = torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
    expected, into = oracle(mixer, u), torch.randn_like(u)
    wanted = gradients(mixer, u, expected, into)
    a_token_a_call = range(1, length)
    for marks in (
        [random.randrange(1, length)],
        [r, 3 * r],
        sorted(random.choices(a_token_a_call, k=4)),
        a_token_a_call,
    ):
        sizes = [b - a for a, b in zip([0, *marks], [*marks, length]) if b > a]
        carry, outputs = None, []
        for piece in u.split(sizes, 1):
            y, carry = mixer(piece, carry, WHOLE)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        for a, b in zip(gradients(mixer, u, y, into), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_all_paths_hold_the_same_carry(setting, monkeypatch):
    """That of the kernels, the plain one, and that of single tokens."""
    mixer, u = model_of(spec(*setting)).layers[0].mixer, torch.randn(1, 120, WIDTH, dtype=torch.float64)
    marks = [0, *sorted(random.sample(range(1, 120), 3))]

    def carries() -> list[DilatedKeys]:
        carry, after = None, []
        for begin, end in zip(marks, [*marks[1:], 120]):
            carry = mixer(u[:, begin:end], carry, WHOLE)[1]
            after.append(carry)
        return after

    by_kernels = carries()
    monkeypatch.setattr(dilated, "readable", lambda q: False)
    carry, by_tokens = None, []
    for token in u.split(1, 1):
        carry = mixer(token, carry, WHOLE)[1]
        by_tokens.append(carry)
    for other in (carries(), [by_tokens[end - 1] for end in [*marks[1:], 120]]):
        for a, b in zip(by_kernels, other, strict=True):
            torch.testing.assert_close(vars(a), vars(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 5, 36, 77, 100])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_pairs_are_counted_without_making_them(setting, length):
    config = LongNetConfig(*setting)
    assert dilated.pairs(config.patterns, config.heads, length) == int(multiplicities(config, length).sum())
    attention = model_of("sliding-window:window=7,heads=2").layers[0].mixer
    seen = sum(max(0, t - 6) <= s <= t for t in range(length) for s in range(length))
    assert attention.pairs(length) == 2 * seen
    assert attention.operations(length) == 8 * WIDTH**2 * length + 4 * 8 * 2 * seen


@torch.no_grad()
def test_a_key_counts_as_often_as_it_is_given():
    """The definition is another one without multiplicities, and with the patterns' average."""
    mixer, u = model_of(spec(1, "4/8", "1/2")).layers[0].mixer, torch.randn(1, 8, WIDTH, dtype=torch.float64)
    counts = multiplicities(mixer.config, 8)
    assert counts[0, 2].tolist() == [2, 1, 2, 0, 0, 0, 0, 0] and counts[0, 7].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert counts[0, 6].tolist() == [1, 0, 1, 0, 2, 1, 2, 0]
    once = oracle(mixer, u) - oracle(mixer, u, 1 / counts[0].clamp(min=1))
    assert once[0, 6].abs().max() > 1e-6 and once[0, 7].abs().max() < 1e-12


@torch.no_grad()
def test_a_token_that_no_pattern_takes_gets_zero():
    mixer, u = model_of(spec(1, "4/8/16", "4/4/8")).layers[0].mixer, torch.randn(1, 20, WIDTH, dtype=torch.float64)
    y = mixer(u, None, WHOLE)[0][0].abs().sum(-1)
    assert [t for t in range(20) if y[t] > 0] == [0, 4, 8, 12, 16] and not y[[1, 2, 3, 5, 18, 19]].any()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_documents_padding_and_any_cut(setting, monkeypatch):
    """Each document by itself is the definition, wherever calls end in it, and so are its gradients."""
    monkeypatch.setattr(dilated, "CHUNK", 3)
    mixer, length = model_of(spec(*setting)).layers[0].mixer, 80
    starts = [[0, 17, 18, 51], [random.randrange(1, 20), 40], [random.randrange(20, 70)]]
    mask = torch.arange(length) >= torch.tensor([row[0] for row in starts])[:, None]
    reset = torch.zeros(3, length, dtype=torch.bool)
    for row, begins in zip(reset, starts):
        row[begins[1:]] = True
    u = torch.randn(3, length, WIDTH, dtype=torch.float64, requires_grad=True)
    into = torch.randn_like(u) * mask[..., None]
    expected = torch.zeros_like(u)
    for i, begins in enumerate(starts):
        for begin, end in zip(begins, [*begins[1:], length]):
            place = torch.tensor(i), torch.arange(begin, end)
            expected = expected.index_put(place, oracle(mixer, u[i, begin:end][None])[0])
    wanted = gradients(mixer, u, expected, into)
    marks = sorted(random.choices(range(length), k=6))
    for sizes in ([length], [1] * length, [b - a for a, b in zip([0, *marks], [*marks, length]) if b > a]):
        carry, outputs = None, []
        for piece, m, r in zip(u.split(sizes, 1), mask.split(sizes, 1), reset.split(sizes, 1)):
            y, carry = mixer(piece, carry, Span(m, r))
            outputs.append(y)
        y = torch.cat(outputs, 1)
        torch.testing.assert_close(y * mask[..., None], expected, rtol=0, atol=1e-10)
        for a, b in zip(gradients(mixer, u, y, into), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("text", [spec(4, "4/12/36", "1/2/3"), spec(2, "3/15/30", "1/5/15"), spec(8, "6/30", "3/5")])
def test_the_contract_beyond_the_longest_segment(text, seed):
    for check in contract.CHECKS:
        if "no_gradient" not in check.__name__ or "3/5" not in text:  # (some tokens hang on nothing)
            check(text, seed)


@torch.no_grad()
def test_what_is_held_does_not_grow():
    model, cache = model_of(spec(4, "4/12/36", "1/2/3"), layers=2), Cache()
    for _ in range(40):
        model(torch.randint(9, (1, 5)), cache)
        assert cache.layers[0].keys.shape == (1, 4, 3 + 5 + 11, 4)
    assert model.state_size().total(10**6) == 2 * 2 * WIDTH * (3 + 5 + 11)
    assert cache.layers[0].position.tolist() == [200]
    for length, tokens in ((36, [0, 0, 0]), (37, [1, 1, 1]), (40, [0, 2, 2]), (47, [3, 5, 4])):  # of head 0
        cache = Cache()
        model(torch.randint(9, (1, length)), cache)
        ends = cache.layers[1].keys[0, 0].abs().sum(-1).split([3, 5, 11])  # zero where that is no token
        assert [int((x > 0).sum()) for x in ends] == tokens and all(
            bool((x[len(x) - n :] > 0).all()) for x, n in zip(ends, tokens)
        )


@torch.no_grad()
def test_cost_is_linear(monkeypatch):
    """Of what the kernels are given, and of the products of the plain path."""
    mixer = model_of(spec(4, "16/64/256", "1/4/16")).layers[0].mixer
    assert mixer.operations(4096) == 4 * mixer.operations(1024)
    given = []
    attended = flash._attended

    def counted(q, k, v, causal):
        given.append(q.shape[:-2].numel() * q.shape[2] * (k.shape[2] + causal) // (1 + causal))
        return attended(q, k, v, causal)

    monkeypatch.setattr(flash, "_attended", counted)
    mixer(torch.randn(1, 4096, WIDTH, dtype=torch.float64), None, WHOLE)
    assert sum(given) == mixer.pairs(4096)
    monkeypatch.setattr(dilated, "readable", lambda q: False)
    with FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, 4096, WIDTH, dtype=torch.float64), None, WHOLE)
    # of a token: 4 projections, and two products with the 31 keys at most that a chunk sees under each pattern
    a_token = 2 * 4 * WIDTH**2 + 2 * 2 * WIDTH * 31 * (1 + 1 / 4 + 1 / 16)
    assert counter.get_total_flops() == pytest.approx(4096 * a_token, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", [(4, "64/256/1024", "1/4/16"), (8, "96/480", "3/5"), (4, "4k", "2")], ids=str)
def test_on_a_gpu_in_bfloat16(setting, monkeypatch):
    """The kernels against float64, in one call and in pieces, with gradients."""
    monkeypatch.setattr(choose, "FUSED_LAYERS", True)
    mixer = LM(ModelConfig(spec(*setting), d_model=256, n_layer=1, vocab_size=9)).layers[0].mixer.cuda()
    wide = copy.deepcopy(mixer).double()
    narrow = copy.deepcopy(mixer).bfloat16()
    x = torch.randn(2, 3000, 256, device="cuda", dtype=torch.bfloat16)
    into = torch.randn_like(x)

    def read(layer, u, sizes):
        u, carry, outputs = u.detach().requires_grad_(), None, []
        for piece in u.split(sizes, 1):
            y, carry = layer(piece, carry, WHOLE)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        return [y, *torch.autograd.grad((y * into.to(y.dtype)).sum(), [u, *layer.parameters()])]

    assert flash.readable(x[..., :64])
    expected = read(wide, x.double(), [3000])  # by the plain path: float64 is not the kernels'
    for sizes in ([3000], [1024, 480, 1496], [1024, 1, 1, 478, 1496]):
        for a, b in zip(read(narrow, x, sizes), expected, strict=True):
            assert (a.double() - b).norm() < 0.02 * b.norm()


@torch.no_grad()
def test_attention_forgets_under_a_control():
    """Segments begin where they did, and what was cropped is read no more."""
    model = model_of(spec(4, "4/12/36", "1/2/3"))
    u, carry, outputs = torch.randn(1, 60, WIDTH, dtype=torch.float64), None, []
    for piece in u.split(6, 1):
        y, carry = model.layers[0].mixer(piece, None if carry is None else carry.cropped(5), WHOLE)
        outputs.append(y)
    t = torch.arange(60)
    expected = oracle(model.layers[0].mixer, u, t >= (t // 6 * 6 - 5)[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-10)
    ids, plain = torch.randint(9, (1, 60)), model(torch.zeros(1, 1, dtype=torch.int64))
    plain, model.restart = model(ids), Crop(6, 5)
    assert (model(ids) - plain).abs().max() > 1e-6
    reset = torch.zeros(1, 7, dtype=torch.bool)
    reset[0, 3] = True
    _, after = model.layers[0].mixer(u[:, :7], carry, Span(reset=reset))
    assert carry.forgotten.item() == 49 and after.forgotten.item() == 0 and after.position.item() == 4


@torch.no_grad()
def test_a_checkpoint(tmp_path):
    model = LM(ModelConfig(["mamba2:d_state=4,headdim=8", "longnet:heads=2,segments=4/32,dilations=1/4"], 16, 2, 20))
    checkpoint.save(model.eval(), tmp_path / "model")
    loaded, ids = checkpoint.load(tmp_path / "model"), torch.randint(20, (1, 30))
    assert model.attends and loaded.config == model.config and loaded.weights_hash == model.weights_hash
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("segments=64/256", "a dilation for every segment length, got 2 in 64/256 and 3 in 1/4/16"),
        ("segments=256/64/1024", "segments must grow, as in 64/256/1024, got 256/64/1024"),
        ("segments=64/64/128", "segments must grow"),
        ("segments=64/256/1000", "a multiple of its dilation, got 1000 and 16"),
        ("segments=a/256/1024", "segments are whole numbers above 0, as in 4/16, got 'a/256/1024'"),
        ("dilations=0/1/2", "dilations are whole numbers above 0, as in 4/16, got '0/1/2'"),
        ("segments=64//1024", "segments are whole numbers"),
        ("segments=-4,dilations=1", "segments are whole numbers above 0, as in 4/16, got -4"),
        ("heads=0", "at least 1 head, got 0"),
        ("heads=3", "does not divide into 3 heads"),
        ("positions=alibi", "positions"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": f"longnet:{settings}", "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)
    assert model_config({"mixer": "longnet:segments=1k,dilations=4", "d_model": WIDTH, "n_layer": 1})
