"""Products side by side: the same as one behind the other, and what stands around a weight is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from rnn_longctx.models import products
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.products import bare, side_by_side


@pytest.fixture(autouse=True)
def fused_layers(monkeypatch):
    monkeypatch.setattr(choose, "FUSED_LAYERS", True)


@pytest.fixture
def maps():
    return [nn.Linear(6, out, bias=False) for out in (4, 1, 9)]


@pytest.fixture
def u():
    return torch.randn(2, 5, 6)


@pytest.fixture
def writes(monkeypatch):
    """The number of products that were written to their columns, as on a GPU."""
    counted = []

    def mm(*given, out, make=torch.mm):
        counted.append(out.shape)
        return make(*given, out=out)

    monkeypatch.setattr(choose, "fits", lambda x: True)
    monkeypatch.setattr(products.torch, "mm", mm)
    return counted


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Other(nn.Linear):
    def forward(self, u):
        return super().forward(u) + 1


def adapt(maps):
    maps[1] = Other(6, 1, bias=False)


AROUND = {
    "nothing": lambda maps: None,
    "a hook": lambda maps: maps[2].register_forward_hook(lambda module, given, y: y + 1),
    "a hook before": lambda maps: maps[2].register_forward_pre_hook(lambda module, given: (given[0] + 1,)),
    "another forward": lambda maps: setattr(maps[0], "forward", lambda u: u[..., :4]),
    "another class": adapt,
    "a parametrization": lambda maps: parametrize.register_parametrization(maps[0], "weight", Doubled()),
    "a weight that is no parameter": lambda maps: vars(maps[0]).update(
        weight=vars(maps[0])["_parameters"].pop("weight") * 2
    ),
    "a bias": lambda maps: setattr(maps[0], "bias", nn.Parameter(torch.ones(4))),
}


@torch.no_grad()
@pytest.mark.parametrize("around", AROUND)
def test_what_stands_around_a_weight_is_called(maps, u, writes, around):
    AROUND[around](maps)
    expected = torch.cat([linear(u) for linear in maps], -1)
    torch.testing.assert_close(side_by_side(u, maps), expected)
    assert len(writes) == (3 if around == "nothing" else 0)


@torch.no_grad()
def test_a_hook_of_all_modules_is_called(maps, u, writes):
    with nn.modules.module.register_module_forward_hook(lambda module, given, y: y + 1):
        expected = torch.cat([linear(u) for linear in maps], -1)
        torch.testing.assert_close(side_by_side(u, maps), expected)
    assert not writes


@torch.no_grad()
def test_no_weight_is_remembered(maps, u, writes):
    """Changed in place, loaded, or another tensor in its place."""
    side_by_side(u, maps)
    maps[0].weight.mul_(2)
    maps[1].load_state_dict({"weight": torch.randn(1, 6)})
    maps[2].weight.data = torch.randn(9, 6)
    torch.testing.assert_close(side_by_side(u, maps), torch.cat([linear(u) for linear in maps], -1))
    assert len(writes) == 6


def test_gradients_and_other_types(maps, u, writes):
    y = side_by_side(u, maps)
    y.sum().backward()
    assert maps[0].weight.grad is not None and not writes
    with torch.no_grad():
        assert not bare(maps[0], u.double())
        assert not bare(maps[0], u.to("meta"))
        with torch.autocast("cpu"):
            assert not bare(maps[0], u)
            assert side_by_side(u, maps).dtype == torch.bfloat16
    assert not writes


@pytest.mark.gpu
@torch.no_grad()
def test_products_of_half_precision(monkeypatch):
    """Written to columns of a wider matrix, without another pass: nothing is allocated beside it."""
    maps = [nn.Linear(1024, out, bias=False, device="cuda", dtype=torch.bfloat16) for out in (768, 768, 1536)]
    u = torch.randn(1, 4096, 1024, device="cuda", dtype=torch.bfloat16)
    y = side_by_side(u, maps)
    torch.testing.assert_close(y, torch.cat([linear(u) for linear in maps], -1), rtol=2**-7, atol=2**-7)
    torch.cuda.synchronize()
    del y
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = side_by_side(u, maps)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * y.nbytes
