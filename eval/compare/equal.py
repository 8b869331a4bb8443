"""Models of equal size: as many parameters, as many operations, or as large a state. The width of the MLP is adjusted,
or else d_model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rnn_longctx.errors import InputError
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM

Kind = Literal["parameters", "flops", "state"]

STEP = 8  # channels: widths of MLPs are multiples of it where that is near enough, as matrix products like it
STATE_STEPS = 8  # of the search for a width by the state
SPREAD = 0.15  # widths of a model within this share of the one that is worked out are tried


@dataclass(frozen=True)
class Size:
    """What is to be equal.

    Attributes:
        kind: as a config names it.
        of: the size of a model.
        within: how near to the first model's all others come, as a share of it.
        named: its unit, in words.
        of_mlp: whether an MLP adds to it.
    """

    kind: Kind
    of: Callable[[ModelConfig], int]
    within: float
    named: str
    of_mlp: bool = True


def size(kind: Kind, length: int) -> Size:
    """Return what `equal` of a comparison names; length: tokens, of the training."""
    if kind == "parameters":
        return Size(kind, parameters, 0.02, "parameters")
    if kind == "flops":
        return Size(kind, lambda model: flops(model, length), 0.02, "operations a token")
    # (heads divide a width, so that it cannot be chosen as finely)
    named = f"numbers of state after {length} tokens"
    return Size(kind, lambda model: state(model, length), 0.05, named, of_mlp=False)


def parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a model, shared ones counted once. No memory is taken for them."""
    return sum(p.numel() for p in _on_meta(config).parameters())


def state(config: ModelConfig, length: int) -> int:
    """Return how many numbers a row keeps after `length` tokens: states, convolutions' edges, keys and values."""
    return _on_meta(config).state_size().total(length)


@torch.no_grad()
def flops(config: ModelConfig, length: int) -> int:
    """Return the floating-point operations of a token, two for each multiplication and addition, where `length` tokens
    are read on the CPU: of matrix products and convolutions alone, as PyTorch's counter takes them (of attention by a
    kernel, the pairs that causality leaves out too). A recurrence is counted as it is read there, in chunks; all
    weights are 0, since what is read in more products where much is forgotten would hang on the draw."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # (which imports Triton)

    model, ids = LM(config).eval(), torch.zeros(1, length, dtype=torch.int64)
    for p in model.parameters():
        p.zero_()

    def flash(q: Any, k: Any, v: Any, *others: Any, **named: Any) -> int:
        return sdpa_flop_count(q, k, v)

    uncounted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        model.logits(model(ids))
    return round(counter.get_total_flops() / length)


def _on_meta(config: ModelConfig) -> LM:
    with torch.device("meta"):
        return LM(config)


def equalised(
    models: Mapping[str, ModelConfig], kind: Kind = "parameters", length: int = 512
) -> dict[str, ModelConfig]:
    """Return the models with the size of the first one (`size`). Raises InputError: a model comes no nearer, by any
    width."""
    equal = size(kind, length)
    target = equal.of(next(iter(models.values())))
    return {name: _sized(name, model, target, equal) for name, model in models.items()}


def _sized(name: str, model: ModelConfig, target: int, equal: Size) -> ModelConfig:
    tried = []
    for resized in _candidates(model, target, equal):
        count = equal.of(resized)
        if abs(count - target) <= equal.within * target:
            return resized
        tried.append((abs(count - target), count, resized))
    _, count, closest = min(tried, key=lambda one: one[0])
    nearest = f"the nearest is {count:,} (d_model={closest.d_model}, mlp={closest.mlp:.3g})"
    hint = ""
    if not equal.of_mlp:
        hint = "; where d_model does not change its state finely, write the mixer's own parameters"
    elif not model.mlp:
        hint = "; give it an MLP, whose width can be chosen finely"
    raise InputError(f"equal: {name} cannot have {target:,} {equal.named} within {equal.within:.0%}: {nearest}{hint}")


def _candidates(model: ModelConfig, target: int, equal: Size) -> Iterator[ModelConfig]:
    yield model
    if not (equal.of_mlp and model.mlp):
        yield from _widths(model, target, equal)
        return
    for narrower in (model, *_widths(model, target, equal)):
        yield _with_mlp(narrower, target, equal)


def _with_mlp(model: ModelConfig, target: int, equal: Size) -> ModelConfig:
    """Return the model with the width of MLP, STEP or more, that brings it nearest to the target; with a multiple of
    STEP where that is near enough."""
    least, more = (equal.of(replace(model, mlp=width / model.d_model)) for width in (STEP, STEP + 1))
    exact = STEP + (target - least) / (more - least)  # the size grows by as much with every channel
    even = max(STEP, round(exact / STEP) * STEP)
    near = abs(even - exact) * (more - least) <= equal.within / 2 * target
    return replace(model, mlp=(even if near else max(STEP, round(exact))) / model.d_model)


def _widths(model: ModelConfig, target: int, equal: Size) -> Iterator[ModelConfig]:
    """Yield the model at other d_model, multiples of STEP first, and of those the nearest to what the target takes."""
    with_mlp = equal.of_mlp and model.mlp
    # Sizes grow with the first to the second power of the width: where it is the second, one step finds it.
    middle = float(model.d_model)
    for _ in range(1 if equal.of_mlp else STATE_STEPS):
        narrow = next(_around(model, round(middle / 4), round(middle * 4), middle))
        count = equal.of(replace(narrow, mlp=STEP / narrow.d_model) if with_mlp else narrow)
        middle = narrow.d_model * (target / count) ** 0.5
    low, high = int(middle * (1 - SPREAD)), int(middle * (1 + SPREAD)) + 1
    if with_mlp:  # what is left over is for the MLP
        low, high = int(low * (1 - 2 * SPREAD)), int(middle)
    yield from _around(model, low, high, middle)


def _around(model: ModelConfig, low: int, high: int, middle: float) -> Iterator[ModelConfig]:
    """Yield the model at all d_model of low to high that it can have, in the order of `_widths`."""
    for width in sorted(range(max(1, low), high + 1), key=lambda w: (w % STEP > 0, abs(w - middle))):
        try:
            yield replace(model, d_model=width)
        except InputError:  # its heads do not divide into this width, say
            continue
