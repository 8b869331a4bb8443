"""How near Sumformer's layer of sets comes to an equivariant function: error over width, length and layers, against
what its theorem says (arXiv 2307.02301).

The theorem: of sets of n numbers, one layer whose sum has n numbers comes as near as wanted to every continuous
function that is equivariant to the order, if phi and psi are large enough; and some need them all (arXiv 1901.09006).
The function here is y_i = sum over the others j, and over k = 1, 2, of f_k(x_i) f_k(x_j), but for a factor, with f_k
that are orthonormal on [0, 1] and of mean 0. So two sums hold all that an element has to know of the others, whatever
n, and one that is linear in them half; who knows x_i alone does no better than y = 0, of an error of 1.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.models.mixers.sumformer import SetSumformer

D_MODEL, HIDDEN, FEATURES = 4, 64, 2


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def function(x: Tensor) -> Tensor:
    """Return y (B, n) of sets x (B, n), of variance 1 where the elements are uniform on [0, 1]."""
    each = math.sqrt(2) * torch.cos(math.pi * x[..., None] * torch.arange(1, FEATURES + 1))
    others = each.sum(1, keepdim=True) - each
    return (each * others).sum(-1) / math.sqrt(FEATURES * (x.shape[1] - 1))


def read(model: nn.Module, x: Tensor) -> Tensor:
    """Return what a model says of sets x (B, n): the first number of each element, whose others begin at 0."""
    return model(F.pad(2 * x[..., None] - 1, (0, D_MODEL - 1)))[..., 0]


def error_of(n: int, width: int, layers: int, steps: int = 800, rate: float = 1e-2) -> float:
    """Train layers on fresh sets of n, and return their mean squared error on others."""
    model = nn.Sequential(*(SetSumformer(D_MODEL, width, HIDDEN) for _ in range(layers)))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        x = torch.rand(128, n)
        loss = (read(model, x) - function(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = torch.rand(4000, n)
    with torch.no_grad():
        return float((read(model, x) - function(x)).square().mean())


def test_the_function_is_equivariant_and_of_variance_one(seed):
    x, order = torch.rand(20_000, 5, dtype=torch.float64), torch.randperm(5)
    torch.testing.assert_close(function(x[:, order]), function(x)[:, order])
    y = function(x)
    assert abs(float(y.mean())) < 0.1 and abs(float(y.square().mean()) - 1) < 0.1
    near = (x[:, 0] - 0.3).abs() < 0.05
    assert abs(float(y[near, 0].mean())) < 0.25, "an element says nothing of its value by itself"


def test_as_many_power_sums_as_elements_tell_a_set(seed):
    """What the theorem's width comes from: n power sums give the elements back, as roots (Newton's identities) ..."""
    for n in (2, 3, 5):
        x = torch.linspace(-1, 1, n, dtype=torch.float64) + 0.2 / n * torch.rand(n, dtype=torch.float64)
        sums = [float(x.pow(k).sum()) for k in range(1, n + 1)]
        e = [1.0]
        for k in range(1, n + 1):
            e.append(sum((-1) ** (j - 1) * e[k - j] * sums[j - 1] for j in range(1, k + 1)) / k)
        companion = torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
        companion[0] = torch.tensor([(-1) ** k * e[k + 1] for k in range(n)], dtype=torch.float64)
        roots = torch.linalg.eigvals(companion).real.sort().values
        torch.testing.assert_close(roots, x.sort().values, rtol=0, atol=1e-8)


def test_one_power_sum_less_does_not():
    """... and n - 1 do not: two sets of three with the same sum and the same sum of squares."""
    a, b = torch.tensor([0.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 6.0])
    assert all(a.pow(k).sum() == b.pow(k).sum() for k in (1, 2)) and a.pow(3).sum() != b.pow(3).sum()


def test_sums_enough_or_layers_enough_come_near(seed):
    """One sum in one layer leaves half of the function; eight sums, or a second layer with its own, far less."""
    narrow, wide, deep = error_of(4, 1, 1, 400), error_of(4, 8, 1, 600), error_of(4, 1, 2, 400)
    assert 0.42 < narrow < 0.8 and wide < 0.35 and deep < 0.35, (narrow, wide, deep)


@pytest.mark.slow
def test_error_over_width_length_and_layers(seed):
    """The table of docs/guides/tasks.md: `pytest -m slow -s tests/eval/test_equivariant_sets.py` prints it."""
    errors = {}
    for layers in (1, 2):
        for width in (1, 2, 4, 8):
            for n in (2, 4, 8, 16):
                errors[layers, width, n] = error_of(n, width, layers)
            print(f"| {layers} | {width} |", *(f"{errors[layers, width, n]:.2f} |" for n in (2, 4, 8, 16)), flush=True)
    for n in (4, 8, 16):
        assert errors[1, 1, n] > 0.35, "one sum is too few, whatever phi and psi"
        assert errors[1, 4, n] < errors[1, 1, n] / 2
    assert errors[1, 1, 2] < errors[1, 1, 4], "of two elements one sum tells the other, if phi and psi are large enough"
