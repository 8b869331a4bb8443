"""Models of the same number of parameters: the width of the MLP is adjusted, or else d_model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from rnn_longctx.errors import InputError
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM

WITHIN = 0.02  # of the number of parameters
STEP = 8  # channels: widths of MLPs are multiples of it where that is near enough, as matrix products like it
SPREAD = 0.15  # widths of a model within this share of the one that is worked out are tried


def parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a model, shared ones counted once. No memory is taken for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in LM(config).parameters())


def equalised(models: Mapping[str, ModelConfig], within: float = WITHIN) -> dict[str, ModelConfig]:
    """Return the models with as many parameters as the first one, each within a share of it.

    Raises:
        InputError: a model comes no nearer, by any width.
    """
    target = parameters(next(iter(models.values())))
    return {name: _sized(name, model, target, within) for name, model in models.items()}


def _sized(name: str, model: ModelConfig, target: int, within: float) -> ModelConfig:
    if abs(parameters(model) - target) <= within * target:
        return model
    tried = []
    for narrower in (model, *_widths(model, target)):
        resized = _with_mlp(narrower, target) if narrower.mlp else narrower
        count = parameters(resized)
        if abs(count - target) <= within * target:
            return resized
        tried.append((abs(count - target), count, resized))
    _, count, closest = min(tried, key=lambda one: one[0])
    nearest = f"the nearest is {count:,} (d_model={closest.d_model}, mlp={closest.mlp:.3g})"
    hint = "" if model.mlp else "; give it an MLP, whose width can be chosen finely"
    raise InputError(f"equal: {name} cannot have {target:,} parameters within {within:.0%}: {nearest}{hint}")


def _with_mlp(model: ModelConfig, target: int) -> ModelConfig:
    """Return the model with the width of MLP, STEP or more, that brings it nearest to the target; with a multiple of
    STEP where that comes within half of WITHIN."""
    least, more = (parameters(replace(model, mlp=width / model.d_model)) for width in (STEP, STEP + 1))
    exact = STEP + (target - least) / (more - least)  # parameters grow by as many with every channel
    even = max(STEP, round(exact / STEP) * STEP)
    near = abs(even - exact) * (more - least) <= WITHIN / 2 * target
    return replace(model, mlp=(even if near else max(STEP, round(exact))) / model.d_model)


def _widths(model: ModelConfig, target: int) -> Iterator[ModelConfig]:
    """Yield the model at other d_model, multiples of STEP first, and of those the nearest to what the target takes:
    parameters grow about with the square."""
    least = parameters(replace(model, mlp=STEP / model.d_model)) if model.mlp else parameters(model)
    middle = model.d_model * (target / least) ** 0.5
    low, high = int(middle * (1 - SPREAD)), int(middle * (1 + SPREAD)) + 1
    if model.mlp:  # what is left over is for the MLP
        low, high = int(low * (1 - 2 * SPREAD)), int(middle)
    for width in sorted(range(max(1, low), high + 1), key=lambda w: (w % STEP > 0, abs(w - middle))):
        try:
            yield replace(model, d_model=width)
        except InputError:  # its heads do not divide into this width, say
            continue
