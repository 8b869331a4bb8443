"""The kernels beside the scan against their PyTorch forms, which test_mamba2.py and the parity tests hold."""

import copy
import math
import random

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from rnn_longctx import record
from rnn_longctx.models.conv import causal_conv
from rnn_longctx.models.deferred import DeferredNorm
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.ssd import ops

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.models.kernels import conv_norm, matvec
from rnn_longctx.models.kernels.head_norm import head_norm
from rnn_longctx.recurrence.ssd.kernels import launch

DEVICE = "cpu" if triton.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The interpreter takes a program's tokens one by one, those that are not there, too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(conv_norm, "CONV", (16, 256))


@pytest.mark.parametrize(("taps", "channels", "parts"), [
    (1, 20, (75,)), (2, 20, (1, 2, 40, 32)), (3, 20, (2, 1, 72)), (4, 20, (1, 2, 40, 32)), (4, 270, (35, 1, 3)),
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(taps, channels, parts, bias):
    conv = torch.nn.Conv1d(channels, channels, taps, groups=channels, bias=bias, device=DEVICE)
    wide = torch.randn(2, sum(parts), channels + 13, device=DEVICE)
    x = wide[..., 5 : 5 + channels]  # a slice of a projection
    with torch.no_grad():
        expected, after = causal_conv(x.cpu(), conv.cpu(), None, None)
        conv = conv.to(DEVICE)
        ys, before = [], None
        for part in x.split(parts, 1):
            y, before = conv_norm.conv_silu(part, conv.weight, conv.bias, before)
            ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1).cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(before.cpu(), after)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_norm(groups, gated, added):
    x, more = torch.randn(2, 2, 7, 45, device=DEVICE).unbind(0)
    gate = torch.randn(2, 7, 60, device=DEVICE)[..., 3:48] if gated else None
    weight = torch.randn(45, device=DEVICE)
    y, total = conv_norm.norm(x, weight, 1e-5, groups, gate, more if added else None)
    expected_total = x + more if added else x
    v = (expected_total * F.silu(gate) if gated else expected_total).unflatten(-1, (groups, -1)).double()
    expected = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected_total)


@pytest.mark.parametrize("groups", [1, 3])
def test_norm_of_a_sum_with_what_is_unscaled(groups):
    norm = RMSNorm(45, 1e-5, groups).to(DEVICE)
    x, values = torch.randn(2, 2, 7, 45, device=DEVICE).unbind(0)
    squares = torch.rand(2, 7, 5, device=DEVICE)
    with torch.no_grad():
        y, total = conv_norm.norm(x, norm.weight, norm.eps, groups, add=DeferredNorm(values, squares, 90, 1e-3))
        more = DeferredNorm(values.cpu(), squares.cpu(), 90, 1e-3)
        expected, expected_total = norm.cpu().add(x.cpu(), more, True)
    rms = (squares.sum(-1, keepdim=True) / 90 + 1e-3).sqrt()
    torch.testing.assert_close(total, x + values / rms)
    torch.testing.assert_close(total.cpu(), expected_total)
    torch.testing.assert_close(y.cpu(), expected)


@pytest.fixture
def folds(monkeypatch):
    """folds(model, ids, sizes, fold, **marks): hidden states read in segments, with norms folded into scans, or by the
    PyTorch scan, which folds none."""
    if DEVICE == "cpu":
        monkeypatch.setattr(choose, "fits", lambda x: True)
        monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(16, 32, 16, 4, 1))
        monkeypatch.setattr(launch, "segment_chunks", lambda *_: 2)
    folded = []
    watched = ops.watched
    monkeypatch.setattr(ops, "watched", lambda o, look, gate: (gate and folded.append(gate)) or watched(o, look, gate))

    @torch.no_grad()
    def read(model, ids, sizes, fold, **marks):
        folded.clear()
        model.use_backend("triton" if fold else "torch")
        cache, parts = model.new_cache(), zip(ids.split(sizes, 1), *(m.split(sizes, 1) for m in marks.values()))
        hidden = torch.cat([model(part, cache, **dict(zip(marks, rest))) for part, *rest in parts], 1)
        assert len(folded) == (sum(s > 1 for s in sizes) * model.config.n_layer if fold else 0)
        return hidden

    return read


@pytest.mark.parametrize("marked", [None, "mask", "reset"])
def test_a_norm_folded_into_the_scan(make, folds, marked):
    """The same, in several segments, with padding and with documents; whatever the policy and the width of a head."""
    headdim, policy = random.choice([32, 64]), random.choice([PLAIN, ScanPolicy(add=math.log(0.99), gain=0.75)])
    model = make(d_model=headdim, headdim=headdim, ngroups=1, d_state=16).to(DEVICE)  # two heads
    for mixer in model.mixers:
        mixer.policy = policy
        mixer.A_log.data[0] = math.log(200.0)  # wild
    ids = torch.randint(61, (2, 45), device=DEVICE)
    mask, reset = (torch.full((2, 45), value, device=DEVICE) for value in (True, False))
    mask[1, :7], reset[0, 20], reset[1, 30] = False, True, True
    marks = {name: mark for name, mark in (("mask", mask), ("reset", reset)) if name == marked}
    real, sizes = marks.get("mask", torch.ones_like(mask)), [45] if marks else [1, 35, 9]
    folded, plain = (folds(model, ids, sizes, fold, **marks) for fold in (True, False))
    torch.testing.assert_close(folded[real], plain[real], rtol=1e-4, atol=1e-4)


def test_a_norm_folded_where_an_observer_looks(make, folds):
    """Where the looks fall on chunks' ends, and where a call begins between two of them and is cut."""
    model = make(d_model=64, headdim=32, ngroups=1, d_state=16, n_layer=1).to(DEVICE)
    every = 16 if DEVICE == "cpu" else 256
    ids = torch.randint(61, (2, 5 * every), device=DEVICE)
    seen = {}
    for fold in (True, False):
        with record(model, every=every) as trace:
            hidden = folds(model, ids, [3 * every, 2 * every], fold)
        seen[fold] = hidden, trace.table()
    torch.testing.assert_close(seen[True][0], seen[False][0], rtol=1e-4, atol=1e-4)
    pd.testing.assert_frame_equal(seen[True][1], seen[False][1], rtol=1e-3, atol=1e-4)
    assert len(seen[True][1]) == 2 * 2 * 5 * model.config.nheads // 2


def test_what_is_not_folded(make, folds):
    """Norms of groups, and a projection with a bias."""
    for fields in ({"ngroups": 2}, {"ngroups": 1, "bias": True}):
        model = make(**fields).to(DEVICE)
        with pytest.raises(AssertionError):
            folds(model, torch.randint(61, (1, 20), device=DEVICE), [20], True)


@pytest.mark.parametrize(
    ("rows", "dim", "outs", "groups"), [(1, 45, 77, 1), (3, 45, 5, 3), (5, 600, 33, 1), (1, 64, 64, 2)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_norm_and_projection(rows, dim, outs, groups, bias, added):
    x, more = torch.randn(2, rows, dim, device=DEVICE).unbind(0)
    linear = torch.nn.Linear(dim, outs, bias, device=DEVICE)
    scale = torch.randn(dim, device=DEVICE)
    y, total = matvec.norm_linear(x, scale, linear.weight, linear.bias, 1e-5, groups, more if added else None)
    expected_total = x + more if added else x
    v = expected_total.unflatten(-1, (groups, -1)).double()
    normed = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * scale
    torch.testing.assert_close(y.double(), linear.double()(normed), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected_total)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "groups"), [(1024, 1), (2048, 2), (1000, 1)])
def test_norm_and_projection_in_half(dim, groups, dtype):
    """As two launches round: the norm to the weight's type, the sum and the product from float32."""
    x, more = torch.randn(2, dim, device=DEVICE), torch.randn(2, dim, device=DEVICE, dtype=dtype)
    norm = RMSNorm(dim, 1e-5, groups).to(DEVICE, dtype)
    linear = torch.nn.Linear(dim, 333, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        normed, total = norm.add(x, more, in_fp32=True)
        expected = linear.double()(normed.double())
        linear = linear.to(dtype)
        y, ours = matvec.norm_linear(x, norm.weight, linear.weight, linear.bias, 1e-5, groups, more)
    assert torch.equal(ours, total)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("described", [0, 2**60])
def test_a_norm_folded_into_the_scan_in_bf16(make, folds, monkeypatch, described):
    """By the copy engine and without. The norm's weight goes into the next projection's, which is rounded once more:
    over 40 draws on an H100 0.99 to 1.22 times as far from the exact logits, 0.2% to 0.4% of them."""
    monkeypatch.setattr(launch, "DESCRIBED", described)
    model = make(torch.bfloat16, d_model=256, headdim=64, ngroups=1, d_state=128).to(DEVICE)
    ids = torch.randint(61, (2, 5000), device=DEVICE)
    folded, plain = (model.logits(folds(model, ids, [2048, 2952], fold)).double() for fold in (True, False))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        exact = exact.logits(exact(ids))
    far, far_plain = ((y - exact).norm() / exact.norm() for y in (folded, plain))
    assert far < 1.4 * far_plain and far < 1e-2


@pytest.mark.gpu
def test_a_model_reads_alike_with_and_without_kernels():
    with torch.device("cuda"):
        model = Mamba2LM(Mamba2Config(d_model=64, n_layer=2, d_state=32, headdim=32)).eval()
    ids = torch.randint(256, (2, 777), device="cuda")
    with torch.no_grad():
        fast = torch.cat(list(model.stream(ids, segment=100)), 1)
    slow = torch.cat([h.detach() for h in model.stream(ids, segment=100)], 1)  # gradients on: PyTorch's forms
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("squash", ["silu", "sigmoid"])
@pytest.mark.parametrize("width", [5, 64])
def test_norms_of_heads(width, squash):
    """Of a slice of a projection, as queries are, and with a gate behind, as outputs have."""
    wide = torch.randn(2, 37, 3 * width + 11, device=DEVICE)
    x = wide[..., 4 : 4 + 3 * width].unflatten(-1, (3, width))
    ours = head_norm(x, share=1.0, eps=1e-6)
    torch.testing.assert_close(ours, x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), rtol=1e-5, atol=1e-6)
    norm, z = RMSNorm(width, 1e-5).to(DEVICE), torch.randn(2, 37, 3 * width, device=DEVICE)
    torch.nn.init.normal_(norm.weight)
    expected = norm.gated(x, z, squash)  # with a gradient to come: PyTorch's
    ours = head_norm(x, share=1 / width, eps=1e-5, weight=norm.weight, gate=z, sigmoid=squash == "sigmoid")
    torch.testing.assert_close(ours.flatten(-2), expected, rtol=1e-5, atol=1e-6)
