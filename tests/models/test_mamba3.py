"""Mamba-3 against its formulas (arXiv 2603.15569), token after token in float64, and against mamba-ssm's figures."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.mamba3 import TURN, _angles
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.span import WHOLE, Span

WIDTH, LENGTH, VOCAB = 16, 40, 23
TEXTS = [
    "mamba3:d_state=8,headdim=4,ngroups=2",
    "mamba3:d_state=6,headdim=8",  # a quarter of the channels in pairs, 3, is an odd number: one pair is turned
    "mamba3:d_state=6,headdim=16,rope_fraction=1",
]

# What mamba-ssm 2.3.2.post1's Mamba3(8, d_state=8, headdim=4) gives of `waves`: the last output, the norms of its
# states and the first angle of each head, by its `step` with the PyTorch references of its kernels, in float64.
THEIRS = {
    0.5: (
        [[0.302907693787, -0.520907572319, 0.44235220483, 0.488547754677],
         [-0.0632156381085, 0.980515791758, -0.171633502935, 0.129219485249]],
        [1.3080946967, 1.57988161005, 7.31015460962, 5.73862236863],
    ),
    1.0: (
        [[1.04601737413, -1.38504937979, 1.21495478452, 1.77485662343],
         [0.0481141833519, 3.02498180283, 0.292370680436, 0.263485240113]],
        [1.24881886956, 1.52198446578, 5.80185298753, 5.64179615845],
    ),
}  # fmt: skip
THEIR_ANGLES = [-38.1991393268, -42.9724235799, -23.5525613236, 19.32985812]


@torch.no_grad()
def model(text=TEXTS[0], layers=1, dtype=torch.float64) -> LM:
    """A model whose weights are all far from where they begin."""
    lm = LM(ModelConfig(text, d_model=WIDTH, n_layer=layers, vocab_size=VOCAB)).to(dtype).eval()
    for p in lm.parameters():
        p += 0.3 * torch.randn_like(p)
    return lm


def reading(rows=2):
    return torch.randn(rows, LENGTH, WIDTH, dtype=torch.float64)


def norm(x, weight):
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def turned(x, angle):
    """x (N) with its first pairs as complex numbers, times exp(i angle)."""
    pairs = torch.view_as_complex(x[: 2 * len(angle)].view(-1, 2)) * torch.exp(1j * angle)
    return torch.cat([torch.view_as_real(pairs).flatten(), x[2 * len(angle) :]])


def definition(m, u):
    """What a layer gives of one row u (T, d_model), and its states h (H, P, N) after every token."""
    heads, size, N, groups = m.heads, m.headdim, m.d_state, m.config.ngroups
    sizes = [WIDTH * 2, WIDTH * 2, groups * N, groups * N, heads, heads, heads]
    h, angle = torch.zeros(heads, size, N).double(), torch.zeros(heads, m.config.angles).double()
    x_before, k_before = torch.zeros(heads, size).double(), torch.zeros(heads, N).double()
    outputs, states = [], []
    for row in u:
        z, x, B, C, dt, rate, share, turn = (m.in_proj.weight @ row).tensor_split(torch.tensor(sizes).cumsum(0))
        z, x, B, C = z.view(heads, size), x.view(heads, size), B.view(groups, N), C.view(groups, N)
        y = torch.zeros(heads, size).double()
        for head in range(heads):
            group = head * groups // heads
            step = F.softplus(dt[head] + m.dt_bias[head])
            decay = torch.exp(-step * max(F.softplus(rate[head]), 1e-4))
            now = torch.sigmoid(share[head])
            angle[head] += math.pi * step * torch.tanh(turn)
            k = turned(norm(B[group], m.B_norm.weight) + m.B_bias[head, 0], angle[head])
            q = turned(norm(C[group], m.C_norm.weight) + m.C_bias[head, 0], angle[head])
            before = (1 - now) * step * decay * torch.outer(x_before[head], k_before[head])
            h[head] = decay * h[head] + before + now * step * torch.outer(x[head], k)
            x_before[head], k_before[head] = x[head], k
            y[head] = h[head] @ q + m.D[head] * x[head]
        outputs.append(m.out_proj.weight @ (y * F.silu(z)).flatten())
        states.append(h.clone())
    return torch.stack(outputs), torch.stack(states)


def states_of(mixer, carry):
    """The h (B, H, P, N) that a carry stands for: what the scan holds, and what the last token wrote at once."""
    last = carry.conv[..., 0].unflatten(1, (mixer.heads, -1))
    x, k, now = last.split([mixer.headdim, mixer.d_state, 1], -1)
    return carry.scan.state + (now * x)[..., None] * k[..., None, :]


@pytest.mark.parametrize("sizes", [[LENGTH], [1, 18, 1, LENGTH - 20]])
@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_the_formulas(text, sizes):
    mixer, u, carry = model(text).layers[0].mixer, reading(), None
    mixer.in_proj.weight[sum(mixer.parts[:5])] *= 100  # the first head's rates: the lowest one, and very high ones
    outputs, states = (torch.stack(of_rows) for of_rows in zip(*(definition(mixer, row) for row in u)))
    place = 0
    for piece in u.split(sizes, 1):
        y, carry = mixer(piece, carry, WHOLE)
        torch.testing.assert_close(y, outputs[:, place : place + piece.shape[1]], rtol=1e-9, atol=1e-9)
        place += piece.shape[1]
        torch.testing.assert_close(states_of(mixer, carry), states[:, place - 1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def waves(shapes):
    """Weights and inputs that no random numbers make."""
    for k, weight in enumerate(shapes):
        places = torch.arange(weight.numel(), dtype=torch.float64)
        weight.copy_((0.8 * torch.sin(0.37 * places**1.5 + k)).view_as(weight))
    return torch.cos(0.53 * torch.arange(30 * 8, dtype=torch.float64) ** 1.2).view(1, 30, 8)


@pytest.mark.parametrize("fraction", THEIRS)
@torch.no_grad()
def test_mamba_ssm_computes_the_same(fraction):
    text = f"mamba3:d_state=8,headdim=4,rope_fraction={fraction:g}"
    mixer = LM(ModelConfig(text, d_model=8, n_layer=1, vocab_size=VOCAB)).double().layers[0].mixer
    weights = dict(mixer.named_parameters())
    y, carry = mixer(waves([weights[name] for name in sorted(weights)]), None, WHOLE)
    output, norms = (torch.tensor(figures, dtype=torch.float64) for figures in THEIRS[fraction])
    torch.testing.assert_close(y[0, -1].view(2, 4), output, rtol=0, atol=1e-9)
    torch.testing.assert_close(states_of(mixer, carry)[0].flatten(1).norm(dim=1), norms, rtol=0, atol=1e-9)
    angles = torch.tensor(THEIR_ANGLES, dtype=torch.float64) % TURN
    torch.testing.assert_close(carry.angle[0, :, 0], angles, rtol=0, atol=1e-9)


@torch.no_grad()
def test_where_weights_begin():
    """As mamba-ssm's: steps between 0.001 and 0.1, biases and norms of 1."""
    mixer = LM(ModelConfig("mamba3:d_state=8,headdim=2", d_model=64, n_layer=4, vocab_size=VOCAB)).layers[0].mixer
    steps = F.softplus(mixer.dt_bias)
    assert 0.99e-3 < float(steps.min()) < 5e-3 and 0.03 < float(steps.max()) < 0.101
    assert float(steps.log().mean()) == pytest.approx(math.log(1e-2), abs=1.0)
    for name in ("B_bias", "C_bias", "D", "B_norm.weight", "C_norm.weight"):
        assert bool((mixer.get_parameter(name) == 1).all()), name
    gates = mixer.inputs(torch.zeros(1, 2, 64), None, WHOLE)[1]  # what the text adds is around 0
    torch.testing.assert_close(gates.log_decay[0, 1], -steps * math.log(2))
    torch.testing.assert_close(gates.input_scale[0, 1], torch.exp(-steps * math.log(2)) * steps)


# --- angles


def test_angles_are_as_exact_after_a_million_tokens():
    """Sums of float32 turns, in calls of unequal length, against whole numbers."""
    turn = torch.full((1, 1_000_000, 1, 1), 0.3, dtype=torch.float32)
    numerator, denominator = turn[0, 0, 0, 0].item().as_integer_ratio()
    angle = None
    for piece in turn.split([1, 4096, 700_000, 295_903], 1):
        angle = _angles(piece, angle, None)[:, -1]
    expected = math.fmod(1_000_000 * numerator / denominator, TURN)
    assert math.sin((angle.item() - expected) / 2) == pytest.approx(0, abs=1e-8)


@torch.no_grad()
def test_angles_begin_anew_with_a_document():
    """So that a document that begins from a stored state reads it as one that is alone does."""
    lm, ids = model(layers=2), torch.randint(VOCAB, (1, LENGTH))
    for mixer in lm.mixers:
        mixer.policy = ScanPolicy(start=torch.randn(mixer.heads, mixer.headdim, mixer.d_state))
    reset = torch.zeros(1, LENGTH, dtype=torch.bool)
    reset[0, [0, 9, 10, 31]] = True
    for sizes in ([LENGTH], [9, 5, 17, 9], [10, 1, LENGTH - 11]):
        cache, outputs = Cache(), []
        for piece, begins in zip(ids.split(sizes, 1), reset.split(sizes, 1)):
            outputs.append(lm(piece, cache, reset=begins))
        alone = [lm(document) for document in ids.split([9, 1, 21, 9], 1)]
        torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(alone, 1), rtol=0, atol=1e-9)


# --- policies


@pytest.mark.parametrize("window", [1, 5])
@torch.no_grad()
def test_a_window_is_of_the_tokens_before(window):
    """A token sees itself and the r before it: what is older changes nothing, the oldest of these does."""
    mixer, u = model().layers[0].mixer, reading(1)
    mixer.policy = ScanPolicy(window=window)
    expected = mixer(u, None, WHOLE)[0][0, -1]
    for older, same in ((window + 1, True), (window, False)):
        # the angles go on through what is changed, and only differences of them count
        other = u.clone()
        other[:, -1 - older] = torch.randn(WIDTH)
        off = (mixer(other, None, WHOLE)[0][0, -1] - expected).abs().max()
        assert (off < 1e-9) == same, f"the token {older} before the last, under a window of {window}"


@torch.no_grad()
def test_what_a_token_adds_to_its_own_output_stands_beside_the_state():
    """Where nothing is written every token is read as if it were alone."""
    mixer, u = model().layers[0].mixer, reading(1)
    alone = torch.cat([mixer(token, None, WHOLE)[0] for token in u.split(1, 1)], 1)
    mixer.policy = ScanPolicy(gain=0.0)
    y, carry = mixer(u, None, WHOLE)
    torch.testing.assert_close(y, alone, rtol=0, atol=1e-9)
    assert not carry.scan.state.any() and bool(states_of(mixer, carry).any())


@torch.no_grad()
def test_what_is_not_there_to_be_changed():
    lm = model()
    with pytest.raises(InputError, match="gates have no step"):
        lm.layers[0].mixer.policy = ScanPolicy(min_dt=0.1)
        lm(torch.randint(VOCAB, (1, 5)))
    with pytest.raises(InputError, match="a mamba3 layer makes its decays from the text"):
        lm.layers[0].mixer.scale_rates(torch.ones(8, dtype=torch.float64))
    with pytest.raises(InputError, match="mamba3 does not read one stream over several ranks"):
        lm.layers[0].mixer(reading(), None, Span(shard=object()))


# --- a model


@torch.no_grad()
def test_a_carry_holds_no_more_than_it_shows():
    """It is no view of what a call worked out for all of its tokens."""
    _, carry = model().layers[0].mixer(reading(1), None, WHOLE)
    for tensor in (carry.conv, carry.angle, carry.scan.state):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    lm, ids, cache = model(layers=2, dtype=torch.float32), torch.randint(VOCAB, (2, LENGTH)), Cache()
    checkpoint.save(lm, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == lm.config and loaded.weights_hash == lm.weights_hash
    expected = lm(ids)
    loaded(ids[:, :17], cache)
    cache.save(tmp_path / "read.state")
    cache = Cache.load(tmp_path / "read.state")
    assert cache.layers[0].angle.dtype == torch.float64
    torch.testing.assert_close(loaded(ids[:, 17:], cache), expected[:, 17:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("mamba3:headdim=5", "expand . d_model = 32 is no multiple of headdim = 5"),
        ("mamba3:headdim=8,ngroups=3", "4 heads do not divide into ngroups = 3"),
        ("mamba3:headdim=0", "headdim must be at least 1, got 0"),
        ("mamba3:headdim=8,rope_fraction=0.25", "rope_fraction is 0.5 or 1, got 0.25"),
        ("mamba3:headdim=8,d_state=2", "0.5 of its d_state = 2 are none"),
        ("mamba3:headdim=8,d_state=7", "0.5 of its d_state = 7 are none"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": text, "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)
