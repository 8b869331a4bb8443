"""Linformer against its formula (arXiv 2006.04768), in float64: the paper's layer, and the mixer of chunks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.models import flash
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers import chunk_linformer
from rnn_longctx.models.mixers.chunk_linformer import Linformer
from rnn_longctx.models.restart import Crop
from rnn_longctx.recurrence.span import WHOLE, Span
from rnn_longctx.testing import mixers as contract
from rnn_longctx.train.starts import check_start

TEXT = "chunk-linformer:chunk=6,rank=2,heads=2"
WIDTH, LENGTH, CHUNK = 16, 40, 6


def model(text=TEXT, layers=1):
    return LM(ModelConfig(text, d_model=WIDTH, n_layer=layers, vocab_size=9)).double().eval()


def mixer_of(text=TEXT):
    return model(text).layers[0].mixer


def reading(rows=2, length=LENGTH):
    return torch.randn(rows, length, WIDTH, dtype=torch.float64)


def turn(x, place):
    """x (D) at a place: channels i and i + D / 2 are the parts of a complex number."""
    half = len(x) // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half], x[half:]) * torch.exp(1j * place * rates)
    return torch.cat([z.real, z.imag])


def attended(query, keys, values):
    scores = torch.stack([query @ key for key in keys]) / len(query) ** 0.5
    return sum(weight * value for weight, value in zip(scores.softmax(0), values))


def summed(weights, vectors):
    return sum(weight * vector for weight, vector in zip(weights, vectors))


def definition(mixer, row, limits=None):
    """What a layer gives of one row (T, d_model). limits: {t: the first place that is seen from token t on}."""
    q, k, v = mixer.in_proj(row).unflatten(-1, (3, 2, -1)).unbind(1)  # (T, H, D)
    outputs = []
    completed = [[], []]  # of each head: (first place, key, value)
    limit = 0
    for t in range(len(row)):
        if t in (limits or {}):
            limit = limits[t]
            completed = [[of for of in head if of[0] >= limit] for head in completed]
        heads = []
        for h in range(2):
            own = [s for s in range(t - t % CHUNK, t + 1) if s >= limit]
            keys = [key for _, key, _ in completed[h]] + [turn(k[s, h], s) for s in own]
            values = [value for *_, value in completed[h]] + [v[s, h] for s in own]
            heads.append(attended(turn(q[t, h], t), keys, values))
            if t % CHUNK == CHUNK - 1:
                key_rows, value_rows = (p[:, CHUNK - len(own) :] for p in (mixer.key_proj, mixer.value_proj))
                for of_key, of_value in zip(key_rows, value_rows):
                    key = summed(of_key, [turn(k[s, h], s) for s in own])
                    completed[h].append(
                        (t - CHUNK + 1 if limit <= t - CHUNK + 1 else limit, key, summed(of_value, v[own, h]))
                    )
        outputs.append(mixer.out_proj(torch.cat(heads)))
    return torch.stack(outputs)


def read(mixer, u, sizes):
    carry, outputs = None, []
    for piece in u.split(sizes, 1):
        y, carry = mixer(piece, carry, WHOLE)
        outputs.append(y)
    return torch.cat(outputs, 1)


def by_the_plain_path(monkeypatch, queries=256):
    """Let any rows take it, so many queries at a time."""
    monkeypatch.setattr(chunk_linformer, "readable", lambda q: False)
    monkeypatch.setattr(chunk_linformer, "QUERIES", queries)


@torch.no_grad()
@pytest.mark.parametrize("queries", [None, 1, 7, 256], ids=str)
@pytest.mark.parametrize("sizes", [[LENGTH], [1, 20, LENGTH - 21], [CHUNK, CHUNK, LENGTH - 2 * CHUNK], [1] * LENGTH])
def test_the_mixer_is_its_definition(sizes, queries, seed, monkeypatch):
    if queries:
        by_the_plain_path(monkeypatch, queries)
    mixer, u = mixer_of(), reading()
    expected = torch.stack([definition(mixer, row) for row in u])
    torch.testing.assert_close(read(mixer, u, sizes), expected, rtol=1e-9, atol=1e-9)


def cuts(length, count=4):
    """Return the whole, and pieces cut at random places."""
    for _ in range(count):
        places = sorted({0, length, *torch.randint(1, length, (int(torch.randint(0, 9, ())),)).tolist()})
        yield [b - a for a, b in zip(places, places[1:])]


def read_back(mixer, u, sizes):
    """Return what a layer reads, the carry after it, and gradients of both, through the carries between."""
    u, carry, outputs = u.detach().requires_grad_(), None, []
    for piece in u.split(sizes, 1):
        y, carry = mixer(piece, carry, WHOLE)
        outputs.append(y)
    y, kept = torch.cat(outputs, 1), [carry.keys, carry.values, carry.chunk_keys, carry.chunk_values]
    target = y.pow(3).sum() + sum(x.pow(3).sum() for x in kept)
    gradients = torch.autograd.grad(target, [u, *mixer.parameters()])
    return [y, *kept, *gradients], [carry.held, carry.chunks, carry.position]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("setting", [(2, 1), (6, 2), (7, 7), (16, 4), (40, 3), (64, 8)], ids=str)
def test_kernels_read_what_the_plain_path_does(setting, dtype, tolerance, seed, monkeypatch):
    """Of several rows, cut anywhere, with what is kept and all gradients."""
    mixer, u = (
        mixer_of("chunk-linformer:chunk={},rank={},heads=2".format(*setting)).to(dtype),
        reading(3, 230).to(dtype),
    )
    read_so = [(sizes, *read_back(mixer, u, sizes)) for sizes in ([230], *cuts(230))]
    by_the_plain_path(monkeypatch)
    for sizes, floats, counts in read_so:
        expected, places = read_back(mixer, u, sizes)
        assert all(map(torch.equal, counts, places))
        for a, b in zip(floats, expected, strict=True):
            assert a.dtype == dtype and (a - b).abs().max() <= tolerance * b.abs().amax().clamp(min=1), sizes


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[4096], [1000, 1, 3095], [64] * 64], ids=len)
def test_kernels_are_called_few_times_for_no_pair_too_many(sizes, monkeypatch):
    mixer, attended, pairs = mixer_of("chunk-linformer:chunk=64,rank=8,heads=2"), flash._attended, []

    def counted(q, k, v, causal):
        pairs.append(q.shape[:-2].numel() * q.shape[2] * (k.shape[2] + causal) // (1 + causal))
        return attended(q, k, v, causal)

    monkeypatch.setattr(flash, "_attended", counted)
    read(mixer, reading(1, 4096), sizes)
    assert sum(pairs) == mixer.pairs(4096)
    assert len(pairs) <= sum(5 + 2 * math.log2(1 + size / 64) for size in sizes)


@pytest.mark.parametrize("grad", [False, True])
def test_the_host_waits_for_nothing(grad, monkeypatch):
    """Tensors without numbers are read, too: where the host asked for one, that would raise."""
    monkeypatch.setattr(chunk_linformer, "readable", lambda q: True)
    mixer = mixer_of().to("meta")
    with torch.set_grad_enabled(grad):
        y = read(mixer, torch.empty(2, 100, WIDTH, dtype=torch.float64, device="meta"), [7, 1, 40, 52])
    assert y.shape == (2, 100, WIDTH) and y.requires_grad == grad


@torch.no_grad()
def test_a_token_does_not_copy_the_chunks(seed):
    """Over 600 tokens their keys move a few times, as often as they double."""
    mixer, carry, places = mixer_of(), None, set()
    for token in reading(1, 600).split(1, 1):
        _, carry = mixer(token, carry, WHOLE)
        room, _ = carry.chunk_keys.room
        places.add(id(room.tensor))
        assert carry.chunk_keys.untyped_storage().data_ptr() == room.tensor.data_ptr()
    assert carry.chunk_keys.shape[1] == 100 and len(places) <= math.log2(100) + 2


@torch.no_grad()
def test_a_chunk_that_is_partly_forgotten_is_read_by_the_plain_path(seed):
    """And what comes after it by the kernels."""
    mixer, u = mixer_of(), reading(1)
    _, carry = mixer(u[:, :16], None, WHOLE)
    cropped = carry.cropped(3)
    assert carry.alike and not cropped.alike
    _, after = mixer(u[:, 16:18], cropped, WHOLE)
    assert after.alike and int(after.chunks) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("setting", [(64, 8, 4), (256, 8, 2), (96, 5, 8)], ids=str)
def test_on_a_gpu_in_bfloat16(setting, monkeypatch):
    """The kernels against float64, in one call and in pieces, with gradients; and token by token."""
    monkeypatch.setattr(choose, "FUSED_LAYERS", True)
    config = ModelConfig("chunk-linformer:chunk={},rank={},heads={}".format(*setting), d_model=256, n_layer=1)
    mixer = LM(config).layers[0].mixer.cuda()
    wide, narrow = copy.deepcopy(mixer).double(), copy.deepcopy(mixer).bfloat16()
    x = torch.randn(2, 3000, 256, device="cuda", dtype=torch.bfloat16)
    assert flash.readable(x[..., :32])
    into = torch.randn_like(x)

    def gradients(layer, u, sizes):
        u = u.detach().requires_grad_()
        y = read(layer, u, sizes)
        return [y, *torch.autograd.grad((y * into.to(y.dtype)).sum(), [u, *layer.parameters()])]

    expected = gradients(wide, x.double(), [3000])  # by the plain path: float64 is not the kernels'
    for sizes in ([3000], [1000, 479, 1521]):
        for a, b in zip(gradients(narrow, x, sizes), expected, strict=True):
            assert (a.double() - b).norm() < 0.02 * b.norm()
    with torch.no_grad():
        y = read(narrow, x[:, :700], [600, *[1] * 100]).double()
    assert (y - expected[0][:, :700]).norm() < 0.02 * expected[0][:, :700].norm()


@pytest.mark.parametrize(
    "check",
    [
        contract.check_left_padded_rows_are_rows_alone,
        contract.check_documents_are_documents_alone,
        contract.check_any_cut_is_one_pass,
        contract.check_rows_are_reordered_and_joined,
        contract.check_no_gradient_from_the_future,
    ],
)
def test_the_contract_by_the_plain_path(check, seed, monkeypatch):
    by_the_plain_path(monkeypatch, 9)
    check(TEXT, seed)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[LENGTH], [5, 1, LENGTH - 6]])
def test_with_nothing_projected_away_it_is_full_attention(sizes, seed):
    """Rank c, E and F the identity: every key of a completed chunk is there, and at its place."""
    attention = mixer_of("full-attention:heads=2")
    mixer, u = mixer_of(f"chunk-linformer:chunk={CHUNK},rank={CHUNK},heads=2"), reading()
    mixer.load_state_dict({**attention.state_dict(), "key_proj": torch.eye(CHUNK), "value_proj": torch.eye(CHUNK)})
    torch.testing.assert_close(read(mixer, u, sizes), attention(u, None, WHOLE)[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_chunk_is_read_once_it_is_complete(seed):
    """No projection within the first chunk; from the next token on, of it as a whole."""
    mixer, u = mixer_of(), reading(1)
    before = mixer(u, None, WHOLE)[0]
    mixer.key_proj += 1.0
    mixer.value_proj += 1.0
    off = (mixer(u, None, WHOLE)[0] - before)[0].abs().amax(1)
    assert off[:CHUNK].max() == 0 and off[CHUNK:].min() > 1e-6


@torch.no_grad()
def test_chunks_begin_with_each_document(seed):
    mixer, u, reset = mixer_of(), reading(), torch.zeros(2, LENGTH, dtype=torch.bool)
    reset[0, 9] = reset[1, 20] = reset[1, 21] = True
    y = mixer(u, None, Span(reset=reset))[0]
    for row, lengths in ((0, [9, 31]), (1, [20, 1, 19])):
        expected = torch.cat([definition(mixer, document) for document in u[row].split(lengths)])
        torch.testing.assert_close(y[row], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 3, 8, 13, 30])
@pytest.mark.parametrize("at", [5, 6, 15, 23])
def test_a_carry_forgets_all_but_the_last_tokens(at, tokens, seed):
    mixer, u = mixer_of(), reading()
    _, carry = mixer(u[:, :at], None, WHOLE)
    read_on = []
    carry = carry.cropped(tokens)
    for piece in u[:, at:].split([2, LENGTH - at - 2], 1):
        y, carry = mixer(piece, carry, WHOLE)
        read_on.append(y)
    expected = torch.stack([definition(mixer, row, {at: max(0, at - tokens)})[at:] for row in u])
    torch.testing.assert_close(torch.cat(read_on, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_of_unequal_lengths_forget_by_themselves(seed):
    lm, ids = model(), torch.randint(9, (2, LENGTH))
    caches = [Cache(), Cache()]
    alone = []
    for i, length in enumerate((5, 27)):
        lm(ids[i : i + 1, :length], caches[i])
        other = caches[i].clone()
        other.crop_attention(13)
        alone.append(lm(ids[i : i + 1, 30:], other))
    joined = Cache.concat(caches, [0, 1])
    joined.crop_attention(13)
    torch.testing.assert_close(lm(ids[:, 30:], joined), torch.cat(alone), rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_control_crops_it(seed):
    """Tokens that were forgotten change nothing; those that were not do."""
    lm, ids = model(layers=1), torch.randint(9, (1, 24))
    lm.restart = Crop(4, 4)
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % 9
    off = (lm(ids) - lm(other)).abs().amax((0, 2))
    assert off[5] > 1e-9 and off[12:].max() == 0


@torch.no_grad()
def test_only_distances_count(seed):
    """In float32, ten million tokens on: chunks and angles go by the place."""
    lm, ids = model().float(), torch.randint(9, (1, 30))
    outputs = []
    for before in (0, 6_000_000):
        cache = lm.new_cache(1)
        cache.layers[0].position += before
        outputs.append(torch.cat([lm(piece, cache) for piece in ids.split([11, 1, 18], 1)], 1))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


def test_its_state_grows_with_every_chunk():
    lm = model()
    size = lm.state_size()
    assert size.chunks == {CHUNK: 2 * 2 * WIDTH} and size.windows == {CHUNK - 1: 2 * WIDTH} and size.grows
    assert size.total(600) - size.total(300) == 300 * 2 * WIDTH * 2 // CHUNK
    both = size + model("chunk-linformer:chunk=8,rank=2,heads=2").state_size() + size
    assert (
        both.chunks == {CHUNK: 8 * WIDTH, 8: 4 * WIDTH} and both.total(12) == 2 * size.total(12) + (7 + 2) * 2 * WIDTH
    )
    with pytest.raises(InputError, match="what rows go on from would grow without end"):
        check_start(lm, "previous")


# --- the layer of the paper


@torch.no_grad()
def test_linformer_is_its_definition(seed):
    layer, x = Linformer(WIDTH, 2, LENGTH, 5).double(), reading()
    for row, y in zip(x, layer(x)):
        q, k, v = layer.in_proj(row).unflatten(-1, (3, 2, -1)).unbind(1)
        heads = []
        for h in range(2):
            keys = [summed(weights, k[:, h]) for weights in layer.key_proj]
            values = [summed(weights, v[:, h]) for weights in layer.value_proj]
            heads.append(torch.stack([attended(query, keys, values) for query in q[:, h]]))
        torch.testing.assert_close(y, layer.out_proj(torch.cat(heads, -1)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_linformer_of_full_rank_is_attention_over_the_whole_sequence(seed):
    layer, x = Linformer(WIDTH, 2, LENGTH, LENGTH).double(), reading()
    layer.key_proj.copy_(torch.eye(LENGTH))
    layer.value_proj.copy_(torch.eye(LENGTH))
    q, k, v = layer.in_proj(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.out_proj(expected), rtol=0, atol=1e-10)


@torch.no_grad()
def test_linformer_is_not_causal_and_reads_no_padding(seed):
    layer, x = Linformer(WIDTH, 2, LENGTH, 5).double(), reading()
    y, other = layer(x), x.clone()
    other[:, -1] += 1
    assert ((layer(other) - y).abs().amax((0, 2)) > 1e-9).all()
    mask = torch.arange(LENGTH) < torch.tensor([[25], [LENGTH]])
    torch.testing.assert_close(
        layer(x.masked_fill(~mask[..., None], 1e3), mask)[0, :25], layer(x, mask)[0, :25], rtol=0, atol=1e-10
    )
    torch.testing.assert_close(layer(x, mask)[1], y[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Linformer(WIDTH, 2, 8, 2, causal=True), "no causal form: for language take the mixer chunk-linformer"),
        (lambda: Linformer(WIDTH, 3, 8, 2), "heads that divide d_model, .* got heads = 3, d_model = 16"),
        (lambda: Linformer(WIDTH, 2, 8, 0), "rank = 0"),
        (lambda: Linformer(WIDTH, 2, 8, 2)(torch.zeros(1, 9, WIDTH)), "sequences of 8 tokens, .* got 9"),
        (lambda: mixer_of()(torch.zeros(1, 3, WIDTH), None, Span(shard=object())), "over several ranks"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
