"""The format of flash-linear-attention (fla, 0.6): its config.json and its names of tensors, from and to our own.

`TYPES` has a line for each of its model types. One more, of a mixer here whose layer is fla's:

    "gated_deltanet": FlaType(
        "gated-deltanet",  # our mixer
        "GatedDeltaNetForCausalLM",
        keys={"heads": ("num_heads", 6), ...},  # our parameter: their key, their default
        fixed={"rank": 16},  # our parameters that no key of theirs says, and what they are in fla
        only={"use_short_conv": (True,), ...},  # their key: what our mixer computes with, the value to write first
        renamed={"out_proj": "o_proj", ...},  # names inside a mixer, ours to theirs, where they differ
    )

Names that are alike in both are in no table. Keys of theirs that only pick a kernel are not read. A type whose tensors
have no counterpart one by one is a subclass with `unpack` and `pack`; one whose keys need working out first has
`settled` (see `HGRN2`). `tests/models/checkpoint/test_fla.py` tries every type of the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.models.checkpoint.fla_type import LAYERS_IN_TURNS, WITHOUT_MLP, FlaType, Tensors, of
from rnn_longctx.models.config import ModelConfig, mixer_settings
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.mixers.mamba3 import SLOWEST
from rnn_longctx.spec import canonical


@dataclass(frozen=True)
class HeadGated(FlaType):
    """A type whose layers norm and gate each head: one tensor has two names, by `fuse_norm`; and keys and values may
    be said to be fewer than queries."""

    def settled(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        if data.get("num_kv_heads") == data.get("num_heads"):
            return {**data, "num_kv_heads": None}
        return data

    def unpack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        return {name.replace(".attn.g_norm.", ".attn.g_norm_swish_gate."): t for name, t in tensors.items()}


@dataclass(frozen=True)
class HGRN2(FlaType):
    """HGRN2, whose heads are as many as `expand_ratio` says, and whose lower bounds are one tensor of all layers: sums
    of its softmax over them, b_l = s_1 + ... + s_l. Ours are log b_l - log(1 - b_l) of every layer but the first."""

    def settled(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        ratio, hidden = data.get("expand_ratio", 128), of(data, "hidden_size", where)
        if ratio is None:
            return data
        if not isinstance(ratio, int) or ratio < 1 or hidden % ratio:
            raise InputError(f"{where}: expand_ratio {ratio!r} does not divide hidden_size {hidden}")
        return {**data, "num_heads": hidden // ratio}

    def write_config(self, config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
        data = super().write_config(config, dtype, extra)
        return {**data, "expand_ratio": config.d_model // data["num_heads"]}

    def unpack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        logs = tensors.pop("model.lower_bounds", torch.zeros(1, 1)).double()  # (L, d_model)
        above = [logs[0]]  # log(1 - b_l) but for a constant, from the last layer down
        for share in logs[1:].flip(0)[:-1]:
            above.append(torch.logaddexp(above[-1], share))
        bounds = logs[1:].logcumsumexp(0) - torch.stack(above).flip(0)[: len(logs) - 1]
        return tensors | {f"backbone.layers.{i}.mixer.bound": bound.float() for i, bound in enumerate(bounds, 1)}

    def pack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        if not mixer_settings(config.texts[0])[1].lower_bound:
            return tensors
        bounds = [tensors.pop(f"model.layers.{i}.attn.bound") for i in range(1, config.n_layer)]
        like = tensors["model.norm.weight"]
        sums = torch.stack([torch.zeros(like.shape, dtype=torch.float64), *(b.double().sigmoid() for b in bounds)])
        shares = torch.cat([1 - sums[-1:], sums.diff(dim=0)])  # (L, d_model)
        if not bool((shares > 0).all()):
            layer = int((shares <= 0).any(1).nonzero()[0])
            raise InputError(
                f"layout 'fla' cannot hold lower bounds that are not above those before, as of layer {layer}"
            )
        return tensors | {"model.lower_bounds": shares.log().to(like.dtype)}


@dataclass(frozen=True)
class Mamba(FlaType):
    """Mamba-1, whose rank of the steps is 0 here where it is the usual one."""

    def settled(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        usual = data.get("dt_rank", "auto") in ("auto", _usual_rank(of(data, "hidden_size", where)))
        return {**data, "dt_rank": 0} if usual else data

    def write_config(self, config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
        data = super().write_config(config, dtype, extra)
        return {**data, "dt_rank": data["dt_rank"] or _usual_rank(config.d_model)}


@dataclass(frozen=True)
class Delta(FlaType):
    """A type of the delta rule: where their key is None ours is 0, and its convolutions are one of ours."""

    def settled(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        return {k: 0 if v is None and k in self.absent else v for k, v in data.items()}

    def write_config(self, config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
        data = super().write_config(config, dtype, extra)
        return {k: None if k in self.absent and not v else v for k, v in data.items()}

    @property
    def absent(self) -> set[str]:
        """Their keys that are None where there is none of what they count."""
        return {key for key, default in self.keys.values() if default == 0 and not isinstance(default, bool)}

    def unpack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        for name in [name for name in tensors if name.endswith(".q_conv1d.weight")]:
            names = [name.replace(".q_conv1d.", f".{which}_conv1d.") for which in "qkv"]
            if all(n in tensors for n in names):
                tensors[name.replace(".q_conv1d.", ".conv1d.")] = torch.cat([tensors.pop(n) for n in names])
        return tensors

    def pack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        for name in [name for name in tensors if name.endswith(".conv1d.weight")]:
            conv, names = tensors.pop(name), {w: name.replace(".conv1d.", f".{w}_conv1d.") for w in "qkv"}
            sizes = [len(tensors[name.replace(".conv1d.", f".{which}_proj.")]) for which in names]
            tensors |= {n: t.contiguous() for n, t in zip(names.values(), conv.split(sizes))}
        return tensors


@dataclass(frozen=True)
class SafelyGated(Delta):
    """KDA, which says a lower bound of its log-decays twice."""

    def write_config(self, config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
        data = super().write_config(config, dtype, extra)
        return {**data, "safe_gate": data["lower_bound"] is not None}


_LETTERS = "rwkvag"  # the order of our RWKV-7's `mix`


@dataclass(frozen=True)
class RWKV7(FlaType):
    """RWKV-7, each of whose layers is two of ours. Its norms are LayerNorms, whose biases may be left out; one more,
    right after the embedding, is put into that when it is read."""

    norm: str = "layer"

    def settled(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        hidden, heads = of(data, "hidden_size", where), data.get("num_heads")
        data = dict(data)
        if data.get("head_dim", 64) is None and isinstance(heads, int) and heads > 0:
            data["head_dim"] = hidden // heads
        if unsaid := [key for key, _ in self.keys.values() if key in data and data[key] is None]:
            ranks = mixer_settings(f"rwkv7:headdim={data.get('head_dim', 64)}")[1].ranks(hidden)
            ranks = {self.keys[f"rank_{letter}"][0]: rank for letter, rank in ranks.items()}
            data |= {key: ranks[key] for key in unsaid if key in ranks}
        values = data.get("value_dim")
        if any(value != hidden for value in (values if isinstance(values, list) else [values or hidden])):
            raise InputError(f"{where}: value_dim {values!r} is not supported, only hidden_size, {hidden}")
        if data.get("norm_first", True) and data.get("tie_word_embeddings"):
            raise InputError(
                f"{where}: tie_word_embeddings with norm_first is not supported: the head is then not normed"
            )
        return data

    def read_config(self, data: dict[str, Any], where: str) -> ModelConfig:
        config = super().read_config(data, where)
        hidden, inside = config.d_model, data.get("intermediate_size")
        if inside is None:
            ratio = data.get("hidden_ratio", self.hidden_ratio)
            inside = 32 * math.ceil(int(hidden * (self.hidden_ratio if ratio is None else ratio)) / 32)
        mixers = [config.texts[0], canonical(*mixer_settings(f"rwkv7-ffn:expand={inside / hidden}"))]
        return replace(config, mixer=mixers, n_layer=2 * config.n_layer)

    def write_config(self, config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
        data = super().write_config(config, dtype, extra)
        ranks = mixer_settings(config.texts[0])[1].ranks(config.d_model)
        data |= {self.keys[f"rank_{letter}"][0]: rank for letter, rank in ranks.items()}
        inside = mixer_settings(config.texts[1])[1].width(config.d_model)
        layers = {"num_hidden_layers": config.n_layer // 2, "hidden_ratio": None, "intermediate_size": inside}
        return {**data, **layers, "norm_first": False, "norm_bias": True}

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        if config.n_layer % 2:
            raise InputError(
                f"layout 'fla' cannot hold {config.n_layer} layers of {' and '.join(self.mixers)} in turns"
            )

    @property
    def mixers(self) -> tuple[str, ...]:
        return self.mixer, "rwkv7-ffn"

    def unpack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        first = "model.layers.0.pre_norm"
        if (weight := tensors.pop(f"{first}.weight", None)) is not None:
            bias, table = tensors.pop(f"{first}.bias", None), tensors["model.embeddings.weight"].float()
            bias = None if bias is None else bias.float()
            normed = F.layer_norm(table, table.shape[-1:], weight.float(), bias, config.norm_eps)
            tensors["model.embeddings.weight"] = normed
        for name in list(tensors):
            if re.search(r"norm\.weight$", name):
                tensors.setdefault(name.replace(".weight", ".bias"), torch.zeros_like(tensors[name]))
            elif name.endswith(".attn.x_x"):  # of its first version
                rows = tensors.pop(name).reshape(len(_LETTERS), 1, -1)
                tensors |= {name.replace(".x_x", f".x_{letter}"): row for letter, row in zip(_LETTERS, rows)}
            elif re.search(r"\.attn\.x_.$", name):
                tensors[name] = tensors[name].reshape(1, -1)
            elif name.endswith(".ffn.x_k"):
                tensors[name] = tensors[name].reshape(-1)
        return tensors

    def pack(self, tensors: Tensors, config: ModelConfig) -> Tensors:
        return {name: t.view(1, 1, -1) if re.search(r"\.attn\.x_.$", name) else t for name, t in tensors.items()}

    def theirs(self, name: str) -> tuple[str, ...]:
        if name == "backbone.norm_f.bias":
            return ("model.norm.bias",)
        if not (inside := re.fullmatch(r"backbone\.layers\.(\d+)\.(norm|mixer)\.(.+)", name)):
            return super().theirs(name)
        layer, channels = divmod(int(inside[1]), 2)
        place, rest = f"model.layers.{layer}.{'ffn' if channels else 'attn'}", inside[3]
        if inside[2] == "norm":
            return (f"{place}_norm.{rest}",)
        if rest == "mix":
            return (f"{place}.x_k",) if channels else tuple(f"{place}.x_{letter}" for letter in _LETTERS)
        module, *more = rest.split(".")
        inner = ["lora"] if module.endswith("_lora") else []
        return (".".join([place, self.renamed.get(module, module), *inner, *more]),)


# What Gated DeltaNet and KDA say alike.
_DELTA: dict[str, tuple[str, Any]] = {
    "v_heads": ("num_v_heads", 0),
    "d_conv": ("conv_size", 4),
    "neg_eigval": ("allow_neg_eigval", False),
}

_TYPES: dict[str, FlaType] = {
    "gla": HeadGated(
        "gla",
        "GLAForCausalLM",
        keys={"heads": ("num_heads", 4), "expand_k": ("expand_k", 0.5), "expand_v": ("expand_v", 1.0)},
        fixed={"rank": 16},
        only={
            "num_kv_heads": (None,),
            "feature_map": (None,),
            "use_short_conv": (False,),
            "use_output_gate": (True,),
            "clamp_min": (None,),
        },
        renamed={"decay_proj": "gk_proj", "norm": "g_norm_swish_gate", "out_proj": "o_proj"},
    ),
    "retnet": HeadGated(
        "retnet",
        "RetNetForCausalLM",
        keys={"heads": ("num_heads", 8), "expand_k": ("expand_k", 1.0), "expand_v": ("expand_v", 2.0)},
        only={"num_kv_heads": (None,), "feature_map": (None,), "use_output_gate": (True,)},
        renamed={"norm": "g_norm_swish_gate", "out_proj": "o_proj"},
        hidden_ratio=2,
    ),
    "hgrn2": HGRN2(
        "hgrn2",
        "HGRN2ForCausalLM",
        keys={"heads": ("num_heads", None), "lower_bound": ("use_lower_bound", True)},
        only={"use_short_conv": (False,)},
        renamed={"norm": "g_norm", "out_proj": "o_proj"},
    ),
    "mamba": Mamba(
        "mamba1",
        "MambaForCausalLM",
        keys={
            "d_state": ("state_size", 16),
            "d_conv": ("conv_kernel", 4),
            "expand": ("expand", 2),
            "dt_rank": ("dt_rank", 0),
        },
        only={"use_bias": (False,), "use_conv_bias": (True,)},
        frame=WITHOUT_MLP,
        norm_eps=1e-5,
    ),
    "mamba3": FlaType(
        "mamba3",
        "Mamba3ForCausalLM",
        keys={
            "d_state": ("state_size", 128),
            "expand": ("expand", 2),
            "headdim": ("head_dim", 64),
            "ngroups": ("n_groups", 1),
            "rope_fraction": ("rope_fraction", 0.5),
        },
        only={"use_bias": (False,), "A_floor": (SLOWEST,), "is_outproj_norm": (False,), "is_mimo": (False,)},
        frame=WITHOUT_MLP,
        norm_eps=1e-5,
    ),
    "gated_deltanet": Delta(
        "gated-deltanet",
        "GatedDeltaNetForCausalLM",
        keys={"heads": ("num_heads", 6), "head_dim": ("head_dim", 256), "expand_v": ("expand_v", 2.0), **_DELTA},
        only={"use_gate": (True,), "use_short_conv": (True,), "output_gate_activation": ("swish", "silu")},
        renamed={"norm": "o_norm", "out_proj": "o_proj"},
    ),
    "kda": SafelyGated(
        "kda",
        "KDAForCausalLM",
        keys={
            "heads": ("num_heads", 16),
            "head_dim": ("head_dim", 128),
            "expand_v": ("expand_v", 1.0),
            "lower_bound": ("lower_bound", 0),
            **_DELTA,
        },
        only={"use_short_conv": (True,)},
        renamed={"norm": "o_norm", "out_proj": "o_proj"},
    ),
    "delta_net": Delta(
        "deltanet",
        "DeltaNetForCausalLM",
        keys={
            "heads": ("num_heads", 16),
            "expand_k": ("expand_k", 1.0),
            "expand_v": ("expand_v", 1.0),
            "gated": ("use_gate", False),
            "d_conv": ("conv_size", 4),
            "neg_eigval": ("allow_neg_eigval", False),
        },
        only={"use_beta": (True,), "use_short_conv": (True,), "qk_norm": ("l2",), "qk_activation": ("silu",)},
        renamed={"norm": "o_norm", "out_proj": "o_proj"},
    ),
    "rwkv7": RWKV7(
        "rwkv7",
        "RWKV7ForCausalLM",
        keys={
            "headdim": ("head_dim", 64),
            "rank_w": ("decay_low_rank_dim", 64),
            "rank_a": ("a_low_rank_dim", 64),
            "rank_v": ("v_low_rank_dim", 16),
            "rank_g": ("gate_low_rank_dim", 128),
        },
        only={"hidden_act": ("sqrelu",)},
        renamed={"group_norm": "g_norm", "out_proj": "o_proj"},
        frame=LAYERS_IN_TURNS,
        norm_eps=1e-5,
    ),
}
TYPES = {name: replace(kind, model_type=name) for name, kind in _TYPES.items()}


def type_of(data: Mapping[str, Any]) -> FlaType | None:
    """Return the type of fla's that a config.json is of, or None. (Its Mamba and transformers' have one name.)"""
    kind = data.get("model_type")
    if not isinstance(kind, str) or (kind == "mamba" and "norm_eps" not in data):
        return None
    return TYPES.get(kind)


def type_for(config: Mamba2Config | ModelConfig) -> FlaType:
    """Return the type of fla's that holds a model of ours. Raises InputError where there is none."""
    texts = [] if isinstance(config, Mamba2Config) else [canonical(*mixer_settings(text)) for text in config.texts]
    texts = texts[:1] if len(set(texts)) == 1 else texts
    kinds = {kind.mixers: kind for kind in TYPES.values()}
    kind = kinds.get(tuple(text.partition(":")[0] for text in texts))
    if not isinstance(config, ModelConfig) or kind is None:
        names = ", ".join(" in turns with ".join(names) for names in kinds)
        raise InputError(f"layout 'fla' is for models whose layers are all alike, of one of {names}")
    kind.check(config)
    return kind


def _usual_rank(d_model: int) -> int:
    return math.ceil(d_model / 16)
