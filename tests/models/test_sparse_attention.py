"""Block-sparse and two-stage attention against their definition in float64: dense softmax attention under the mask that
the kept blocks say, each token's blocks chosen one by one."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from rnn_longctx.errors import InputError
from rnn_longctx.models import block_reads, checkpoint, sparse
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.block_sparse import BlockSparse
from rnn_longctx.models.restart import Crop
from rnn_longctx.recurrence.span import WHOLE, Span
from rnn_longctx.testing import mixers as contract
from rnn_longctx.train.starts import check_start

WIDTH, LENGTH = 16, 60
TEXTS = [
    "block-sparse:heads=2,block=5,window=10,top=2,gate=3",
    "block-sparse:heads=1,block=4,window=4,sinks=2,top=1,gate=4,positions=none",
    "block-sparse:heads=2,block=6,window=6,sinks=0,top=20,gate=2",  # more than there are
    "two-stage:heads=2,block=5,window=10,top=2",
    "two-stage:heads=4,block=4,window=4,top=1,positions=none",
    "two-stage:heads=1,block=6,window=6,top=20",
    "block-sparse:heads=2,block=5,window=10,top=2,gate=0",  # ablations
    "two-stage:heads=2,block=5,window=10,top=2,coarse=false",
]


def model_of(text, layers=1, width=WIDTH):
    model = LM(ModelConfig(text, d_model=width, n_layer=layers, vocab_size=9)).double().eval()
    torch.nn.init.normal_(model.backbone.embedding.weight)
    for block in model.layers:  # (it begins as a mean)
        if is_plain(block.mixer):
            continue
        torch.nn.init.normal_(block.mixer.pool)
        if isinstance(block.mixer, BlockSparse):
            torch.nn.init.normal_(block.mixer.gate_key)
    return model


def is_plain(mixer):
    """Whether nothing is learned to choose blocks by: without the gate, or without the coarse stage."""
    return not (mixer.config.gate if isinstance(mixer, BlockSparse) else mixer.config.coarse)


def mixer_of(text):
    return model_of(text).layers[0].mixer


def reading(rows=2, length=LENGTH):
    return torch.randn(rows, length, WIDTH, dtype=torch.float64)


def turn(x):
    """x (T, H, D), channels i and i + D / 2 of which are the parts of a complex number, turned by its position."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None, None] * rates
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def definition(mixer, u, limits=None):
    """What a layer makes of one document u (T, d_model), and the blocks that it keeps: lists [head][token] of them, the
    sinks and then the chosen, the best first. limits: the first token that each token may read."""
    c, length, heads = mixer.config, len(u), mixer.config.heads
    limits = limits or [0] * length
    q, k, v = mixer.in_proj(u).unflatten(-1, (3, heads, -1)).unbind(1)  # (T, H, D)
    blocks = [slice(n * c.block, (n + 1) * c.block) for n in range(length // c.block)]
    size = q.shape[2]

    def mean(h, block, x):
        if is_plain(mixer):
            return x[block, h].mean(0)
        return (k[block, h] @ mixer.pool[h] / size**0.5).softmax(0) @ x[block, h]

    def score(h, n):
        summary = mean(h, blocks[n], k)
        if is_plain(mixer) or not isinstance(mixer, BlockSparse):
            return q[:, h] @ summary / size**0.5
        return (q[:, h] @ mixer.gate_query[h]) @ (summary @ mixer.gate_key[h]) / c.gate**0.5

    none = u.new_zeros(length, 0)
    scores = torch.stack(
        [torch.cat([none, *(score(h, n)[:, None] for n in range(len(blocks)))], 1) for h in range(heads)]
    )
    seen, bias, kept = torch.zeros(heads, length, length), torch.zeros(heads, length, length, dtype=u.dtype), []
    for h in range(heads):
        kept.append([])
        for t in range(length):
            own = t // c.block
            readable = [n for n in range(own) if n * c.block >= limits[t]]
            outside = [n for n in readable if n <= own - c.window // c.block]
            first = [n for n in outside if n < mixer.sinks]
            others = sorted((n for n in outside if n >= mixer.sinks), key=lambda n: -scores[h, t, n].item())
            chosen = others[: c.top]
            kept[h].append(first + chosen)
            seen[h, t, max(limits[t], (own - c.window // c.block + 1) * c.block, 0) : t + 1] = 1
            for n in first + chosen:
                seen[h, t, blocks[n]] = 1
            if isinstance(mixer, BlockSparse) and not is_plain(mixer):
                for n in chosen:
                    bias[h, t, blocks[n]] = F.logsigmoid(scores[h, t, n])
    turned = (turn(q), turn(k)) if c.positions == "rope" else (q, k)
    fine = torch.einsum("thd,shd->hts", *turned) / size**0.5 + bias
    y = torch.einsum("hts,shd->thd", fine.masked_fill(seen == 0, -math.inf).softmax(2), v)
    if not isinstance(mixer, BlockSparse) and is_plain(mixer):
        y = mixer.mix(u).sigmoid()[..., None] * y
    elif not isinstance(mixer, BlockSparse):
        begins = torch.arange(len(blocks)) * c.block
        t = torch.arange(length)[:, None]
        readable = (begins + c.block <= t) & (begins >= torch.tensor(limits)[:, None])  # (T, M)
        weights = scores.exp() * readable
        weights = weights / weights.sum(2, keepdim=True).where(readable.any(1)[:, None], 1)
        summaries = [torch.stack([mean(h, block, v) for block in blocks]) for h in range(heads)] if blocks else []
        coarse = torch.stack([weights[h] @ summaries[h] if blocks else y[:, h] * 0 for h in range(heads)], 1)
        of_coarse, of_fine = mixer.mix(u).sigmoid().unflatten(1, (2, heads)).unbind(1)
        y = of_coarse[..., None] * coarse + of_fine[..., None] * y
    return mixer.out_proj(y.flatten(1)), kept


def lists(blocks):
    """blocks (H, T, K) as lists [head][token] without those that are none."""
    return [[[n for n in token if n >= 0] for token in head] for head in blocks.tolist()]


def gradients(mixer, u, y, into):
    inputs = [u, *mixer.parameters()]
    found = torch.autograd.grad((y * into).sum(), inputs, allow_unused=True)  # (of one token, the gate has none)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found)]


def read(mixer, u, sizes, **marks):
    carry, outputs, kept = None, [], []
    for piece, *rest in zip(u.split(sizes, 1), *(mark.split(sizes, 1) for mark in marks.values())):
        span = Span(**dict(zip(marks, rest)))
        kept.append(mixer.kept(piece, carry, span).blocks)
        y, carry = mixer(piece, carry, span)
        outputs.append(y)
    return torch.cat(outputs, 1), torch.cat(kept, 2)


@pytest.mark.parametrize(("queries", "tile"), [(512, 64), (7, 2)])
@pytest.mark.parametrize("text", TEXTS)
def test_it_is_dense_attention_under_the_mask_of_what_is_kept(text, queries, tile, monkeypatch):
    """Gradients too, of everything: the choice apart, which has none."""
    monkeypatch.setattr(sparse, "QUERIES", queries)
    monkeypatch.setattr(sparse, "SCORES", 0)
    monkeypatch.setattr(sparse, "TOGETHER", 3 * queries)
    monkeypatch.setattr(sparse, "TILE", tile)
    monkeypatch.setattr(block_reads, "AT_ONCE", 10 * queries)
    mixer = mixer_of(text)
    for length in (1, 23, random.randrange(40, 61)):
        u = reading(length=length).requires_grad_()
        y, into = mixer(u, None, WHOLE)[0], torch.randn_like(u)
        rows = [definition(mixer, row) for row in u]
        expected = torch.stack([row for row, _ in rows])
        assert [lists(blocks) for blocks in mixer.kept(u).blocks] == [kept for _, kept in rows]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        for a, b in zip(gradients(mixer, u, y, into), gradients(mixer, u, expected, into), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("text", TEXTS)
def test_documents_padding_and_any_cut(text, monkeypatch):
    """Each document by itself is the definition, wherever calls end in it, and so are its gradients."""
    monkeypatch.setattr(sparse, "QUERIES", 13)
    monkeypatch.setattr(sparse, "SCORES", 0)
    monkeypatch.setattr(sparse, "TOGETHER", 26)
    mixer = mixer_of(text)
    starts = [[0, 17, 18, 41], [random.randrange(1, 20)], [random.randrange(20, 50)]]
    mask = torch.arange(LENGTH) >= torch.tensor([row[0] for row in starts])[:, None]
    reset = torch.zeros(3, LENGTH, dtype=torch.bool)
    for row, begins in zip(reset, starts):
        row[begins[1:]] = True
    u = reading(3).requires_grad_()
    into = torch.randn_like(u) * mask[..., None]
    expected, blocks = torch.zeros_like(u), [[] for _ in starts]
    for i, begins in enumerate(starts):
        for begin, end in zip(begins, [*begins[1:], LENGTH]):
            y, kept = definition(mixer, u[i, begin:end])
            expected = expected.index_put((torch.tensor(i), torch.arange(begin, end)), y)
            blocks[i].append(kept)
    wanted = gradients(mixer, u, expected, into)
    marks = sorted(random.choices(range(LENGTH), k=6))
    for sizes in ([LENGTH], [b - a for a, b in zip([0, *marks], [*marks, LENGTH]) if b > a]):
        y, kept = read(mixer, u, sizes, mask=mask, reset=reset)
        torch.testing.assert_close(y * mask[..., None], expected, rtol=0, atol=1e-10)
        for i, begins in enumerate(starts):
            assert lists(kept[i])[0] == [[]] * begins[0] + [t for document in blocks[i] for t in document[0]]
        for a, b in zip(gradients(mixer, u, y, into), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[1], TEXTS[3]])
@pytest.mark.parametrize(("at", "tokens"), [(4, 2), (23, 0), (23, 2), (23, 9), (40, 30), (41, 100)])
def test_a_carry_forgets_all_but_the_last_tokens(text, at, tokens):
    """Blocks begin where they did; one of which a token is forgotten is chosen no more."""
    mixer, u = mixer_of(text), reading(1)
    first, carry = mixer(u[:, :at], None, WHOLE)
    carry, outputs = carry.cropped(tokens), [first]
    assert carry.keys.shape[1] == min(tokens, at)
    for piece in u[:, at:].split([3, LENGTH - at - 3], 1):
        y, carry = mixer(piece, carry, WHOLE)
        outputs.append(y)
    limits = [0] * at + [max(0, at - tokens)] * (LENGTH - at)
    expected = definition(mixer, u[0], limits)[0]
    torch.testing.assert_close(torch.cat(outputs, 1)[0], expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[3]])
def test_rows_of_unequal_lengths_forget_by_themselves(text):
    lm, ids = model_of(text), torch.randint(9, (2, LENGTH))
    caches, alone = [Cache(), Cache()], []
    for i, length in enumerate((5, 37)):
        lm(ids[i : i + 1, :length], caches[i])
        other = caches[i].clone()
        other.crop_attention(17)
        alone.append(lm(ids[i : i + 1, 40:], other))
    joined = Cache.concat(caches, [0, 1])
    joined.crop_attention(17)
    torch.testing.assert_close(lm(ids[:, 40:], joined), torch.cat(alone), rtol=0, atol=1e-9)
    lm.restart = Crop(8, 8)
    other = ids[:1].clone()
    other[:, 5] = (ids[0, 5] + 1) % 9
    off = (lm(ids[:1]) - lm(other)).abs().amax((0, 2))
    assert off[5] > 1e-9 and off[24:].max() == 0


@torch.no_grad()
@pytest.mark.parametrize("text", ["block-sparse:heads=2,block=5,window=10,sinks=0,top=2", TEXTS[3]])
def test_only_distances_count(text):
    """In float32, six million tokens on: blocks and angles go by the place."""
    lm, ids = model_of(text).float(), torch.randint(9, (1, 40))
    outputs = []
    for before in (0, 6_000_000):
        cache = lm.new_cache(1)
        cache.layers[0].position += before
        outputs.append(torch.cat([lm(piece, cache) for piece in ids.split([11, 1, 28], 1)], 1))
        assert cache.layers[0].blocks.item() == 8
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[3]])
def test_what_is_kept_explains_and_scores_are_to_be_had(text):
    mixer, u = mixer_of(text), reading()
    kept = mixer.kept(u)
    scores, allowed = mixer.block_scores(u)
    assert kept.blocks.shape == kept.scores.shape == (2, 2, LENGTH, mixer.sinks + 2)
    assert scores.shape == (2, 2, LENGTH, 12) and allowed.shape == (2, LENGTH, 12)
    for t in range(LENGTH):
        candidates = [n for n in range(12) if mixer.sinks <= n <= t // 5 - 2]
        assert allowed[1, t].nonzero()[:, 0].tolist() == candidates
        chosen = kept.blocks[1, 0, t, mixer.sinks :].tolist()
        assert len([n for n in chosen if n >= 0]) == min(2, len(candidates))
        for n, score in zip(chosen, kept.scores[1, 0, t, mixer.sinks :].tolist()):
            assert score == (0 if n < 0 else pytest.approx(scores[1, 0, t, n].item()))
        left = [scores[1, 0, t, n].item() for n in candidates if n not in chosen]
        assert not left or max(left) <= kept.scores[1, 0, t].where(kept.blocks[1, 0, t] >= mixer.sinks, 9e9).min()


@pytest.mark.parametrize("text", [TEXTS[2], TEXTS[5]])
def test_more_chosen_than_there_are_takes_no_more(text, monkeypatch):
    """Reading holds no room for blocks that are not there; what is kept says that they are not."""
    monkeypatch.setattr(sparse, "QUERIES", 7)
    monkeypatch.setattr(sparse, "SCORES", 0)
    monkeypatch.setattr(sparse, "TOGETHER", 21)
    widths, read_blocks = [], sparse.read_blocks

    def watched(q, blocks, choice, *rest):
        widths.append(choice.index.shape[3])
        return read_blocks(q, blocks, choice, *rest)

    monkeypatch.setattr(sparse, "read_blocks", watched)
    mixer, u = mixer_of(text), reading()
    y, kept = mixer(u, None, WHOLE)[0], mixer.kept(u)
    assert max(widths) == LENGTH // 6 + mixer.sinks and kept.blocks.shape[3] == mixer.sinks + 20
    more = mixer_of(text.replace("top=20", "top=900"))
    more.load_state_dict(mixer.state_dict())
    assert torch.equal(more(u, None, WHOLE)[0], y)
    assert torch.equal(more.kept(u).blocks[..., : mixer.sinks + 20], kept.blocks)
    assert (more.kept(u).blocks[..., mixer.sinks + 20 :] == -1).all()


@pytest.mark.parametrize(
    "text", ["block-sparse:heads=2,block=5,window=5,top=1", "two-stage:heads=2,block=5,window=5,top=1"]
)
def test_the_loss_moves_what_the_choice_is_made_by(text):
    """Every weight that blocks are scored by has a gradient, though the choice has none."""
    mixer = mixer_of(text)
    mixer(reading(), None, WHOLE)[0].square().sum().backward()
    for name in ("pool", "gate_query", "gate_key") if "block" in text.split(":")[0] else ("pool", "in_proj.weight"):
        assert mixer.get_parameter(name).grad.abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "text", ["block-sparse:heads=2,block=16,window=32,top=3", "two-stage:heads=2,block=16,window=32"]
)
def test_reading_what_was_chosen_is_linear(text):
    """Its products beside those of projections and scores; scores are of a 16th of the tokens."""

    def operations(length):
        mixer, u = mixer_of(text), reading(1, length)
        counts = []
        for call in (lambda: mixer(u, None, WHOLE), lambda: mixer.kept(u)):
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops())
        scores = 2 * 2 * WIDTH * length * length // 32  # about so many a half of which two-stage reads as values, too
        return counts[0] - counts[1] - (scores if "two-stage" in text else 0), counts[0]

    (short, _), (long, everything) = operations(512), operations(2048)
    assert long < 4.6 * short, "what is read grows faster than the length"
    assert everything < 2 * 2 * WIDTH * 2048 * 2048, "no less than full attention's products"


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        (lambda scores: scores + torch.randn_like(scores), "of tokens choose what they choose in float64"),
        (lambda scores: scores.round(decimals=1), "of tokens choose what they choose in float64"),
    ],
    ids=["noisy", "rounded"],
)
def test_the_contract_holds_choices_in_bfloat16(scored, message, seed, monkeypatch):
    """Choices that hang on more than the rounding of what was read break it."""
    exact = BlockSparse.scores

    def scores(self, queries, summaries):
        values = exact(self, queries, summaries)
        return values if values.dtype == torch.float64 else scored(values)

    monkeypatch.setattr(BlockSparse, "scores", scores)
    with pytest.raises(AssertionError, match=message):
        contract.check_bfloat16_is_roughly_float64(BlockSparse.examples[0], seed)


@torch.no_grad()
@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[3]])
def test_a_checkpoint_and_a_state_that_grows(text, tmp_path):
    model, ids = model_of(text, layers=2).float(), torch.randint(9, (1, LENGTH))
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == model.config and loaded.weights_hash == model.weights_hash
    assert torch.equal(loaded(ids), model(ids))
    summary = 2 * 3 if "block" in text.split(":")[0] else 2 * WIDTH  # numbers of a layer
    size = model.state_size()
    assert size.per_token == 2 * 2 * WIDTH and size.windows == {4: 2 * WIDTH} and size.chunks == {5: 2 * summary}
    with pytest.raises(InputError, match="what rows go on from would grow without end"):
        check_start(model, "previous")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block-sparse:block=1", "blocks of at least 2 tokens.* got block = 1"),
        ("block-sparse:top=0", "at least 1 chosen block.* top = 0"),
        ("block-sparse:top=-4", "at least 1 chosen block.* top = -4"),
        ("block-sparse:window=0", "a window of a multiple of the block, such as 64, got window = 0 and block = 32"),
        ("block-sparse:window=72", "a multiple of the block, such as 64, got window = 72"),
        ("block-sparse:window=16", "a multiple of the block, .* got window = 16"),
        ("block-sparse:sinks=-1", "no sink block or some.* got sinks = -1"),
        ("block-sparse:gate=-1", "no gate or one of some channels.* gate = -1"),
        ("block-sparse:heads=16", "does not divide into 16 heads of even size"),
        ("block-sparse:positions=alibi", "positions"),
        ("two-stage:heads=0", "two-stage.* at least 1 head.* heads = 0"),
        ("two-stage:top=0", "two-stage.* top = 0"),
        ("two-stage:window=24", "two-stage.* such as 32, got window = 24 and block = 16"),
        ("two-stage:sinks=1", "two-stage has no parameter 'sinks'"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": text, "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)


def test_a_context_over_several_ranks_is_refused():
    with pytest.raises(InputError, match="two-stage cannot be followed where a context is read over several ranks"):
        mixer_of(TEXTS[3])(reading(), None, Span(shard=object()))
