"""Linformer against its formula (arXiv 2006.04768), in float64: the paper's layer, and the mixer of chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig, model_config
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


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 7, 256])
@pytest.mark.parametrize("sizes", [[LENGTH], [1, 20, LENGTH - 21], [CHUNK, CHUNK, LENGTH - 2 * CHUNK], [1] * LENGTH])
def test_the_mixer_is_its_definition(sizes, queries, seed, monkeypatch):
    monkeypatch.setattr(chunk_linformer, "QUERIES", queries)
    mixer, u = mixer_of(), reading()
    expected = torch.stack([definition(mixer, row) for row in u])
    torch.testing.assert_close(read(mixer, u, sizes), expected, rtol=1e-9, atol=1e-9)


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
def test_the_contract_with_few_queries_at_once(check, seed, monkeypatch):
    monkeypatch.setattr(chunk_linformer, "QUERIES", 9)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunk-linformer:chunk=1", "a chunk of at least 2 tokens.*got chunk = 1"),
        ("chunk-linformer:rank=0", "a rank from 1 to the chunk.*rank = 0"),
        ("chunk-linformer:chunk=4,rank=5", "a rank from 1 to the chunk.*chunk = 4, rank = 5"),
        ("chunk-linformer:heads=16", "does not divide into 16 heads of even size"),
        ("linformer", "no causal form: for language take the mixer chunk-linformer"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": text, "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 7, 30])
def test_operations_are_those_of_the_products(length):
    """Two for each multiplication and addition; keys that are masked are not counted."""
    d, heads, chunk, rank = 16, 2, 7, 3
    spec = f"chunk-linformer:chunk={chunk},rank={rank},heads={heads}"
    mixer = LM(ModelConfig(spec, d_model=d, n_layer=1)).layers[0].mixer
    pairs = heads * sum(t % chunk + 1 + rank * (t // chunk) for t in range(length))
    assert mixer.pairs(length) == pairs
    maps = 2 * 2 * rank * chunk * d * (length // chunk)  # of keys and of values
    assert mixer.operations(length) == 2 * 4 * d * d * length + 2 * 2 * d // heads * pairs + maps
