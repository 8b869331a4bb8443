"""What config.json says, in each of four layouts.

    rnn-longctx    "format": "rnn-longctx", "model": {fields of Mamba2Config, or of ModelConfig}, ...
    state-spaces   mamba-ssm's, of the official ones: "d_model", "n_layer", "ssm_cfg": {"layer": "Mamba2", ...}, ...
    transformers   Mamba2ForCausalLM: "model_type": "mamba2"
    fla            flash-linear-attention's: "model_type" one of `rnn_longctx.models.checkpoint.fla.TYPES`

Nothing a file says is run, and everything wrong with one is an InputError of one line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnn_longctx.config import from_dict, to_dict
from rnn_longctx.devices import dtype_name
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.models.checkpoint import fla
from rnn_longctx.models.checkpoint.foreign import held_instead
from rnn_longctx.models.checkpoint.json_files import plain, read_json
from rnn_longctx.models.checkpoint.weights import WEIGHTS
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

FORMAT = "rnn-longctx"
GPT_NEOX = "EleutherAI/gpt-neox-20b"  # the tokenizer of the official checkpoints, which do not name it
SUPPORTED = f"rnn-longctx, state-spaces Mamba-2, transformers Mamba2, and of fla {', '.join(fla.TYPES)}"
ADOPTED = (
    *("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2", "mamba", "falcon_mamba", "jamba"),
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("olmo_hybrid", "lara_mini", "kimi_linear", "bailing_hybrid", "glm5_next", "minimax", "recurrent_gemma"),
)
DECODERS = ("llama", "mistral", "qwen2", "qwen3")  # of transformers, all attention: `rnn-longctx retrofit` takes them
WITH_IMAGES = ("glm5_next",)  # of these, those that transformers (5.24) has no model of text alone with a head for
NOT_ADOPTED = {  # recurrent models of transformers, and why they take no remedy
    "xlstm": "its outputs hang on a running maximum of its gates and on a normaliser, which the scan does not keep"
}
ADOPTED_NAMES = ", ".join(name for name in ADOPTED if not name.endswith(("_text", "_moe")))  # without variants
NAMED = f"supported: {SUPPORTED}; adopted: {ADOPTED_NAMES}"  # what a message says of them
LAYOUTS = ("rnn-longctx", "transformers", "state-spaces")  # of a model of Mamba-2
FLA = "fla"  # of a model whose layers are all of another kind that flash-linear-attention has
SIDE = "rnn_longctx.json"  # beside a config.json of mamba-ssm, which refuses keys that are not its own

# mamba-ssm: what shapes the model, in ssm_cfg too, what must be so, and what only initialises it or picks a kernel
_TOP = ("d_model", "n_layer", "vocab_size", "tie_embeddings", "residual_in_fp32")
_ONLY = {"d_intermediate": 0, "rms_norm": True}
_SHAPE = ("d_state", "d_conv", "expand", "headdim", "ngroups", "bias", "conv_bias", "dt_limit")
_FIXED = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
_INIT = ("A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init", "chunk_size", "use_mem_eff_path")

# Mamba2Config of transformers, by field of ours, with its defaults: its config.json may leave them out
_TRANSFORMERS = {
    "d_model": ("hidden_size", 4096),
    "n_layer": ("num_hidden_layers", 64),
    "vocab_size": ("vocab_size", 32768),
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 8),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "dt_limit": ("time_step_limit", (0.0, math.inf)),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_embeddings": ("tie_word_embeddings", False),
    "residual_in_fp32": ("residual_in_fp32", True),
}


@dataclass
class Header:
    """The statements of a directory beside its weights; None: it says nothing. `load_tokenizer` takes `tokenizer`;
    `fla` is what names its tensors, where the library of that name has written them."""

    config: Mamba2Config | ModelConfig
    tokenizer: str | Path | None = None
    train_length: int | None = None
    provenance: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None
    fla: fla.FlaType | None = None


@dataclass
class _Extra:
    """The facts that this library knows about a checkpoint beyond its shape, in every layout it writes."""

    tokenizer: str | None = None
    train_length: int | None = None
    provenance: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        if self.train_length is not None and self.train_length < 1:
            raise InputError(f"train_length: expected at least 1 token, got {self.train_length}")


def read_header(directory: Path) -> Header:
    """Return what config.json says in any of the layouts, with the tokenizer that belongs to it."""
    path = directory / "config.json"
    if not path.is_file():
        weights = [f.name for f in sorted(directory.iterdir()) if f.name.startswith(WEIGHTS)]
        if not weights and (instead := held_instead(directory)):
            raise InputError(f"{directory} {instead}")
        contents = f"{weights[0]} but no" if weights else "no"
        raise InputError(f"{directory} holds {contents} config.json; {NAMED}")
    data, where = read_json(path), str(path)
    if data.get("format") == FORMAT:
        inner = {k: v for k, v in data.items() if k not in ("format", "model")}
        extra = from_dict(_Extra, inner, where)
        shape: Any = data.get("model")
        header = _header(model_config(shape, f"{where}, model"), extra)
    elif "model_type" in data:
        ends = _ends(directory, data)
        extra = from_dict(_Extra, {**data.get("rnn_longctx", {}), "eos_token_id": ends}, f"{where}, rnn_longctx")
        kind = fla.type_of(data)
        header = _header(_transformers(data, where) if kind is None else kind.read_config(data, where), extra)
        header.fla = kind
    elif {"d_model", "n_layer", "vocab_size"} <= data.keys():
        side = directory / SIDE
        extra = from_dict(_Extra, read_json(side), str(side)) if side.is_file() else _Extra(GPT_NEOX)
        header = _header(_official(data, where), extra)
    else:
        keys = ", ".join(list(data)[:6]) or "nothing"
        raise InputError(f"{path} is of no known layout (keys: {keys}); {NAMED}")
    beside = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if beside and header.tokenizer in (None, GPT_NEOX):
        header.tokenizer = directory
    if (directory / "calibration.json").is_file():
        header.calibration = read_json(directory / "calibration.json")
    return header


def _ends(directory: Path, data: dict[str, Any]) -> Any:
    """Return the ends of a sequence that transformers' generate goes by: generation_config.json's, or config.json's."""
    file = directory / "generation_config.json"
    return (read_json(file) if file.is_file() else data).get("eos_token_id")


def own_config(config: Mamba2Config | ModelConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of the library's own layout."""
    return plain({"format": FORMAT, "model": to_dict(config), **extra})


def transformers_config(config: Mamba2Config, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
    """Return config.json for transformers' Mamba2ForCausalLM; `extra` goes under "rnn_longctx", which it ignores."""
    data: dict[str, Any] = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2"}
    extra, ends = {k: v for k, v in extra.items() if k != "eos_token_id"}, extra.get("eos_token_id")
    data |= {theirs: getattr(config, name) for name, (theirs, _) in _TRANSFORMERS.items()}
    data["num_heads"] = config.nheads
    data["time_step_limit"] = [v if math.isfinite(v) else {"__float__": "Infinity"} for v in config.dt_limit]
    # Its own defaults for these ids belong to another vocabulary.
    data |= {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": None}
    return plain({**data, "dtype": dtype_name(dtype), "rnn_longctx": extra})


def official_config(config: Mamba2Config) -> dict[str, Any]:
    """Return config.json for mamba-ssm's MambaLMHeadModel. An infinity is one, as Python's json writes and reads it."""
    cfg = {k: getattr(config, k) for k in _SHAPE}
    if config.dt_limit == (0.0, math.inf):  # no limit, which it knows by its default
        del cfg["dt_limit"]
    data = {k: getattr(config, k) for k in _TOP} | _ONLY | {"ssm_cfg": {"layer": "Mamba2", **cfg}}
    return data | {"attn_layer_idx": [], "attn_cfg": {}, "fused_add_norm": True, "pad_vocab_size_multiple": 1}


def check_layout(config: Mamba2Config | ModelConfig, layout: str) -> None:
    """Raise InputError where there is no such layout, or it cannot hold something that the model computes with."""
    if layout == FLA:
        fla.type_for(config)
        return
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}{nearest(layout, (*LAYOUTS, FLA))}")
    if layout != "rnn-longctx" and not isinstance(config, Mamba2Config):
        raise InputError(f"layout {layout!r} is for models of Mamba-2 alone: save this one in 'rnn-longctx'")
    if layout == "state-spaces" and config.norm_eps != Mamba2Config.norm_eps:
        raise InputError(
            f"layout 'state-spaces' cannot hold norm_eps {config.norm_eps:g}: mamba-ssm's is {Mamba2Config.norm_eps:g}"
        )


def _header(config: Mamba2Config | ModelConfig, extra: _Extra) -> Header:
    return Header(config, extra.tokenizer, extra.train_length, extra.provenance, eos_token_id=extra.eos_token_id)


def _official(data: dict[str, Any], where: str) -> Mamba2Config:
    cfg = data.get("ssm_cfg") or {}
    if not isinstance(cfg, dict):
        raise InputError(f"{where}: ssm_cfg: expected a mapping of keys to values, got {cfg!r}")
    layer = cfg.get("layer", "Mamba1")  # mamba-ssm's default
    if layer != "Mamba2":
        raise InputError(f"{where}: a {layer} model (ssm_cfg layer); supported: {SUPPORTED}")
    if data.get("attn_layer_idx"):
        layers = data["attn_layer_idx"]
        raise InputError(f"{where}: a hybrid with attention in layers {layers}; supported: {SUPPORTED}")
    for key, expected in _ONLY.items():
        if data.get(key, expected) != expected:
            raise InputError(f"{where}: {key} {data[key]!r} is not supported, only {expected!r}")
    for key, value in cfg.items():
        if key in _FIXED and value != _FIXED[key]:
            raise InputError(f"{where}: ssm_cfg {key} {value!r} is not supported, only {_FIXED[key]!r}")
        if key not in ("layer", "d_ssm", *_SHAPE, *_FIXED, *_INIT):
            known = nearest(key, [*_SHAPE, *_FIXED, *_INIT])
            raise InputError(f"{where}: unknown ssm_cfg key {key!r}{known}")
    fields = {k: data[k] for k in _TOP if k in data} | {k: cfg[k] for k in _SHAPE if k in cfg}
    config = from_dict(Mamba2Config, fields, where)
    multiple = data.get("pad_vocab_size_multiple", 8)
    if not isinstance(multiple, int) or multiple < 1:
        raise InputError(f"{where}: pad_vocab_size_multiple: expected at least 1, got {multiple!r}")
    config.vocab_size = -(-config.vocab_size // multiple) * multiple
    if cfg.get("d_ssm") not in (None, config.d_inner):
        raise InputError(f"{where}: ssm_cfg d_ssm {cfg['d_ssm']} is not supported, only {config.d_inner}")
    return config


def _transformers(data: dict[str, Any], where: str) -> Mamba2Config:
    if data["model_type"] != "mamba2":
        raise InputError(f"{where}: model_type {data['model_type']!r}; {NAMED}")
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{where}: hidden_act {data['hidden_act']!r} is not supported, only 'silu'")
    fields = {name: data.get(theirs, default) for name, (theirs, default) in _TRANSFORMERS.items()}
    limit: Any = fields["dt_limit"]
    if isinstance(limit, list):  # newer versions write an infinity as {"__float__": "Infinity"}
        fields["dt_limit"] = [v.get("__float__") if isinstance(v, dict) else v for v in limit]
    config = from_dict(Mamba2Config, fields, where)
    if data.get("num_heads", 128) != config.nheads:
        product = f"expand * hidden_size / head_dim = {config.nheads}"
        raise InputError(f"{where}: num_heads is {data.get('num_heads', 128)}, expected {product}")
    return config
