"""Performer against its formulas (arXiv 2009.14794), token after token in float64, and against softmax attention."""

from __future__ import annotations

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import NotApplicable, mitigate
from rnn_longctx.models import checkpoint
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.performer import random_features
from rnn_longctx.models.rotary import turned
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.span import WHOLE, Span

WIDTH, LENGTH, VOCAB = 16, 40, 23


def model(text="performer:heads=2,features=12", layers=1, seed=0):
    torch.manual_seed(seed)
    return LM(ModelConfig(text, d_model=WIDTH, n_layer=layers, vocab_size=VOCAB)).double().eval()


def mixer_of(text="performer:heads=2,features=12", seed=0):
    return model(text, seed=seed).layers[0].mixer


def exponents(mixer, row):
    """The exponents of the queries' and keys' features (T, H, N) of one row (T, d_model), and its values (T, H, D)."""
    q, k, v = mixer.in_proj(row).unflatten(-1, (3, mixer.heads, -1)).unbind(1)
    q, k = (turned(x[None], torch.arange(len(row)))[0] / mixer.size**0.25 for x in (q, k))
    of_query, of_key = (torch.einsum("thd,hnd->thn", x, mixer.projection) for x in (q, k))
    return of_query, of_key - k.square().sum(-1, keepdim=True) / 2, v


def definition(mixer, row):
    """What a layer gives of one row, every weight of a token on another one worked out in logarithms."""
    of_query, of_key, v = exponents(mixer, row)
    outputs = []
    for t in range(len(row)):
        logs = (of_query[t] + of_key[: t + 1]).logsumexp(-1)  # (t + 1, H): log f(q_t) . f(k_s)
        weights = logs.softmax(0)[..., None]
        outputs.append(mixer.out_proj((weights * v[: t + 1]).sum(0).flatten()))
    return torch.stack(outputs)


def read(mixer, u, sizes, span=WHOLE):
    carry, outputs, start = None, [], 0
    for piece in u.split(sizes, 1):
        tokens = slice(start, start + piece.shape[1])
        marks = (None if mark is None else mark[:, tokens] for mark in (span.mask, span.reset))
        y, carry = mixer(piece, carry, Span(*marks))
        outputs.append(y)
        start = tokens.stop
    return torch.cat(outputs, 1)


def growing(rows=2, dtype=torch.float64):
    """Inputs that grow from token to token, so that the largest exponents of keys do, too."""
    return torch.randn(rows, LENGTH, WIDTH, dtype=dtype) * torch.linspace(0.1, 25.0, LENGTH, dtype=dtype)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[LENGTH], [1, 20, LENGTH - 21], [1] * LENGTH])
@pytest.mark.parametrize("inputs", [lambda: torch.randn(2, LENGTH, WIDTH, dtype=torch.float64), growing])
def test_it_is_its_definition(inputs, sizes, seed):
    mixer, u = mixer_of(seed=seed), inputs()
    expected = torch.stack([definition(mixer, row) for row in u])
    torch.testing.assert_close(read(mixer, u, sizes), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_documents_and_padding_have_largest_keys_of_their_own(seed):
    """Behind a document of far larger keys, and behind padding of such."""
    mixer, u = mixer_of(seed=seed), growing(1).flip(1)
    for first in (7, LENGTH - 3):
        begins = torch.arange(LENGTH)[None] == first
        after = torch.arange(LENGTH)[None] >= first
        expected = definition(mixer, u[0, first:])
        for sizes in ([LENGTH], [5, first - 4, LENGTH - first - 1]):
            for span in (Span(reset=begins), Span(mask=after)):
                torch.testing.assert_close(read(mixer, u, sizes, span)[0, first:], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_is_seen_of_larger_keys_that_follow(dtype, seed):
    """A stabiliser over the whole text would make the features before its largest key 0, and their quotients with them:
    here outputs before it stay as they are."""
    mixer, u = mixer_of(seed=seed).to(dtype), torch.randn(1, LENGTH, WIDTH, dtype=dtype)
    other = u.clone()
    other[:, 25:] *= 60.0
    of_key = exponents(mixer, other[0])[1]
    assert of_key[:25].amin() > of_key[25:].amin() + 300  # (float32 ends at 88 nats)
    before, after = mixer(u, None, WHOLE)[0], mixer(other, None, WHOLE)[0]
    assert torch.equal(before[:, :25], after[:, :25]) and bool(after.isfinite().all())
    close = 1e-9 if dtype == torch.float64 else 2e-4
    expected = definition(mixer.double(), other[0].double())
    torch.testing.assert_close(after[0].double(), expected, rtol=close, atol=close * float(expected.abs().max()))


@torch.no_grad()
def test_the_divisor_is_never_below_one(seed):
    mixer, u, readings = mixer_of(seed=seed), growing(), []
    mixer.tap = readings.append
    mixer(u, None, WHOLE)
    inputs, gates = readings[0].inputs, readings[0].gates
    y, _ = mixer.recurrence.scan(inputs, gates)
    assert float(y[..., -1].min()) >= 1 - 1e-12
    assert float(gates.log_decay.max()) <= 0 and float(gates.log_decay[:, 1:].min()) < -1  # maxima grow
    assert max(float(x.max()) for x in (inputs.B, inputs.C)) <= 1


@torch.no_grad()
def test_its_error_falls_as_the_root_of_the_features(seed):
    """Against `full-attention` of the same weights. Orthogonal features are at least as good as independent ones."""
    torch.manual_seed(seed)
    attention = model("full-attention:heads=2", seed=seed).layers[0].mixer
    u = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64) / 2  # (the variance grows as an exponential of |q + k|^2)
    expected, counts, draws = attention(u, None, WHOLE)[0], [16, 64, 256, 1024], 16
    errors = []
    for count in counts:
        squares = []
        for draw in range(draws):
            mixer = mixer_of(f"performer:heads=2,features={count},seed={draw + 100 * (seed % 1000)}")
            mixer.load_state_dict({**attention.state_dict(), "projection": mixer.projection})
            squares.append((mixer(u, None, WHOLE)[0] - expected).square().mean())
        errors.append(torch.stack(squares).mean().sqrt())
    x, y = torch.tensor(counts).double().log(), torch.stack(errors).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    print(f"errors {[f'{e:.2e}' for e in errors]}, slope {slope:.3f}")
    assert -0.62 < slope < -0.38 and errors[-1] < 0.05 * expected.square().mean().sqrt()


def test_its_features_are_gaussian_and_orthogonal(seed):
    w = random_features(2, 5003, 4, (seed,))
    assert w.shape == (2, 5003, 4) and not torch.equal(w[0], w[1])
    block = w[0, :4] / w[0, :4].norm(dim=1, keepdim=True)
    torch.testing.assert_close(block @ block.T, torch.eye(4).double(), rtol=0, atol=1e-12)
    w = w.flatten(0, 1)
    assert float(w.mean(0).abs().max()) < 6 / len(w) ** 0.5
    torch.testing.assert_close(w.T @ w / len(w), torch.eye(4).double(), rtol=0, atol=0.08)
    q, k = torch.tensor([0.4, -0.3, 0.2, 0.5]).double(), torch.tensor([0.1, 0.6, -0.5, 0.3]).double()
    samples = (w @ (q + k) - (q.square().sum() + k.square().sum()) / 2).exp()
    error = samples.std() / len(w) ** 0.5
    assert abs(float(samples.mean() - (q @ k).exp())) < 6 * float(error)


@torch.no_grad()
def test_features_are_drawn_from_the_seed_and_saved(tmp_path, seed):
    one, two = model(layers=2, seed=1), model(layers=2, seed=2)
    other = mixer_of("performer:heads=2,features=12,seed=1")
    first, second = (layer.mixer.projection for layer in one.layers)
    assert torch.equal(first, two.layers[0].mixer.projection)
    assert not torch.equal(first, second) and not torch.equal(first, other.projection)
    assert "projection" not in dict(one.layers[0].mixer.named_parameters())
    first += 1.0  # what is saved counts, not the seed
    checkpoint.save(one, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", dtype="float64")
    ids = torch.randint(VOCAB, (1, LENGTH))
    torch.testing.assert_close(loaded(ids), one(ids), rtol=0, atol=1e-9)
    assert loaded.weights_hash == one.weights_hash != two.weights_hash


def test_a_seed_of_its_own_is_drawn_from():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random_features(2, 8, 4, (0, 0))
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_policies_that_mean_nothing_are_refused():
    lm, ids = model(), torch.randint(VOCAB, (1, 9))
    lm.train_length = 9
    plain = lm(ids)
    for policy, reason in (
        (ScanPolicy(mul=0.5), "a factor on them means nothing"),
        (ScanPolicy(start=torch.zeros(2, 9, 12)), "relative to the largest keys"),
        (ScanPolicy(erase=0.5), "erases nothing"),
    ):
        lm.mixers[0].policy = policy
        with pytest.raises(InputError, match=reason) as error:
            lm(ids)
        assert "\n" not in str(error.value)
    lm.mixers[0].policy = ScanPolicy()
    for remedy in ("delta-scale:scale=0.7", "a-scale:scale=1.5", "noise-start:std=0.1"):
        with pytest.raises(NotApplicable, match=remedy.partition(":")[0]):
            mitigate(lm, remedy)
    assert torch.equal(lm(ids), plain)


@torch.no_grad()
@pytest.mark.parametrize("policy", [ScanPolicy(window=6), ScanPolicy(reset=6), ScanPolicy(add=-0.1)], ids=str)
def test_a_policy_forgets_as_weights_of_tokens_do(policy, seed):
    """A window, a reset and a decay of attention's weights, by the definition."""
    mixer, u = mixer_of(seed=seed), torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    mixer.policy = policy
    of_query, of_key, v = exponents(mixer, u[0])
    expected = []
    for t in range(LENGTH):
        begin = max(0, t - 5) if policy.window else t - t % 6 if policy.reset else 0
        ages = torch.arange(t - begin, -1, -1).double()[:, None]
        logs = (of_query[t] + of_key[begin : t + 1]).logsumexp(-1) + policy.add * ages
        expected.append(mixer.out_proj((logs.softmax(0)[..., None] * v[begin : t + 1]).sum(0).flatten()))
    for sizes in ([LENGTH], [3, 17, 1, LENGTH - 21]):
        torch.testing.assert_close(read(mixer, u, sizes)[0], torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_its_state_has_a_fixed_size():
    size = model("performer:heads=2,features=12").state_size()
    assert size.fixed == {"scan": 2 * 12 * (WIDTH // 2 + 1) + 2 * 12} and size.total(10) == size.total(1000)


@torch.no_grad()
def test_float16_has_room_for_a_long_text():
    mixer = mixer_of().half()
    u = torch.randn(1, 3000, WIDTH).half()
    y = mixer(u, None, WHOLE)[0]
    expected = mixer.double()(u.double(), None, WHOLE)[0]
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("performer:heads=0", "heads and features are at least 1, got 0 and 64"),
        ("performer:features=0", "heads and features are at least 1, got 4 and 0"),
        ("performer:heads=3", "16 channels do not divide into 3 heads"),
        ("performer:heads=16", "positions turn pairs of a key's channels, and a head has 1"),
        ("performer:seed=-1", "seed is a whole number from 0 on, got -1"),
        ("performer:window=5", "no parameter 'window'"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": text, "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)


def test_a_stream_over_several_ranks_is_refused():
    with pytest.raises(InputError, match="does not read one stream over several ranks"):
        mixer_of()(torch.zeros(1, 3, WIDTH).double(), None, Span(shard=object()))
