"""What is put in the place of what: which mixer takes over which heads of which layers of a transformers decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rnn_longctx.config import counted
from rnn_longctx.errors import InputError
from rnn_longctx.models.checkpoint.layouts import DECODERS
from rnn_longctx.models.retrofit.attention import RetrofitAttention
from rnn_longctx.models.retrofit.parts import checked


@dataclass(frozen=True)
class Plan:
    """The mixers of a retrofitted decoder.

    Attributes:
        layers: by a layer's number, of each of its mixers the text and the heads of queries that it takes over. Heads
            that none takes stay full attention, and so do the layers that are not there.
    """

    layers: Mapping[int, tuple[tuple[str, tuple[int, ...]], ...]]

    def to_json(self) -> dict[str, Any]:
        return {
            str(layer): [{"mixer": text, "heads": list(heads)} for text, heads in mixers]
            for layer, mixers in sorted(self.layers.items())
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> Plan:
        """Return the plan that a file holds. Raises InputError for what is none."""
        try:
            return cls(
                {
                    int(layer): tuple((checked(each["mixer"]), tuple(map(int, each["heads"]))) for each in mixers)
                    for layer, mixers in data.items()
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise InputError(f"{where}: {error}") from None
            raise InputError(f"{where}: layers: expected the mixers of each layer and their heads") from None


def numbers(text: str, most: int, what: str, option: str) -> tuple[int, ...]:
    """Return the numbers that a text such as `0,2-5` or `all` names, of those below `most`. Raises InputError for
    others, and for what is no such text."""
    if text.strip() == "all":
        return tuple(range(most))
    chosen: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", word)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(f"{option}: expected numbers as in 0,2-5, or all, got {text!r}")
        chosen += range(int(match[1]), int(match[2] or match[1]) + 1)
    if missing := [n for n in chosen if n >= most]:
        raise InputError(f"{option}: there is no {what} {missing[0]}: the model has {counted(most, what)}, from 0 on")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"{option}: a {what} is named twice in {text!r}")
    return tuple(sorted(chosen))


def plan_of(model: Any, mixer: str, layers: str = "all", heads: str = "all") -> Plan:
    """Return the plan of one mixer for the layers and heads that two texts name (`numbers`).

    Raises:
        InputError: an unknown mixer, or layers or heads that the model has not.
    """
    text, config = checked(mixer), model.config
    chosen = numbers(layers, int(config.num_hidden_layers), "layer", "--layers")
    taken = numbers(heads, int(config.num_attention_heads), "head", "--heads")
    return Plan(dict.fromkeys(chosen, ((text, taken),)))


def convert(model: nn.Module, plan: Plan, seed: int = 0) -> nn.Module:
    """Put a plan's mixers into a decoder of transformers, in place, and return it. New weights are drawn from a seed.

    Raises:
        InputError: no decoder that can be retrofitted, or layers or heads that it has not.
    """
    config: Any = getattr(model, "config", None)
    check_kind(getattr(config, "model_type", None), type(model).__name__)
    blocks: Any = model.base_model.layers  # type: ignore[union-attr]
    for layer, mixers in plan.layers.items():
        if not 0 <= layer < len(blocks):
            raise InputError(f"there is no layer {layer}: the model has {counted(len(blocks), 'layer')}, from 0 on")
        _check_heads(layer, [heads for _, heads in mixers], int(config.num_attention_heads))
        attention = blocks[layer].self_attn
        if isinstance(attention, RetrofitAttention):
            raise InputError(f"layer {layer} is retrofitted already: begin with the decoder that it was")
        if abs(attention.scaling * attention.head_dim**0.5 - 1) > 1e-6:
            raise InputError(f"layer {layer} scales its scores by {attention.scaling:g} and not by 1 / sqrt(head_dim)")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 10_000 + layer)
            blocks[layer].self_attn = RetrofitAttention(attention, mixers).train(attention.training)
    return model


def check_kind(model_type: str | None, name: str) -> None:
    """Raise InputError for a model that is no decoder of transformers whose attention can be replaced."""
    if model_type not in DECODERS:
        kind = f" ({model_type})" if model_type else ""
        raise InputError(f"{name}{kind} is no decoder whose attention can be replaced ({', '.join(DECODERS)})")


def _check_heads(layer: int, groups: Sequence[tuple[int, ...]], most: int) -> None:
    named = [head for heads in groups for head in heads]
    if not all(groups) or len(set(named)) < len(named):
        raise InputError(f"layer {layer}: each mixer takes some heads over, and each head goes to one mixer")
    if missing := [head for head in named if not 0 <= head < most]:
        raise InputError(f"layer {layer} has no head {missing[0]}: it has {counted(most, 'head')}, from 0 on")
