"""What is done before a scan of the delta rule, in one pass each: kernels against their formulas in float64, and layers
that use them against layers that do not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from rnn_longctx.models.conv import linear_conv
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.lm import LM
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.span import WHOLE, Span

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.kernels import delta_inputs


@pytest.fixture(autouse=True)
def fused_layers(monkeypatch):
    monkeypatch.setattr(choose, "FUSED_LAYERS", True)


DEVICE = "cpu" if triton.interpreted() else "cuda"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LAYERS = [
    "gated-deltanet:heads=2,head_dim=8,v_heads=4",
    "gated-deltanet:heads=2,head_dim=6,neg_eigval=true,d_conv=2",
    "kda:heads=2,head_dim=8",
    "kda:heads=1,head_dim=8,v_heads=2,lower_bound=-5",
    "deltanet:heads=2,gated=true",
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The interpreter takes a program's tokens one by one, those that are not there, too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(delta_inputs, "CONV", (4, 32))
        monkeypatch.setattr(delta_inputs, "STEP", 16)


@pytest.mark.parametrize(
    ("taps", "key_heads", "d_state", "heads", "headdim", "parts"),
    [
        (4, 2, 8, 2, 16, (9,)),
        (4, 3, 5, 3, 9, (1, 2, 5)),
        (3, 1, 40, 2, 3, (2, 1, 10)),
        (2, 2, 4, 4, 4, (1, 9)),
        (1, 1, 3, 1, 1, (5, 4)),
    ],
)
def test_convolved_heads(taps, key_heads, d_state, heads, headdim, parts):
    keys, values = key_heads * d_state, heads * headdim
    wide = torch.randn(2, sum(parts), 2 * keys + values + 3, device=DEVICE)
    x, weight = wide[..., 2:-1], torch.randn(2 * keys + values, 1, taps, device=DEVICE)
    y, edge = linear_conv(x.double(), weight.double(), None, None, None)
    q, k, v = F.silu(y).split([keys, keys, values], -1)
    q, k = (t.unflatten(-1, (key_heads, d_state)) for t in (q, k))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    expected = q / d_state**0.5, k, v.unflatten(-1, (heads, headdim))
    pieces, before = [], None
    for part in x.split(parts, 1):
        *piece, before = delta_inputs.conv_heads(part, weight, before, key_heads, d_state, headdim, 1e-6)
        assert all(t.is_contiguous() for t in piece)
        pieces.append(piece)
    for ours, theirs in zip((torch.cat(t, 1) for t in zip(*pieces)), expected):
        torch.testing.assert_close(ours.double(), theirs, **CLOSE)
    assert torch.equal(before, edge.float())


@pytest.mark.parametrize(("rows", "dim", "heads"), [((2, 37), 45, 6), ((1, 1), 16, 1), ((1, 70), 33, 40)])
@pytest.mark.parametrize("decays", [True, False])
def test_gates_of_heads(rows, dim, heads, decays):
    u, b, a = (torch.randn(*shape, dim, device=DEVICE) for shape in (rows, (heads,), (heads,)))
    A_log, dt_bias = torch.randn(heads, device=DEVICE), 9 * torch.randn(heads, device=DEVICE)  # tiny steps, too
    a /= dim**0.5
    more = (a, A_log, dt_bias) if decays else ()
    beta, log_decay = delta_inputs.head_gates(u, b, 2.0, *more)
    torch.testing.assert_close(beta.double(), 2 * (u.double() @ b.double().T).sigmoid(), **CLOSE)
    if not decays:
        assert log_decay is None
        return
    steps = F.softplus(u.double() @ a.double().T + dt_bias.double(), threshold=50)
    torch.testing.assert_close(log_decay.double(), -A_log.double().exp() * steps, rtol=2e-5, atol=1e-12)


@pytest.mark.filterwarnings("ignore:overflow")  # of what a sigmoid divides by
@pytest.mark.parametrize("bound", [0.0, -4.0])
@pytest.mark.parametrize(("rows", "heads", "width"), [((2, 11), 3, 5), ((1, 1), 1, 1), ((1, 9), 2, 160)])
def test_decays_of_channels(rows, heads, width, bound):
    f, dt_bias = (9 * torch.randn(*shape, heads * width, device=DEVICE) for shape in (rows, ()))
    A_log = torch.randn(heads, device=DEVICE)
    ours = delta_inputs.channel_decays(f, A_log, dt_bias, bound)
    x, A = (f.double() + dt_bias.double()).unflatten(-1, (heads, width)), A_log.double().exp()[:, None]
    expected = bound * (A * x).sigmoid() if bound else -A * F.softplus(x, threshold=50)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-12)


def layer_of(text, width):
    mixer = LM(ModelConfig(text, d_model=width, n_layer=1, vocab_size=9)).eval().layers[0].mixer
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.3 * torch.randn_like(p)
    return mixer


@pytest.fixture
def both_ways(monkeypatch):
    """both_ways(mixer, u, sizes, span, kernels): what a layer gives and keeps, in segments, with kernels and without,
    must be alike; kernels: how often all heads are convolved by one."""
    calls = []
    convolve = delta_inputs.conv_heads
    monkeypatch.setattr(delta_inputs, "conv_heads", lambda *given: calls.append(1) or convolve(*given))

    def compare(mixer, u, sizes, span, kernels):
        read = {}
        for fused in (True, False):
            monkeypatch.setattr(choose, "fits", lambda x, fused=fused: fused)
            calls.clear()
            outputs, carry = [], None
            for part in u.split(sizes, 1):
                y, carry = mixer(part, carry, span)
                outputs.append(y)
            read[fused] = torch.cat(outputs, 1), carry.conv, carry.scan.state, carry.scan.log_decay
            assert len(calls) == (kernels if fused else 0)
        real = ... if span.mask is None else span.mask
        for name, ours, theirs in zip(("y", "conv", "state", "log_decay"), read[True], read[False]):
            shown = real if name == "y" else ...
            torch.testing.assert_close(ours[shown], theirs[shown], rtol=2e-4, atol=1e-5, msg=lambda m, n=name: n + m)

    return compare


@torch.no_grad()
@pytest.mark.parametrize("text", LAYERS)
def test_a_layer_reads_alike_with_and_without_kernels(text, both_ways):
    """In segments, a token among them; and after weights have changed."""
    mixer, u = layer_of(text, 8).to(DEVICE), torch.randn(2, 7, 8, device=DEVICE)
    both_ways(mixer, u, [4, 1, 2], WHOLE, 3)
    mixer.q_proj.weight += 0.1
    mixer.b_proj.weight.data = mixer.b_proj.weight.data - 0.1
    both_ways(mixer, u[:, :3], [3], WHOLE, 1)


@torch.no_grad()
@pytest.mark.parametrize(("text", "around"), [(LAYERS[0], "a_proj"), (LAYERS[2], "b_proj")])
def test_what_stands_around_the_weights_of_gates_is_called(text, around, both_ways):
    mixer, u = layer_of(text, 8).to(DEVICE), torch.randn(2, 3, 8, device=DEVICE)
    getattr(mixer, around).register_forward_hook(lambda module, given, y: 1 - y)
    both_ways(mixer, u, [3], WHOLE, 1)


@torch.no_grad()
@pytest.mark.parametrize("marks", ["mask", "reset"])
def test_padding_and_documents(marks, both_ways):
    """Go by the kernels of each convolution and norm, or by none."""
    mixer, u = layer_of(LAYERS[0], 8).to(DEVICE), torch.randn(2, 7, 8, device=DEVICE)
    marked = torch.full((2, 7), marks == "mask", device=DEVICE)
    marked[1, :3] = marks != "mask"
    both_ways(mixer, u, [7], Span(**{marks: marked}), 0)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("text", [
    "gated-deltanet:heads=3,head_dim=128", "kda:heads=4,head_dim=128", "kda:heads=2,head_dim=64,lower_bound=-5",
    "deltanet:heads=4,gated=true",
])  # fmt: skip
def test_a_layer_in_bf16(text, monkeypatch):
    """As far from the exact output as without kernels."""
    mixer, u = layer_of(text, 256).cuda().bfloat16(), torch.randn(2, 1500, 256, device="cuda", dtype=torch.bfloat16)
    mixer.backend = "torch"  # so that the layer around the scan is compared
    exact = copy.deepcopy(mixer).double()(u.double(), None, WHOLE)[0]
    far = {}
    for fused in (True, False):
        monkeypatch.setattr(choose, "fuses", lambda x, fused=fused: fused)
        y = torch.cat(list(_segments(mixer, u, (700, 1, 799))), 1)
        far[fused] = float((y.double() - exact).norm() / exact.norm())
    assert far[True] < 1.3 * far[False] and far[False] < 0.02, far


def _segments(mixer, u, sizes):
    carry = None
    for part in u.split(sizes, 1):
        y, carry = mixer(part, carry, WHOLE)
        yield y
