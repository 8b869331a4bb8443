"""Every adopted family on a CUDA device, with what kernels transformers finds there."""

from __future__ import annotations

import copy
import inspect
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from adopted_families import MAMBA1, POLICIES, follows, put, random_ids
from torch import nn

from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.recurrence.policy import PLAIN

pytestmark = pytest.mark.gpu
NEAR = {"rtol": 0, "atol": 1e-3}  # of logits of about 1; our own sums on this device are of float32


@pytest.fixture(autouse=True)
def exact_products():
    """A convolution of whole rows is otherwise one of 10 bits, and its step is not."""
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = was


@contextmanager
def in_pytorch(model):
    """transformers takes the kernels of causal-conv1d and mamba_ssm wherever these are installed, which refuse float64
    and the CPU: here its own PyTorch forms instead."""
    module = sys.modules[type(model).__module__]
    with pytest.MonkeyPatch.context() as patch:
        for name, function in list(vars(module).items()):
            plain = inspect.unwrap(function) if inspect.isfunction(function) else function
            if plain is not function and plain.__module__ == module.__name__:
                patch.setattr(module, name, plain)
        yield


@pytest.fixture
def on_gpu(model):
    """mamba_ssm can be installed without its Mamba-1 kernels, which transformers does not notice."""
    built = hasattr(sys.modules.get("selective_scan_cuda"), "fwd")
    with nullcontext() if built or model.config.model_type not in MAMBA1 else in_pytorch(model):
        yield model.cuda()


def _read(model, ids):
    logits = model(ids.to(model.device), use_cache=False).logits.cpu().float()
    assert logits.std() > 0.01
    return logits


def _streamed(adopted, ids, cuts):
    cache, parts = adopted.new_cache(), ids.to(adopted.device).split(cuts, 1)
    return torch.cat([adopted.logits(adopted(part, cache)) for part in parts], 1).cpu().float()


@torch.no_grad()
def test_adopted_on_the_device_equals_the_original_and_itself_by_steps(on_gpu, family):
    """Against float64 on the CPU: ours no further from it than theirs, whose kernels may multiply in 10 bits."""
    ids, exact = random_ids(2, 37), copy.deepcopy(on_gpu).cpu().double()
    if exact._can_set_experts_implementation():
        exact.set_experts_implementation("eager")  # the grouped product of torch 2.11 refuses float64
    with in_pytorch(exact):
        expected = _read(exact, ids)
    plain, tokens = _read(on_gpu, ids), on_gpu.generate(ids.cuda(), max_new_tokens=6, do_sample=False)
    theirs, adopted, reference = (plain - expected).abs().max(), adopt(on_gpu), adopt(exact)
    assert theirs < 0.05 * expected.std()
    torch.testing.assert_close(_read(on_gpu, ids), plain, rtol=0, atol=1e-5)
    # (Zamba2's own steps drop the limit that its prompts respect)
    adopt(on_gpu, time_step_limit_in_decode=True)
    assert (_streamed(adopted, ids, [13, 1, 1, 22]) - expected).abs().max() < 3 * theirs + 1e-4
    for name, policy in POLICIES.items():
        if not follows(family, policy):
            continue
        put(adopted, policy)
        put(reference, policy)
        with in_pytorch(exact):
            changed = _read(exact, ids)
        assert (changed - expected).abs().max() > 1e-2, name
        for found in (_read(on_gpu, ids), *(_streamed(adopted, ids, cuts) for cuts in ([13, 1, 1, 22], [1] * 37))):
            torch.testing.assert_close(found, changed, **NEAR)
        on_gpu.generate(ids.cuda(), max_new_tokens=2, do_sample=False)
    put(adopted, PLAIN)
    for mixer in adopted.mixers:
        mixer.limit_in_decode = False
    torch.testing.assert_close(_read(on_gpu, ids), plain, rtol=0, atol=1e-5)
    assert torch.equal(on_gpu.generate(ids.cuda(), max_new_tokens=6, do_sample=False), tokens)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(on_gpu, dtype):
    """The state stays float32, so that a stream drifts no further from the float32 model than the original does."""
    ids = random_ids(2, 64)
    exact = _read(on_gpu, ids)
    half = copy.deepcopy(on_gpu).to(dtype)
    theirs = (_read(half, ids) - exact).abs().mean()
    ours = (_streamed(adopt(half), ids, [33, 1, 30]) - exact).abs().mean()
    assert torch.isfinite(ours) and ours < 1.5 * theirs + 1e-3


class Int8(nn.Module):
    """A linear layer whose weight is of bytes."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantize(self):
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_int8_weights(build, family):
    model, ids = build(family).cuda(), random_ids(2, 31)
    for name, m in list(model.named_modules()):
        if isinstance(m, nn.Linear) and name != "lm_head":
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, Int8(m))
    exact = copy.deepcopy(model).cpu().double()  # bytes stay bytes
    theirs, adopted, reference = _read(model, ids), adopt(model), adopt(exact)
    with in_pytorch(exact):
        plain = _read(exact, ids)
        put(reference, POLICIES["gates"])
        changed = _read(exact, ids)
    far = (theirs - plain).abs().max()  # by kernels that may multiply in 10 bits
    assert far < 0.05 * plain.std()
    assert (_streamed(adopted, ids, [7, 1, 23]) - plain).abs().max() < 3 * far + 1e-4
    put(adopted, POLICIES["gates"])
    torch.testing.assert_close(_read(model, ids), changed, **NEAR)
    assert (changed - plain).abs().max() > 1e-3
    torch.testing.assert_close(_streamed(adopted, ids, [11, 20]), changed, **NEAR)
