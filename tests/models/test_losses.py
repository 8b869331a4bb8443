"""Losses without all logits at once, against cross entropy of all of them."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rnn_longctx.models import losses
from rnn_longctx.models.losses import head_losses


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 300)
    monkeypatch.setattr(losses, "LOGITS_ON_CUDA", 300)


def draw(dtype=torch.float64):
    batch, length, width, vocab = 2, random.randint(5, 40), random.randint(3, 12), random.randint(20, 70)
    hidden = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocab, (batch, length)), torch.randn(batch, length, dtype=dtype)


def plain(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.t()).transpose(1, 2), targets, reduction="none")


def test_values_and_gradients(seed):
    random.seed(seed)
    for _ in range(5):
        hidden, weight, targets, asked = draw()
        expected, found = plain(hidden, weight, targets), head_losses(hidden, weight, targets)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        wanted = torch.autograd.grad((expected * asked).sum(), (hidden, weight))
        for one, other in zip(torch.autograd.grad((found * asked).sum(), (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_weight_that_does_not_learn(seed):
    random.seed(seed)
    hidden, weight, targets, asked = draw()
    (expected,) = torch.autograd.grad((plain(hidden, weight, targets) * asked).sum(), hidden)
    (head_losses(hidden, weight.requires_grad_(False), targets) * asked).sum().backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-10, atol=1e-10)


def test_autocast(seed):
    """bf16 products: as near to float64 as autograd's own are, and float32 gradients of float32 weights."""
    random.seed(seed)
    hidden, weight, targets, asked = draw(torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = torch.autograd.grad((plain(*exact, targets) * asked).sum(), exact)
    found = {}
    for name, function in (("ours", head_losses), ("autograd's", lambda h, w, t: plain(h, w, t).float())):
        with torch.autocast("cpu", torch.bfloat16):
            values = function(hidden, weight, targets)
        found[name] = torch.autograd.grad((values * asked).sum(), (hidden, weight))
    for ours, theirs, expected in zip(found["ours"], found["autograd's"], wanted, strict=True):
        assert ours.dtype == torch.float32
        error, least = ((g.double() - expected).norm() / expected.norm() for g in (ours, theirs))
        assert error < 1.5 * least + 1e-3 and error > 1e-5, "bf16 was used"


class Largest(TorchDispatchMode):
    """The most numbers that an operation returned."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "view" not in str(function) and "expand" not in str(function):
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.numbers = max([self.numbers, *sizes])
        return out


def test_never_all_logits():
    hidden = torch.randn(1, 500, 4, requires_grad=True)
    weight, targets = torch.randn(50, 4, requires_grad=True), torch.randint(50, (1, 500))
    with Largest() as ours:
        head_losses(hidden, weight, targets).sum().backward()
    with Largest() as theirs:
        plain(hidden, weight, targets).sum().backward()
    assert theirs.numbers == 500 * 50, "what is looked for would be seen"
    assert ours.numbers == hidden.numel(), "logits come 300 at a time"


def test_ignored_targets_ask_for_nothing(seed):
    """huggingface/transformers#2718, pytorch/pytorch#15508: masked labels are -100, and no row of the vocabulary."""
    random.seed(seed)
    for _ in range(5):
        hidden, weight, targets, asked = draw()
        targets[torch.rand(targets.shape) < 0.4] = -100
        hidden.data[targets < 0] *= 1e4  # far from any target: a gradient of 0 must not become 0 * inf
        expected, found = plain(hidden, weight, targets), head_losses(hidden, weight, targets)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert bool((found[targets < 0] == 0).all())
        measured = losses.token_losses(lambda h, w=weight: h @ w.t(), len(weight), hidden, targets)
        torch.testing.assert_close(measured, expected, rtol=1e-12, atol=1e-12)
        wanted = torch.autograd.grad((expected * asked).sum(), (hidden, weight))
        got = torch.autograd.grad((found * asked).sum(), (hidden, weight))
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
