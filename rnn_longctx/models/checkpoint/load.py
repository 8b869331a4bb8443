"""`load` reads a checkpoint into a model, from any of four layouts (`rnn_longctx.models.checkpoint.layouts`)."""

from __future__ import annotations

from pathlib import Path

import torch

from rnn_longctx.config import parse_length
from rnn_longctx.data.tokenizers import load_tokenizer
from rnn_longctx.devices import device_of, dtype_of
from rnn_longctx.models.checkpoint.layouts import read_header
from rnn_longctx.models.checkpoint.locate import locate
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer, fits
from rnn_longctx.models.checkpoint.weights import check_finite, fitting, read_weights, stored_dtype
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    tokenizer: str | None = None,
    train_length: int | str | None = None,
) -> LM:
    """Return one of this library's own models, in eval mode. Arguments and errors as of `rnn_longctx.load`, which takes
    retrofitted decoders, too."""
    weights_dtype, device = dtype_of("float32" if dtype is None else dtype), device_of(device)
    stated_length = None if train_length is None else parse_length(train_length, "train_length")
    directory, name, provenance = locate(source)
    header = read_header(directory)
    with torch.device("meta"):
        model = LM(header.config)
    tensors = read_weights(directory)
    if header.fla is not None:
        assert isinstance(header.config, ModelConfig)
        tensors = header.fla.read_tensors(tensors, model.state_dict(), header.config)
    stored = fitting(tensors, model, str(source))
    check_finite(stored, str(source))

    state = {k: t.to(device, stored_dtype(k, weights_dtype)) for k, t in stored.items()}
    model.load_state_dict(state, assign=True, strict=False)
    if header.config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight

    model.name = name
    model.train_length = stated_length or header.train_length
    model.provenance = header.provenance or provenance
    model.calibration = header.calibration
    model.eos_token_id = header.eos_token_id
    spec = tokenizer or header.tokenizer
    # One that was named must be there; any other may be missing until it is used.
    eager = tokenizer is not None or spec == "bytes"
    size = header.config.vocab_size
    model.tokenizer = fits(load_tokenizer(spec), size) if eager and spec else LazyTokenizer(spec, name, size)
    return model.eval()
