"""A retrofitted layer computes what its mixer is defined as, on the heads that it takes over; nothing else moves."""

from __future__ import annotations

import math

import pytest
import torch
from decoders import CONFIGS, MIXERS, SPARSE, WHOLE, as_stream, decoder, retrofitted

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.generate import generate
from rnn_longctx.models.retrofit.attention import project
from rnn_longctx.models.retrofit.heads import COS, KEYS, QUERIES, SIN, VALUES
from rnn_longctx.models.retrofit.pooled import softmax_weights, watched
from rnn_longctx.models.saved_state import load_state, save_state
from rnn_longctx.probes.links import links
from rnn_longctx.recurrence.span import Span

# The library's norms are float32, so that a difference of one unit in the last place may come to 1e-7 after them.
CLOSE = {"rtol": 0, "atol": 3e-6}


def tokens(rows=2, length=45):
    return torch.randint(0, 256, (rows, length))


def logits(lm, ids, *args):
    with torch.no_grad():
        return lm.logits(lm(ids, *args))


def layer_inputs(model, ids):
    """What the first layer's attention reads of ids."""
    lm = as_stream(model)
    with torch.no_grad(), watched(lm.attentions[:1]) as seen:
        lm(ids)
    return seen[0]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("mixer", [WHOLE, "longnet:segments=128,dilations=1"])
@pytest.mark.parametrize("heads", ["all", "0,3", "2"])
def test_what_reads_every_token_is_the_full_attention_that_it_takes_over(kind, mixer, heads):
    model, ids = decoder(kind), tokens()
    lm = retrofitted(model, mixer, "0,2", heads)
    torch.testing.assert_close(logits(lm, ids), logits(as_stream(model), ids), **CLOSE)


def test_scaled_angles_and_layers_with_a_window_are_read_as_the_library_does():
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    model, ids = decoder("llama", rope_parameters=scaled), tokens()
    torch.testing.assert_close(logits(retrofitted(model, WHOLE), ids), logits(as_stream(model), ids), **CLOSE)
    lm = retrofitted(decoder("mistral", sliding_window=10), SPARSE, "0,2", "0,1")  # (layer 1 keeps its window)
    cache, whole = lm.new_cache(), logits(lm, ids)
    cut = [logits(lm, ids[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 45))]
    torch.testing.assert_close(torch.cat(cut, 1), whole, **CLOSE)


@pytest.mark.parametrize("heads", ["all", "1,2,3"])
def test_block_sparse_is_dense_attention_under_the_mask_of_its_blocks(heads):
    model, ids = decoder("qwen3"), tokens()
    lm, inputs = retrofitted(model, SPARSE, "0", heads), layer_inputs(model, ids)
    attention, (cos, sin) = lm.retrofitted[0], inputs.angles
    part = attention.parts[0]
    q, k, v = project(attention, inputs.u)
    span = Span(shared={QUERIES: q, KEYS: k, VALUES: v, COS: cos.expand(2, -1, -1), SIN: sin.expand(2, -1, -1)})
    kept = part.kept(inputs.u, None, span).blocks  # (B, H, T, K)
    token = torch.arange(ids.shape[1])
    own = token // 4
    seen = (own[:, None] - own < 2) & (token[:, None] >= token)  # the window: two blocks
    chosen = (own == kept[..., None]).any(3)  # (B, H, T, T)
    weights = softmax_weights(model.model.layers[0].self_attn, inputs, slice(0, ids.shape[1]))
    weights = weights[:, part.of_heads.queries] * (seen | chosen)
    weights = weights / weights.sum(3, keepdim=True)
    values = v.repeat_interleave(2, 2)[:, :, part.of_heads.queries]
    expected = torch.einsum("bhts,bshd->bthd", weights, values)
    y, _ = attention.read(inputs.u, inputs.angles)
    torch.testing.assert_close(y[:, :, part.of_heads.queries], expected, rtol=0, atol=1e-10)
    assert (kept >= 0).any() and not bool(chosen[:, :, -1].all())


@pytest.mark.parametrize("mixer", ["mamba2", "gated-deltanet"])
def test_a_recurrence_is_its_formula(mixer):
    model, ids = decoder("llama"), tokens()
    attention = retrofitted(model, mixer, "0", "0,1,3").retrofitted[0]
    part, u = attention.parts[0], layer_inputs(model, ids).u
    q, k, v = (x[:, :, part.of_heads.queries if i == 0 else slice(None)] for i, x in enumerate(project(attention, u)))
    x = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
    taps = part.conv1d.weight[:, 0]  # (channels, 4)
    x = sum(taps[:, 3 - back] * torch.nn.functional.pad(x, (0, 0, back, 0))[:, : x.shape[1]] for back in range(4))
    q, k, v = x.unflatten(-1, (-1, 8)).split([3, 2, 2], 2)
    k, v = k[:, :, [0, 0, 1]], v[:, :, [0, 0, 1]]
    dt = torch.nn.functional.softplus(u @ part.dt_proj.weight.T + part.dt_bias)
    decay = (-part.A_log.exp() * dt).exp()
    state, read = torch.zeros(2, 3, 8, 8, dtype=torch.float64), []
    if mixer == "gated-deltanet":
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        beta = (u @ part.b_proj.weight.T).sigmoid()
    for t in range(u.shape[1]):
        key, value = k[:, t], v[:, t]
        state = decay[:, t, :, None, None] * state
        write = dt[:, t] if mixer == "mamba2" else beta[:, t]
        if mixer == "gated-deltanet":
            value = value - torch.einsum("bhpn,bhn->bhp", state, key)
        state = state + write[..., None, None] * value[..., None] * key[:, :, None]
        y = torch.einsum("bhpn,bhn->bhp", state, q[:, t]) / math.sqrt(8)
        read.append(y + part.D[:, None] * v[:, t] if mixer == "mamba2" else y)
    expected = torch.stack(read, 1)
    expected = expected / (expected.square().mean(-1, keepdim=True) + part.norm.eps).sqrt() * part.norm.weight
    y, _ = attention.read(u, layer_inputs(model, ids).angles)
    torch.testing.assert_close(y[:, :, [0, 1, 3]], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("heads", ["all", "0,3"])
def test_any_cut_padding_and_the_model_s_own_forward_are_one_pass(mixer, heads):
    model, ids = decoder("qwen3" if heads == "all" else "llama"), tokens()
    lm = retrofitted(model, mixer, "0,2", heads)
    whole = logits(lm, ids)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, whole, **CLOSE)
    cache = lm.new_cache()
    cut = [logits(lm, ids[:, a:b], cache) for a, b in ((0, 1), (1, 18), (18, 19), (19, 45))]
    torch.testing.assert_close(torch.cat(cut, 1), whole, **CLOSE)
    padded, mask = torch.cat([tokens(2, 5), ids], 1), torch.ones(2, 50, dtype=torch.bool)
    mask[:, :5] = False
    torch.testing.assert_close(logits(lm, padded, None, mask)[:, 5:], whole, **CLOSE)


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_are_moved_joined_and_read_apart(mixer):
    lm, ids = retrofitted(decoder("llama"), mixer, "1,2", "0,1"), tokens(3, 30)
    whole, cache = logits(lm, ids), lm.new_cache()
    logits(lm, ids[:, :20], cache)
    again = cache.rows([2, 0])
    torch.testing.assert_close(logits(lm, ids[[2, 0], 20:], again), whole[[2, 0], 20:], **CLOSE)
    short, long = lm.new_cache(), lm.new_cache()
    logits(lm, ids[:1, :9], short), logits(lm, ids[1:, :20], long)
    both = cache.concat([short, long], [1, 0, 2])
    joined = torch.stack([ids[1, 20:26], ids[0, 9:15], ids[2, 20:26]])
    expected = torch.stack([whole[1, 20:26], whole[0, 9:15], whole[2, 20:26]])
    torch.testing.assert_close(logits(lm, joined, both), expected, **CLOSE)
    torch.testing.assert_close(logits(lm, ids[:, 20:], cache), whole[:, 20:], **CLOSE)  # (nothing was shared)


@pytest.mark.parametrize("mixer", [SPARSE, "mamba2"])
def test_it_generates_as_the_library_does_beams_too(mixer):
    lm, ids = retrofitted(decoder("llama"), mixer, "0,2", "0,1"), tokens(1, 17)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        own = lm.model.generate(ids, **how)[0, 17:]
        beams = lm.model.generate(ids, num_beams=3, **how)[0, 17:]
        assert torch.equal(beams, lm.model.generate(ids, num_beams=3, use_cache=False, **how)[0, 17:])
    said = generate(lm, ids[0].numpy(), 8, seed=0)[0].tolist()
    assert said == own.tolist()[: len(said)] and (len(said) == 8 or said[-1] == lm.tokenizer.eos_id)


def test_an_unconverted_layer_is_bit_for_bit_the_original_s():
    model, ids = decoder("mistral"), tokens()
    lm, plain = retrofitted(model, "mamba2", "2"), as_stream(model)
    with torch.no_grad(), watched(lm.attentions) as ours, watched(plain.attentions) as theirs:
        lm(ids), plain(ids)
    for layer in (0, 1):
        assert torch.equal(ours[layer].output, theirs[layer].output)
    assert torch.equal(ours[2].u, theirs[2].u) and not torch.equal(ours[2].output, theirs[2].output)
    assert torch.equal(plain(ids), model.model(ids)[0])


def test_a_remedy_is_on_a_retrofitted_recurrence_in_the_model_s_own_forward_too():
    lm, ids = retrofitted(decoder("llama"), "mamba2", "0,1"), tokens()
    before = logits(lm, ids)
    with mitigate(lm, "rri:alpha=0.9,beta=0.5"):
        on = logits(lm, ids)
        with torch.no_grad():
            torch.testing.assert_close(lm.model(ids).logits, on, **CLOSE)
    assert not torch.allclose(on, before) and torch.equal(logits(lm, ids), before)


def test_it_says_how_much_it_keeps_and_reads():
    model = decoder("llama")
    assert as_stream(model).state_size().per_token == 3 * 2 * 2 * 8
    lm = retrofitted(model, SPARSE, "0")
    cache = lm.new_cache()
    logits(lm, tokens(1, 40), cache)
    leaves: list = []
    from rnn_longctx.recurrence.carry import tree_map

    tree_map(leaves.append, cache.library.layers[0].carry)
    kept = sum(t.numel() for t in leaves if t.is_floating_point())
    of_layer = lm.state_size().total(40) - 2 * 2 * 2 * 8 * 40
    assert kept == of_layer
    assert as_stream(model).read_share(40) == 1
    # of 10 blocks of 4: the window of 2 blocks, a sink and 2 more
    read = sum(min(t // 4, 1) * 4 + t % 4 + 1 + 4 * min(max(0, t // 4 - 1), 3) for t in range(40))
    assert retrofitted(model, SPARSE).read_share(40) == pytest.approx(read / (40 * 41 / 2))


def test_explain_names_the_heads_of_the_layer_and_what_they_read():
    lm, ids = retrofitted(decoder("llama"), SPARSE, "1", "1,3"), tokens(1, 40)
    table = links(lm, ids, [39], segment=7)
    assert set(table["layer"]) == {1} and set(table["head"]) == {1, 3}
    assert set(table["kind"]) == {"sink", "chosen", "window"} and len(table) == 2 * (1 + 2 + 1)


def test_its_state_is_saved_and_a_static_cache_refused(tmp_path):
    lm, ids = retrofitted(decoder("llama"), SPARSE, "0"), tokens(1, 12)
    with pytest.raises(InputError, match="static"):
        lm.model.generate(ids, max_new_tokens=3, cache_implementation="static", pad_token_id=0)
    cache = lm.new_cache()
    logits(lm, ids, cache)
    save_state(tmp_path / "state", cache, lm)
    again = load_state(tmp_path / "state", lm)
    torch.testing.assert_close(logits(lm, ids, again), logits(lm, ids, cache), **CLOSE)
