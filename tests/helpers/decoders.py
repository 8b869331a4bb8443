"""Tiny decoders of transformers to retrofit, in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf

from rnn_longctx.data import load_tokenizer
from rnn_longctx.models.retrofit.model import Retrofitted
from rnn_longctx.models.retrofit.plan import convert, plan_of

COMMON = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**COMMON, attention_bias=True),
    "mistral": lambda: hf.MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**COMMON),
    "qwen3": lambda: hf.Qwen3Config(**COMMON),
}
SPARSE = "block-sparse:block=4,window=8,sinks=1,top=2,gate=4"
WHOLE = "block-sparse:block=4,window=8,sinks=1,top=1000,gate=4"  # every block
MIXERS = (
    SPARSE,
    "two-stage:block=4,window=8,top=2",
    "longnet:segments=8/128,dilations=1/4",
    "mamba2",
    "gated-deltanet:d_conv=3",
)


def decoder(kind: str = "llama", **more: Any) -> Any:
    """Return a decoder whose biases and norms are not those of a fresh one."""
    config = CONFIGS[kind]()
    for name, value in more.items():
        setattr(config, name, value)
    model = hf.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(2) if "self_attn" in name else None
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def retrofitted(model: Any, mixer: str, layers: str = "all", heads: str = "all", seed: int = 0) -> Retrofitted:
    """Return a copy of a decoder, retrofitted, its new weights moved from where they begin."""
    new = convert(copy.deepcopy(model), plan_of(model, mixer, layers, heads), seed)
    lm = as_stream(new)
    with torch.no_grad():
        for attention in lm.retrofitted:
            for name, p in attention.parts.named_parameters():
                p.add_(0.1 * torch.randn_like(p)) if "A_log" not in name else None
    return lm


def as_stream(model: Any) -> Retrofitted:
    lm = Retrofitted(model.eval())
    lm.tokenizer = load_tokenizer("bytes")
    return lm
