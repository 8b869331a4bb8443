"""Sumformer against its formulas (arXiv 2307.02301), in float64: the paper's layer of sets, and the mixer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.sumformer import SetSumformer
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.span import WHOLE, Span

WIDTH, LENGTH = 8, 40


def mixer_of(text="sumformer:width=5,hidden=12"):
    return LM(ModelConfig(text, d_model=WIDTH, n_layer=1, vocab_size=9)).double().eval().layers[0].mixer


def reading(rows=2):
    return torch.randn(rows, LENGTH, WIDTH, dtype=torch.float64)


def network(parts, x):
    """One hidden layer, from its weights."""
    first, _, last = parts
    hidden = first.weight @ x + first.bias
    return last.weight @ (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2) + last.bias


def definition(mixer, row, weights=None):
    """What a mixer gives of one row (T, d_model). weights: of token s at token t (T, T); None: all up to t alike."""
    weights = torch.ones(len(row), len(row)).tril() if weights is None else weights
    weights = weights.double() / weights.double().sum(1, keepdim=True)
    each = torch.stack([network(mixer.phi, x) for x in row])
    means = [sum(w * e for w, e in zip(of, each)) for of in weights]
    return torch.stack([network(mixer.psi, torch.cat([x, mean])) for x, mean in zip(row, means)])


def read(mixer, u, sizes, carry=None):
    outputs = []
    for piece in u.split(sizes, 1):
        y, carry = mixer(piece, carry, WHOLE)
        outputs.append(y)
    return torch.cat(outputs, 1), carry


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[LENGTH], [1, 20, LENGTH - 21], [1] * LENGTH])
def test_the_mixer_is_its_definition(sizes, seed):
    mixer, u = mixer_of(), reading()
    expected = torch.stack([definition(mixer, row) for row in u])
    torch.testing.assert_close(read(mixer, u, sizes)[0], expected, rtol=1e-9, atol=1e-9)


AGES = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
BLOCK = torch.arange(LENGTH) // 6


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "weights"),
    [
        (ScanPolicy(window=6), (AGES < 6).double()),
        (ScanPolicy(reset=6), (BLOCK[:, None] == BLOCK).double()),
        (ScanPolicy(add=-0.3, gain=0.5), (-0.3 * AGES.double()).exp()),
        (ScanPolicy(mul=0.5), torch.ones(LENGTH, LENGTH)),
    ],
    ids=["window", "reset", "decay", "factor"],
)
def test_a_policy_forgets_of_the_sum_and_of_its_count(policy, weights, seed):
    """So that what is read stays a mean; a factor on log-decays, which are 0, changes nothing."""
    mixer, u = mixer_of(), reading(1)
    mixer.policy = policy
    expected = definition(mixer, u[0], weights.tril())
    for sizes in ([LENGTH], [3, 17, 1, LENGTH - 21]):
        torch.testing.assert_close(read(mixer, u, sizes)[0][0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_stored_state_is_a_start(seed):
    mixer, u = mixer_of(), reading(1)
    expected, _ = read(mixer, u, [LENGTH])
    _, carry = read(mixer, u[:, :25], [25])
    mixer.policy = ScanPolicy(start=mixer.scan_state(carry)[0])
    torch.testing.assert_close(read(mixer, u[:, 25:], [15])[0], expected[:, 25:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_mixer_knows_no_order_of_what_came_before(seed):
    mixer, u = mixer_of(), reading()
    other = u.clone()
    other[:, :-1] = u[:, torch.randperm(LENGTH - 1)]
    a, b = (read(mixer, x, [LENGTH])[0] for x in (u, other))
    torch.testing.assert_close(a[:, -1], b[:, -1], rtol=0, atol=1e-10)
    assert (a - b).abs().max() > 1e-6


@torch.no_grad()
def test_the_count_is_exact_in_bfloat16():
    mixer, u = mixer_of(), torch.randn(1, 1000, WIDTH)
    expected = mixer(u.double(), None, WHOLE)[0]
    mixer.bfloat16()
    y, carry = read(mixer, u.bfloat16(), [300, 700])
    assert carry.scan.state[0, 0, -1, 0] == 1000 and carry.scan.state.dtype == torch.float32
    assert (y.double() - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


def test_its_state_has_a_fixed_size():
    size = mixer_of().state_size()
    assert size.fixed == {"scan": 6} and size.total(1000) == 6


# --- the layer of sets


@torch.no_grad()
def test_the_set_layer_is_its_definition(seed):
    layer, x = SetSumformer(WIDTH, 5, 12).double(), reading()
    for row, y in zip(x, layer(x)):
        total = sum(network(layer.phi, element) for element in row)
        expected = torch.stack([network(layer.psi, torch.cat([element, total])) for element in row])
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_set_layer_is_equivariant(seed):
    """Elements in another order give as much in that order; each of them enters the outputs of all."""
    layer, x, order = SetSumformer(WIDTH, 5, 12).double(), reading(), torch.randperm(LENGTH)
    y = layer(x)
    torch.testing.assert_close(layer(x[:, order]), y[:, order], rtol=0, atol=1e-10)
    other = x.clone()
    other[:, -1] += 1
    assert ((layer(other) - y).abs().amax((0, 2)) > 1e-9).all()


@torch.no_grad()
def test_padding_is_no_element_of_a_set(seed):
    layer, x = SetSumformer(WIDTH, 5, 12).double(), reading()
    mask = torch.rand(2, LENGTH) < 0.5
    mask[:, 0] = True
    y = layer(x.masked_fill(~mask[..., None], 1e6), mask)
    for row, real, outputs in zip(x, mask, y):
        torch.testing.assert_close(outputs[real], layer(row[real][None])[0], rtol=0, atol=1e-9)


def test_the_set_layer_learns():
    """Which sets have a positive sum: what a sum of the elements' features tells and no element by itself."""
    torch.manual_seed(0)
    layer, read_off = SetSumformer(1, 4, 16), torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *read_off.parameters()], lr=1e-2)
    for _ in range(150):
        x = torch.randn(64, 9, 1)
        logit = read_off(layer(x).mean(1)).flatten()
        loss = F.binary_cross_entropy_with_logits(logit, (x.sum((1, 2)) > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(500, 9, 1)
    right = (read_off(layer(x).mean(1)).flatten() > 0) == (x.sum((1, 2)) > 0)
    assert right.float().mean() > 0.9


def test_a_causal_form_of_the_set_layer_is_refused():
    with pytest.raises(InputError, match="has no causal form: for language take the mixer sumformer") as error:
        SetSumformer(WIDTH, 5, 12, causal=True)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="width is at least 1, got 0"):
        SetSumformer(WIDTH, 0, 12)


def test_padding_before_a_row_reads_nothing():
    mixer, u = mixer_of(), reading(1)
    y = mixer(u, None, Span(mask=torch.arange(LENGTH)[None] >= LENGTH))[0]
    assert bool(y.isfinite().all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sumformer:width=0", "width is at least 1, got 0"),
        ("sumformer:hidden=-3", "hidden is at least 1, got -3"),
        ("sumformer:causal=false", "no parameter 'causal'"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": text, "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)
