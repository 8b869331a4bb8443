"""Gradients of the convolution and the norms' kernels against float64 autograd of their definitions."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from rnn_longctx.models.kernels import choose
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.recurrence import triton

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.models.kernels import conv_norm, conv_norm_grads

DEVICE = "cpu" if triton.interpreted() else "cuda"
# how far a gradient in bfloat16 may be from the exact one: a GPU takes the nearest number, Triton's interpreter cuts
# bits off (findings/triton_interpreter_cuts_bfloat16.sh)
BFLOAT16 = 2**-7 if triton.interpreted() else 2**-8
TOKENS = (
    3 if triton.interpreted() else 23
)  # that are normed, in each of three rows: a block of `ROWS`, another, and a part


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The interpreter takes a program's tokens one by one, those that are not there, too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(conv_norm, "CONV", (8, 128))
        monkeypatch.setattr(conv_norm_grads, "CONV", (8, 128))
        monkeypatch.setattr(conv_norm_grads, "ROWS", 4)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def exact(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def compare(made, expected, of, of_exact, tolerance=1e-5):
    """Outputs, and gradients of a random functional of all of them, each by its norm."""
    weights = [torch.randn_like(y) for y in expected]
    pairs = [(t, e) for t, e in zip(of, of_exact) if t is not None]
    grads = torch.autograd.grad(sum((y.double() * w).sum() for y, w in zip(made, weights)), [t for t, _ in pairs])
    wanted = torch.autograd.grad(sum((y * w).sum() for y, w in zip(expected, weights)), [e for _, e in pairs])
    for ours, theirs in [*zip(made, expected), *zip(grads, wanted)]:
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm() + 1e-12
    assert all(g.dtype == t.dtype for g, (t, _) in zip(grads, pairs))


def conv_of(x, weight, bias, before):
    """The definition: a causal depthwise convolution and a SiLU; what to go on from."""
    taps = weight.shape[2]
    before = x.new_zeros(x.shape[0], x.shape[2], taps - 1) if before is None else before
    whole = torch.cat([before, x.transpose(1, 2)], 2)
    return F.silu(F.conv1d(whole, weight, bias, groups=x.shape[2])).transpose(1, 2), whole[..., x.shape[1] :]


# parts of a block; a block and a part; and with four taps, which reach furthest, several blocks
@pytest.mark.parametrize(
    ("taps", "blocks", "length"), [*itertools.product((1, 2, 3, 4), (0,), (1, 2)), (1, 1, 3), (4, 1, 3), (4, 2, 3)]
)
@pytest.mark.parametrize("begun", [True, False])
def test_convolution(taps, blocks, length, begun):
    length, channels, bias = blocks * conv_norm_grads.CONV[0] + length, 137, random.random() < 0.5
    wide = draw(2, length, channels + 13)
    weight, rest = draw(channels, 1, taps), draw(channels) if bias else None
    before = draw(2, channels, taps - 1) if begun and taps > 1 else None
    of = wide, weight, rest, before
    of_exact = exact(of)
    made = conv_norm_grads.conv_silu(wide[..., 5 : 5 + channels], weight, rest, before)
    expected = conv_of(of_exact[0][..., 5 : 5 + channels], *of_exact[1:])
    kept = slice(None) if taps > 1 else slice(1)  # a single tap hands nothing on
    compare(made[kept], expected[kept], of, of_exact)


def test_convolution_of_a_cut_stream():
    """Gradients go back through what one part hands to the next, also where a part is shorter than the taps' reach."""
    channels, parts = 20, [1, 2, 20, 1, 1, 30]
    of = x, weight, bias = draw(2, sum(parts), channels), draw(channels, 1, 4), draw(channels)
    of_exact = exact(of)
    ys, before = [], None
    for part in x.split(parts, 1):
        y, before = conv_norm_grads.conv_silu(part, weight, bias, before)
        ys.append(y)
    compare([torch.cat(ys, 1)], [conv_of(*of_exact, None)[0]], of, of_exact)


def test_convolution_asked_for_less():
    """Frozen weights, an output that nothing depends on, gradients that arrive transposed."""
    x, weight, bias, before = draw(2, 33, 20), draw(20, 1, 4), draw(20), draw(2, 20, 3)
    weight.requires_grad_(False)
    x_exact, bias_exact, before_exact = exact((x, bias, before))
    for which in (0, 1):
        y = conv_norm_grads.conv_silu(x, weight, bias, before)[which]
        expected = conv_of(x_exact, weight.double(), bias_exact, before_exact)[which]
        there = torch.randn(y.shape[::-1], device=DEVICE).permute(2, 1, 0)
        inputs, inputs_exact = (x, bias, before)[: 3 - 2 * which], (x_exact, bias_exact, before_exact)[: 3 - 2 * which]
        grads = torch.autograd.grad(y, inputs, there)
        wanted = torch.autograd.grad(expected, inputs_exact, there.double())
        for ours, theirs in zip(grads, wanted):
            assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


def norm_of(x, weight, gate, add, groups, eps):
    total = x if add is None else x + add
    v = (total if gate is None else total * F.silu(gate)).unflatten(-1, (groups, -1))
    return (v / (v.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight, total


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("added", [None, torch.float32, torch.bfloat16])
def test_norm(groups, gated, added):
    wide = draw(3, TOKENS, 60)
    x, weight = draw(3, TOKENS, 45), draw(45)
    add = None if added is None else draw(3, TOKENS, 45, dtype=added)
    of = x, weight, wide if gated else None, add
    of_exact = exact(of)
    made = conv_norm_grads.norm(x, weight, 1e-2, groups, wide[..., 3:48] if gated else None, add)
    gate = of_exact[2][..., 3:48] if gated else None
    expected = norm_of(*of_exact[:2], gate, of_exact[3], groups, 1e-2)
    which = slice(None) if add is not None and not gated else slice(1)  # a gated norm adds nothing in a model
    compare(made[which], expected[which], of, of_exact, 1e-5 if added != torch.bfloat16 else BFLOAT16)


def test_norm_asked_for_less():
    """The sum alone, and the normed alone with frozen weights, from gradients with other strides."""
    x, add, weight = draw(3, TOKENS, 45), draw(3, TOKENS, 45), torch.randn(45, device=DEVICE)
    there = torch.randn(45, TOKENS, 3, device=DEVICE).permute(2, 1, 0)
    y, total = conv_norm_grads.norm(x, weight, 1e-5, add=add)
    for ours in torch.autograd.grad(total, (x, add), there, retain_graph=True):
        torch.testing.assert_close(ours, there)
    x_exact, add_exact = exact((x, add))
    expected = norm_of(x_exact, weight.double(), None, add_exact, 1, 1e-5)[0]
    wanted = torch.autograd.grad(expected, (x_exact, add_exact), there.double())
    for ours, theirs in zip(torch.autograd.grad(y, (x, add), there), wanted):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


def train_once(model, ids, parts):
    """The loss of a stream read in parts, and every parameter's gradient."""
    cache, loss = model.new_cache(), 0.0
    for part in ids.split(parts, 1):
        loss = loss + model.logits(model(part, cache)).logsumexp(-1).sum() / ids.numel()
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_model(groups, monkeypatch):
    """Every gradient as by the PyTorch forms, through a carried cache."""
    config = Mamba2Config(d_model=32, n_layer=2, d_state=16, headdim=16, ngroups=groups, vocab_size=61)
    with torch.device(DEVICE):
        model = Mamba2LM(config)
    model.use_backend("torch")
    ids = torch.randint(61, (2, 21), device=DEVICE)
    monkeypatch.setattr(choose, "fits", lambda x: False)
    slow, wanted = train_once(model, ids, [1, 10, 10])
    monkeypatch.setattr(choose, "fits", lambda x: True)
    fast, grads = train_once(model, ids, [1, 10, 10])
    torch.testing.assert_close(fast, slow)
    for ours, theirs in zip(grads, wanted):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 1000])
def test_in_half(width):
    """bf16 as mixed precision has it, at a model's sizes: as near to the exact gradients as PyTorch's forms are."""
    config = Mamba2Config(d_model=width, n_layer=2, d_state=64, headdim=width // 8, vocab_size=256)
    with torch.device("cuda"):
        model = Mamba2LM(config)
    ids = torch.randint(256, (2, 3000), device="cuda")

    def distances(kernels):
        with pytest.MonkeyPatch.context() as patch:
            if not kernels:
                patch.setattr(choose, "fits", lambda x: False)
            with torch.autocast("cuda", torch.bfloat16):
                _, grads = train_once(model, ids, [1000, 2000])
        return torch.stack([(g - e).norm() / e.norm() for g, e in zip(grads, wanted)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "fits", lambda x: False)
        _, wanted = train_once(model, ids, [1000, 2000])
    fast, slow = distances(True), distances(False)
    # Of a parameter of few numbers (dt_bias has one a head) either error is a draw of a few: up to 1.9 on an H200.
    bound = torch.tensor([1.3 if p.numel() > 1000 else 3.0 for p in model.parameters()], device="cuda")
    assert (fast < bound * slow + 1e-3).all(), (fast / slow).max()
