"""RWKV-7 against the formulas of its paper (arXiv 2503.14456), token after token in float64, and what the first layer's
values, which the layers above read, need of a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint as recomputed

from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.rwkv7 import FIRST_VALUES
from rnn_longctx.recurrence.span import WHOLE, Span

WIDTH, SIZE, VOCAB = 12, 4, 23
TIME = f"rwkv7:headdim={SIZE},rank_w=3,rank_a=2,rank_v=3,rank_g=5"
HYBRID = ["mamba2:d_state=4,headdim=8", TIME, "sliding-window:heads=2,window=5", TIME]


@torch.no_grad()
def model(mixer=TIME, layers=3, dtype=torch.float64, **more) -> LM:
    """A model all of whose weights are far from where they begin."""
    lm = LM(ModelConfig(mixer, d_model=WIDTH, n_layer=layers, vocab_size=VOCAB, **more)).to(dtype).eval()
    for name, p in lm.named_parameters():
        if "A_log" not in name:
            p += 0.3 * torch.randn_like(p)
    torch.nn.init.normal_(lm.backbone.embedding.weight)
    return lm


def ids_of(length=40, rows=2):
    return torch.randint(VOCAB, (rows, length))


def norm(x, module):
    if hasattr(module, "bias"):
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight
    return y + module.bias if hasattr(module, "bias") else y


def low_rank(maps, x, between):
    (down, _, up) = maps
    y = up.weight @ between(down.weight @ x)
    return y if up.bias is None else y + up.bias


def time_mixing(m, u, first):
    """What a layer gives of one row u (T, d_model), and its values; first: those of the first layer, or None."""
    heads, state, before = WIDTH // SIZE, torch.zeros(WIDTH // SIZE, SIZE, SIZE).double(), torch.zeros(WIDTH).double()
    outputs, values = [], []
    for t, x in enumerate(u):
        xr, xw, xk, xv, xa, xg = (x + (before - x) * mu for mu in m.mix)
        before = x
        r, k, v = m.r_proj.weight @ xr, m.k_proj.weight @ xk, m.v_proj.weight @ xv
        if first is not None:
            share = torch.sigmoid(low_rank(m.v_lora, xv, lambda h: h))
            v = (1 - share) * v + share * first[t]
        values.append(v)
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank(m.w_lora, xw, torch.tanh)))
        a = torch.sigmoid(low_rank(m.a_lora, xa, lambda h: h))
        g = low_rank(m.g_lora, xg, torch.sigmoid)
        kappa, key = (k * m.k_k).view(heads, SIZE), k * (1 + (a - 1) * m.k_a)
        outs = []
        for h in range(heads):
            channels = slice(h * SIZE, (h + 1) * SIZE)
            unit = kappa[h] / kappa[h].norm()
            transition = torch.diag(decay[channels]) - torch.outer(unit, a[channels] * unit)
            state[h] = state[h] @ transition + torch.outer(v[channels], key[channels])
            y = state[h] @ r[channels]
            y = (y - y.mean()) / (y.var(unbiased=False) + SIZE * 1e-5).sqrt()
            y = y * m.group_norm.weight[channels] + m.group_norm.bias[channels]
            outs.append(y + (r[channels] * m.r_k[h] * key[channels]).sum() * v[channels])
        outputs.append(m.out_proj.weight @ (g * torch.cat(outs)))
    return torch.stack(outputs), torch.stack(values)


def channel_mixing(m, u):
    before = torch.cat([torch.zeros_like(u[:1]), u[:-1]])
    return torch.relu((u + (before - u) * m.mix) @ m.key.weight.T) ** 2 @ m.value.weight.T


@pytest.mark.parametrize("whole", [False, True], ids=["time mixing alone", "as in the paper"])
@torch.no_grad()
def test_the_formulas(whole):
    lm = model([TIME, "rwkv7-ffn:expand=2"], layers=6, norm="layer") if whole else model()
    ids, rows = ids_of(), []
    for row in ids:
        h, first = lm.backbone.embedding.weight[row], None
        for block in lm.layers:
            u = norm(h, block.norm)
            if type(block.mixer).name == "rwkv7":
                out, values = time_mixing(block.mixer, u, first)
                first = values if first is None else first
            else:
                out = channel_mixing(block.mixer, u)
            h = h + out
        rows.append(norm(h, lm.backbone.norm_f))
    torch.testing.assert_close(lm(ids), torch.stack(rows), rtol=1e-9, atol=1e-9)


def test_where_weights_begin():
    """Decays a channel within those of the paper, values of later layers nearer the first's than their own."""
    lm = LM(ModelConfig("rwkv7:headdim=16", d_model=32, n_layer=2, vocab_size=VOCAB))
    for mixer in lm.mixers:
        readings = []
        mixer.tap = readings.append
        lm(ids_of())
        mixer.tap = None
        log_decay = readings[0].gates.log_decay.detach()
        assert float(log_decay.min()) > -math.exp(-0.5) and float(log_decay.max()) < 0
        assert float(log_decay.max() / log_decay.min()) < 0.1, "channels begin apart"
    assert lm.mixers[0].v_lora is None and bool((torch.sigmoid(lm.mixers[1].v_lora[2].bias) > 0.5).all())


# --- the first layer's values


@pytest.mark.parametrize("mixer", [TIME, HYBRID], ids=["all layers", "a hybrid"])
@torch.no_grad()
def test_every_way_to_read(mixer):
    """A stream in pieces, padded rows and documents are what they are alone, of all layers together."""
    lm, ids = model(mixer, layers=4, mlp=1.5), ids_of(30)
    whole, cache = lm(ids), Cache()
    pieces = torch.cat([lm(piece, cache) for piece in ids.split([1, 11, 18], 1)], 1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-9)
    mask, reset = torch.arange(30) >= torch.tensor([[0], [7]]), torch.zeros(2, 30, dtype=torch.bool)
    reset[0, 9] = reset[1, 20] = True
    torch.testing.assert_close(lm(ids, mask=mask)[1:, 7:], lm(ids[1:, 7:]), rtol=0, atol=1e-9)
    documents = lm(ids, reset=reset)
    torch.testing.assert_close(documents[:1, 9:], lm(ids[:1, 9:]), rtol=0, atol=1e-9)
    torch.testing.assert_close(documents[:, :9], whole[:, :9], rtol=0, atol=1e-9)


@torch.no_grad()
def test_layer_by_layer_with_tokens_left_out():
    """Values that are handed up are cut with the tokens; nothing cut, it is the model's own reading."""
    lm, ids = model(), ids_of()
    layers = lm.layer_by_layer()
    tokens = layers.embed(ids)
    for i in range(3):
        tokens = layers.leave(i, layers.enter(i, tokens))
    hidden, cache = layers.finish(tokens, ids.shape[1])
    torch.testing.assert_close(hidden, lm(ids)[:, -1], rtol=0, atol=1e-9)
    following = ids_of(3)
    torch.testing.assert_close(lm(following, cache), lm(torch.cat([ids, following], 1))[:, -3:], rtol=0, atol=1e-9)
    left = torch.tensor([0, 3, 4, 17, 39])
    layers, values = lm.layer_by_layer(), []
    tokens = layers.leave(0, layers.enter(0, layers.embed(ids)))
    lm.mixers[1].tap = lambda reading: values.append(reading.span.shared[FIRST_VALUES])
    layers.leave(1, [t[:, left] for t in layers.enter(1, tokens)])
    assert torch.equal(values[0], tokens[2][:, left])


def test_gradients_where_layers_are_computed_twice():
    """Under gradient checkpointing, and by segments whose carries are handed on."""
    lm, ids = model(), ids_of()

    def gradients(pieces=(40,)):
        lm.zero_grad()
        cache, losses = Cache(), []
        for piece in ids.split(list(pieces), 1):
            losses.append(lm(piece, cache).pow(3).sum())
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for p in lm.parameters()]

    expected = gradients()
    assert all(bool(g.abs().max() > 0) for g in expected)
    runs = [gradients([1, 22, 17])]
    for block in lm.layers:
        block.mixer.forward = lambda u, c, s, f=block.mixer.forward: recomputed(f, u, c, s, use_reentrant=False)
    runs.append(gradients())
    for run in runs:
        for ours, theirs in zip(run, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_nothing_is_left_between_calls():
    lm, ids = model(), ids_of()
    lm.mixers[0](torch.randn(1, 5, WIDTH).double(), None, WHOLE)
    assert WHOLE.shared is None
    for span in (WHOLE, Span(shared={})):
        with pytest.raises(InputError, match="call the model, not the layer"):
            lm.mixers[1](torch.randn(1, 5, WIDTH).double(), None, span)
    with torch.no_grad():
        assert torch.equal(lm(ids), lm(ids))


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    lm, ids = model([TIME, "rwkv7-ffn"], layers=4, dtype=torch.float32, norm="layer", mlp=1.0), ids_of()
    checkpoint.save(lm, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config == lm.config and loaded.weights_hash == lm.weights_hash
    assert torch.equal(loaded(ids), lm(ids))


@pytest.mark.parametrize(
    "data, message",
    [
        ({"mixer": "rwkv7:headdim=5", "d_model": 12}, "d_model = 12 is no multiple of headdim = 5"),
        ({"mixer": "rwkv7:headdim=1"}, "headdim must be at least 2"),
        ({"mixer": "rwkv7:rank_w=0"}, "rank_w must be at least 1"),
        ({"mixer": "rwkv7-ffn:expand=0"}, "expand must be above 0"),
        ({"mixer": "rwkv7", "norm": "batch"}, "norm: expected rms or layer, got 'batch'"),
    ],
)
def test_a_config_that_is_none(data, message):
    with pytest.raises(InputError, match=message):
        model_config(data)
