"""What a model type of flash-linear-attention is to us: how its config.json and its tensors are read and written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.config import from_dict
from rnn_longctx.devices import dtype_name
from rnn_longctx.errors import InputError
from rnn_longctx.models.checkpoint.json_files import plain
from rnn_longctx.models.config import ModelConfig, mixer_settings
from rnn_longctx.spec import canonical

# What every type may say that is not computed here: their key and the values that are.
ANY: dict[str, tuple[Any, ...]] = {
    "attn": (None,),
    "attnres_block_size": (None,),
    "hidden_act": ("swish", "silu"),
    "elementwise_affine": (True,),
}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Frame:
    """The names of what stands around the mixers. block: those of a layer, ours to theirs; several of theirs are
    stacked in ours."""

    embedding: str
    norm: str
    layers: str
    mixer: str
    block: Mapping[str, tuple[str, ...]]

    @property
    def has_mlp(self) -> bool:
        return "mlp.down.weight" in self.block


WITH_MLP = Frame(
    "model.embeddings.weight",
    "model.norm.weight",
    "model.layers",
    "attn",
    {
        "norm.weight": ("attn_norm.weight",),
        "norm2.weight": ("mlp_norm.weight",),
        "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.down.weight": ("mlp.down_proj.weight",),
    },
)
WITHOUT_MLP = Frame(
    "backbone.embeddings.weight",
    "backbone.norm_f.weight",
    "backbone.layers",
    "mixer",
    {"norm.weight": ("norm.weight",)},
)

LAYERS_IN_TURNS = Frame("model.embeddings.weight", "model.norm.weight", "model.layers", "attn", {})  # (see `RWKV7`)


@dataclass(frozen=True)
class FlaType:
    """One model type of fla: see the head of `fla.py`.

    Attributes:
        model_type: as a config.json says it; filled in by `fla.TYPES`.
        norm_eps, hidden_ratio: their defaults; the second is of the MLP, where `intermediate_size` is not said.
        norm: the norms of the residual, as `ModelConfig.norm`.
    """

    mixer: str
    architecture: str
    keys: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    frame: Frame = WITH_MLP
    norm_eps: float = 1e-6
    hidden_ratio: float = 4
    norm: str = "rms"
    model_type: str = ""

    # --- config.json

    def settled(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        """Return their config with the keys worked out that others stand for."""
        return data

    def read_config(self, data: dict[str, Any], where: str) -> ModelConfig:
        """Return our config of theirs. Raises InputError for what our model does not compute."""
        data = self.settled(data, where)
        for key, values in (ANY | dict(self.only)).items():
            if key in data and data[key] not in values:
                raise InputError(f"{where}: {key} {data[key]!r} is not supported, only {values[0]!r}")
        settings = {name: data.get(key, default) for name, (key, default) in self.keys.items()} | dict(self.fixed)
        text = f"{self.mixer}:" + ",".join(f"{name}={word(value)}" for name, value in settings.items())
        shape = {
            "mixer": text,
            "d_model": of(data, "hidden_size", where),
            "n_layer": of(data, "num_hidden_layers", where),
            "vocab_size": of(data, "vocab_size", where),
            "mlp": self._mlp(data, where),
            "norm_eps": data.get("norm_eps", self.norm_eps),
            "tie_embeddings": data.get("tie_word_embeddings", False),
            "residual_in_fp32": data.get("residual_in_fp32", False),
            "norm": self.norm,
        }
        config = from_dict(ModelConfig, shape, where)
        config.mixer = canonical(*mixer_settings(text))
        return config

    def write_config(self, config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
        """Return their config.json; `extra` goes under "rnn_longctx", which they ignore."""
        _, settings = mixer_settings(config.texts[0])
        extra, ends = {k: v for k, v in extra.items() if k != "eos_token_id"}, extra.get("eos_token_id")
        data: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        data |= {key: values[0] for key, values in self.only.items()}
        data |= {key: getattr(settings, name) for name, (key, _) in self.keys.items()}
        data |= {
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layer,
            "vocab_size": config.vocab_size,
            "norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "residual_in_fp32": config.residual_in_fp32,
        }
        if self.frame.has_mlp:
            data |= {"hidden_ratio": None, "intermediate_size": round(config.mlp * config.d_model)}
        # Its own defaults for these ids belong to another vocabulary.
        data |= {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": None}
        return plain({**data, "dtype": dtype_name(dtype), "rnn_longctx": extra})

    def check(self, config: ModelConfig) -> None:
        """Raise InputError where their model cannot hold something that ours computes with."""
        _, settings = mixer_settings(config.texts[0])
        for name, value in self.fixed.items():
            if getattr(settings, name) != value:
                raise InputError(f"layout 'fla' cannot hold {name} {getattr(settings, name)}: fla's is {value}")
        if config.norm != self.norm:
            raise InputError(f"layout 'fla' cannot hold norm {config.norm!r}: its {self.model_type} has {self.norm!r}")
        if bool(config.mlp) != self.frame.has_mlp:
            layers = "have one" if self.frame.has_mlp else "have none"
            raise InputError(
                f"layout 'fla' cannot hold mlp {config.mlp:g}: all layers of its {self.model_type} {layers}"
            )

    @property
    def mixers(self) -> tuple[str, ...]:
        """Our mixers that take turns in a model of theirs."""
        return (self.mixer,)

    def _mlp(self, data: dict[str, Any], where: str) -> float:
        if not self.frame.has_mlp:
            return 0.0
        width, hidden = data.get("intermediate_size"), of(data, "hidden_size", where)
        if width is None:  # two thirds of the ratio, up to the next multiple of 256
            ratio = data.get("hidden_ratio")
            ratio = 4 if ratio is None and "hidden_ratio" in data else ratio or self.hidden_ratio
            width = 256 * math.ceil(int(hidden * ratio * 2 / 3) / 256)
        return width / hidden

    # --- tensors

    def unpack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        """Return their tensors with those worked out that have no counterpart one by one, by our names."""
        return tensors

    def pack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        """Return tensors by their names, with ours worked out that have no counterpart one by one."""
        return tensors

    def read_tensors(self, stored: Tensors, names: Iterable[str], config: ModelConfig) -> Tensors:
        """Return their tensors by our names, and as they are those that have no place here. config: ours."""
        stored, ours = self.unpack(dict(stored), config), {}
        for name in names:
            pieces = [stored.pop(theirs) for theirs in self.theirs(name) if theirs in stored]
            if pieces:
                ours[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return ours | stored

    def write_tensors(self, state: Tensors, config: ModelConfig) -> Tensors:
        """Return our tensors by their names. Raises InputError for numbers that theirs cannot be."""
        theirs: Tensors = {}
        for name, tensor in state.items():
            names = self.theirs(name)
            theirs |= {n: piece.contiguous() for n, piece in zip(names, tensor.chunk(len(names)))}
        return self.pack(theirs, config)

    def theirs(self, name: str) -> tuple[str, ...]:
        """Return what a tensor of ours is called there; several that are stacked in it."""
        frame = self.frame
        around = {"backbone.embedding.weight": frame.embedding, "backbone.norm_f.weight": frame.norm}
        if not (inside := re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", name)):
            return (around.get(name, name),)
        layer, rest = f"{frame.layers}.{inside[1]}", inside[2]
        if rest in frame.block:
            return tuple(f"{layer}.{piece}" for piece in frame.block[rest])
        module, *more = rest.removeprefix("mixer.").split(".")
        return (".".join([layer, frame.mixer, self.renamed.get(module, module), *more]),)


def of(data: Mapping[str, Any], key: str, where: str) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where}: {key}: expected a number, at least 1, got {value!r}")
    return value


def word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
