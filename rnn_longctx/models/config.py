"""The shape of a model: what its layers are, by name, and what stands around them.

    model: {mixer: "gla:heads=4", d_model: 256, n_layer: 6}
    model: {mixer: [mamba2, "sliding-window:window=256"], mlp: 2, d_model: 256, n_layer: 6}

The flat config of a Mamba-2 (`rnn_longctx.models.mixers.mamba2.Mamba2Config`) is the other one: it says all of a layer,
as the config.json of every Mamba-2 does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rnn_longctx.config import from_dict
from rnn_longctx.errors import InputError, nearest, warn_once
from rnn_longctx.models.interface import Mixer
from rnn_longctx.models.mixers import MIXERS, NO_MIXERS
from rnn_longctx.models.mixers.mamba2 import LARGEST, LARGEST_SIZE, Mamba2Config
from rnn_longctx.spec import parse, quiet


@dataclass
class ModelConfig:
    """The shape of a model of any mixers.

    Attributes:
        mixer: a mixer with its parameters, as "gla:heads=4", or a list of them, repeated over the layers.
        mlp: the width of a gated MLP after every mixer, as a multiple of d_model; 0: there is none.
        norm: the norms before every mixer and MLP, and at the end: "rms", or "layer", as RWKV's are.
    """

    mixer: str | list[str]
    d_model: int = 256
    n_layer: int = 6
    vocab_size: int = 256
    mlp: float = 0.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    norm: str = quiet("rms")

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size"):
            if not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise InputError(f"{name} must be at least 1 and at most {LARGEST_SIZE}, got {getattr(self, name)}")
        if not 0 <= self.norm_eps <= LARGEST:
            raise InputError(f"norm_eps: expected a small number, at least 0, got {self.norm_eps}")
        if self.mlp and not 1 <= self.mlp * self.d_model <= LARGEST_SIZE:
            raise InputError(f"mlp: expected a multiple of d_model above 0, or 0 for none, got {self.mlp}")
        if self.norm not in ("rms", "layer"):
            raise InputError(f"norm: expected rms or layer, got {self.norm!r}")
        if not self.texts:
            raise InputError('mixer: expected at least one, such as "mamba2"')
        with torch.device("meta"):
            for text in dict.fromkeys(self.texts):  # whoever does not fit says so
                try:
                    _make(text, self, 0)
                except InputError as error:
                    raise InputError(f"mixer: {error}") from None

    @property
    def texts(self) -> list[str]:
        return [self.mixer] if isinstance(self.mixer, str) else self.mixer

    def unfit(self, length: int) -> list[str]:
        """Return a line for each mixer whose settings do not go with the longest text that is to be read, in tokens."""
        settings = (mixer_settings(text)[1] for text in dict.fromkeys(self.texts))
        lines = (config.unfit(length) for config in settings if hasattr(config, "unfit"))
        return [line for line in lines if line is not None]

    def make_mixers(self) -> Iterator[Mixer]:
        """Make the mixer of every layer, with fresh weights."""
        for layer in range(self.n_layer):
            yield _make(self.texts[layer % len(self.texts)], self, layer)


def warn_of_unfit(config: ModelConfig | Mamba2Config, length: int, name: str = "") -> None:
    """Warn where the settings of a mixer do not go with the longest text that is to be read, in tokens: see `unfit`.
    name: leads every line."""
    for line in config.unfit(length) if isinstance(config, ModelConfig) else ():
        warn_once(f"{name}{line}")


def model_config(data: Mapping[str, Any], where: str = "") -> ModelConfig | Mamba2Config:
    """Return the config that a mapping spells out: a `ModelConfig` where it says `mixer`, a flat Mamba-2 otherwise.
    where: leads every error message. Raises InputError as `from_dict` does."""
    if isinstance(data, Mapping) and "mixer" in data:
        return from_dict(ModelConfig, data, where)
    return from_dict(Mamba2Config, data, where)


class _Configs(Mapping[str, type]):
    """The dataclass of every mixer's parameters, by the mixer's name."""

    def __getitem__(self, name: str) -> type:
        return MIXERS[name].Config

    def __contains__(self, name: object) -> bool:
        return name in MIXERS

    def __iter__(self) -> Iterator[str]:
        return iter(MIXERS)

    def __len__(self) -> int:
        return len(MIXERS)


class _Layer:
    """A model's config as one of its layers gets it (`rnn_longctx.models.interface.LayerShape`)."""

    def __init__(self, model: ModelConfig, layer: int):
        self.model, self.layer = model, layer
        mixers = [_name(model.texts[i % len(model.texts)]) for i in range(layer + 1)]
        self.first = mixers.index(mixers[layer]) == layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def mixer_settings(text: str) -> tuple[str, Any]:
    """Return a mixer's name and its parameters, of its own `Config`. Raises InputError as `parse` does."""
    name = _name(text)
    if name in NO_MIXERS and name not in MIXERS:
        raise InputError(NO_MIXERS[name])
    if name not in MIXERS:
        hint = nearest(name, MIXERS)
        raise InputError(f"unknown mixer {name!r}{hint}, or give the file that has it with --plugin")
    return name, parse(text, _Configs(), "mixer")


def _name(text: str) -> str:
    return text.partition(":")[0].strip()


def _make(text: str, model: ModelConfig, layer: int) -> Mixer:
    name, settings = mixer_settings(text)
    shape: Any = _Layer(model, layer)
    return MIXERS[name].of(settings, shape)
