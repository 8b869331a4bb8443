"""What tests of the fused scan share: random inputs of a stream, and how far two results lie apart."""

import math

import torch

from rnn_longctx.recurrence.gates import ScanInputs, SteppedGates
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.ssd import reference
from rnn_longctx.recurrence.ssd import scan as ssd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, P, G, N = 4, 20, 2, 24  # not powers of two: part of every tile lies outside


def inputs(length, batch=2, decay=0.5, dtype=torch.float32, sizes=(H, P, G, N)):
    """The scan's arguments that have a token axis, and A; the others."""
    h, p, g, n = sizes

    def normal(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    x = {"x": normal(batch, length, h, p), "dt": normal(batch, length, h), "A": -torch.rand(h, device=DEVICE) * decay,
         "B": normal(batch, length, g, n), "C": normal(batch, length, g, n)}  # fmt: skip
    return x, {
        "dt_bias": torch.randn(h, device=DEVICE) - 1,
        "dt_limit": (0.01, 2.0),
        "D": torch.randn(h, device=DEVICE),
    }


def operands(x, dt, A, B, C, dt_bias=None, dt_softplus=True, dt_limit=(0.0, math.inf), D=None, mask=None, reset=None):
    """What a scan reads (inputs, stepped gates and span) from Mamba-2's names."""
    return ScanInputs(x, B, C, D), SteppedGates(dt, A, dt_bias, dt_limit, dt_softplus), Span(mask, reset)


def _split(settings):
    names = ("dt_bias", "dt_softplus", "dt_limit", "D", "mask", "reset")
    return {k: v for k, v in settings.items() if k in names}, {k: v for k, v in settings.items() if k not in names}


def scan(x, dt, A, B, C, **settings):
    """The scan with all that it reads by Mamba-2's names."""
    read, others = _split(settings)
    return ssd.scan(*operands(x, dt, A, B, C, **read), **others)


def reference_scan(x, dt, A, B, C, **settings):
    """The definition, likewise."""
    read, others = _split(settings)
    return reference.scan(*operands(x, dt, A, B, C, **read), **others)


def error(ours, expected):
    """Relative; 0 where both are nothing but zeros, as of a head whose tokens are all left out."""
    ours, expected = ours.double().cpu(), expected.double().cpu()
    wrong = (ours - expected).norm().item()
    return wrong and wrong / max(expected.norm().item(), 1e-300)


def worst(ours, expected, heads):
    """Of heads, along an axis: one must not hide behind another that is larger."""
    return max(error(a, b) for a, b in zip(ours.unbind(heads), expected.unbind(heads)))


def on_cpu(values):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def documents(length):
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[0, length // 2] = reset[0, length // 2 + 1] = reset[1, length // 3] = True
    return reset


POLICIES = {
    "plain": ScanPolicy(),
    "rri": ScanPolicy(add=math.log(0.99), gain=0.75),
    "scaled, filtered": ScanPolicy(mul=(0.5, 1.0, 2.0, 0.1), min_dt=0.1, gain=(1.0, 0.5, 2.0, 1.0)),
    "never forget": ScanPolicy(mul=0.0),
    "growing": ScanPolicy(add=0.01),
    "reset": ScanPolicy(reset=37),
    "cap every 16": ScanPolicy(caps=(Cap(1.5, 16),)),
    "cap every token": ScanPolicy(caps=(Cap(1.5),)),
    "two caps": ScanPolicy(caps=(Cap(2.0, 5), Cap(1.5, 7))),
    "cap every 48, some heads": ScanPolicy(caps=(Cap((0.5, 1.0, 900.0, 2.0), 48),), add=-0.001),
}
